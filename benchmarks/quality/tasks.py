"""The tasks: model, texts, length of training, metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.quality import damages, models, texts
from examples.data import CACHE, aside, keep

__all__ = ["IGNORED", "TASKS", "Examples", "Part", "Task", "encode"]

FOLDER = "quality"
IGNORED = -100  # a label that no loss counts
PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Part:
    """Token ids of examples, one behind the other.

    Attributes:
        ids: int32.
        ends: int64, one an example: where it ends in ``ids``.
        labels: int64, one an example: its class, or for a language model the number of tokens of its prompt.
    """

    ids: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def tokens(self, number: int) -> np.ndarray:
        """The ids of one example."""
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]


@dataclass(frozen=True)
class Examples:
    """The three parts of a task as a model takes them; ``classes`` is 0 for a language model, ``pad`` an id."""

    classes: int
    pad: int
    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """A model, texts, and a length of training.

    Attributes:
        name: for the command line and the record.
        model_name: for the tables.
        model: makes sure that the model is there; its folder.
        split: the texts.
        steps, batch: optimizer steps, and examples a step.
        max_tokens: at which an example is cut.
        metric: ``"accuracy"`` of a classifier, ``"perplexity"`` of a language model, or ``"agreement"`` of a damaged
            model with the original, see :mod:`benchmarks.quality.recovery`.
        guess: seconds of a run on one CPU core, until one has been timed.
        budgets: multiples of the number of adapted layers. At 1 a method that keeps one rank everywhere can't move any.
        note: what to know before reading its results, in a sentence.
        default: whether a call on a CPU that names no tasks does it.
        damage: is applied to the model that is to be recovered; None for a task without recovery.
        climbs_each: whether learning rates are tried at each budget: where the middle one's is not good for the others.
    """

    name: str
    model_name: str
    model: Callable[[], Path]
    split: Callable[[], texts.Split]
    steps: int
    batch: int
    max_tokens: int
    metric: str
    guess: float
    budgets: tuple[float, ...] = (2, 4, 8)
    note: str = ""
    default: bool = True
    damage: Callable[[nn.Module], None] | None = None
    climbs_each: bool = False

    @property
    def middle(self) -> float:
        """Alpha at every budget. At the budget of as many ranks the scaling is 1, and learning rates are tried."""
        return self.budgets[len(self.budgets) // 2]

    @property
    def has_head(self) -> bool:
        """Whether a head is drawn anew: only a classifier's."""
        return self.metric == "accuracy"

    def examples(self) -> Examples:
        """Tokenised once, then read from the cache.

        Raises:
            DataError: texts or model can't be had.
        """
        file = CACHE / FOLDER / f"{self.name}-{self.max_tokens}.npz"
        if not file.exists():
            found = encode(self.split(), models.tokenizer(self.model()), self.max_tokens)
            with aside() as folder:
                _write(found, folder / file.name)
                keep(folder / file.name, file)
        with np.load(file) as stored:
            parts = {name: Part(*(stored[f"{name}_{field}"] for field in ("ids", "ends", "labels"))) for name in PARTS}
            return Examples(int(stored["classes"]), int(stored["pad"]), **parts)


def encode(split: texts.Split, tokenizer: Any, max_tokens: int) -> Examples:
    """Token ids, cut at ``max_tokens``; an example whose completion is cut off whole is left out."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = {name: _encode(getattr(split, name), tokenizer, max_tokens) for name in PARTS}
    return Examples(split.classes, int(pad or 0), **parts)


def _encode(examples: list[texts.Example], tokenizer: Any, max_tokens: int) -> Part:
    if examples and "label" in examples[0]:
        encoded = tokenizer([e["text"] for e in examples], truncation=True, max_length=max_tokens).input_ids
        rows = list(zip(encoded, (e["label"] for e in examples), strict=True))
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompts = tokenizer([e["prompt"] for e in examples], add_special_tokens=False).input_ids
        completions = tokenizer([e["completion"] for e in examples], add_special_tokens=False).input_ids
        rows = [((p + c + end)[:max_tokens], len(p)) for p, c in zip(prompts, completions, strict=True)]
        rows = [(ids, prompt) for ids, prompt in rows if 0 < prompt < len(ids)]
    return Part(
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]),
        np.cumsum([len(ids) for ids, _ in rows], dtype=np.int64),
        np.asarray([label for _, label in rows], np.int64),
    )


def _write(examples: Examples, file: Path) -> None:
    arrays = {"classes": examples.classes, "pad": examples.pad}
    for name in PARTS:
        part = getattr(examples, name)
        arrays |= {f"{name}_ids": part.ids, f"{name}_ends": part.ends, f"{name}_labels": part.labels}
    np.savez(file, **arrays)


MINILM, SMOLLM2 = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct (weights rounded to 4 bits)"
LOWER_CASE = (
    "The posts are one lower-case line of words each, without header lines that could be stripped: the words of the "
    "subject come first in many of them, for every method alike."
)
ROUNDED = (
    "The model's weights had been rounded to 4 bits: perplexities are not those of the original, and a part of what is "
    "gained may be the damage undone, by every method alike."
)
RECOVERY = (
    "It learns to give back the original's last hidden states on {}. The loss is the squared error of all tokens' "
    "states relative to the original's squares. Frozen is the damaged model as it is."
)
ON_GLOSSES, ON_REVIEWS = RECOVERY.format("WordNet's glosses"), RECOVERY.format("sentences of movie reviews")
NEIGHBOURS = "Agreement is the share of test texts with the same nearest neighbour among them as by the original."
LIKELIEST = "Agreement is the share of tokens after which the same token is the likeliest as by the original."
LANGUAGE = {"metric": "perplexity", "note": ROUNDED, "default": False, "climbs_each": True}
# Sizes for which all methods with five seeds take about an hour a task on two cores; the language models take days.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("supersense", MINILM, models.minilm, texts.supersense, 400, 16, 32, "accuracy", 70),
        Task("polarity", MINILM, models.minilm, texts.polarity, 200, 16, 48, "accuracy", 70),
        Task("newsgroups", MINILM, models.minilm, texts.newsgroups, 300, 16, 48, "accuracy", 180, note=LOWER_CASE),
        Task(
            "rounded",
            *(MINILM, models.minilm, texts.supersense, 300, 16, 32, "agreement", 110),
            note=f"Its weights were rounded to 3 bits. {ON_GLOSSES} {NEIGHBOURS}",
            damage=partial(damages.round_weights, bits=3),
        ),
        Task(
            "shortened",
            *(MINILM, models.minilm, texts.supersense, 300, 16, 32, "agreement", 90),
            note=f"The third and the fourth of its six layers were taken out. {ON_GLOSSES} {NEIGHBOURS}",
            damage=partial(damages.without_layers, numbers=(2, 3)),
        ),
        Task(
            "pruned",
            *(MINILM, models.minilm, texts.polarity, 300, 16, 32, "agreement", 90),
            note=f"The smaller half of each row of its weights was set to 0. {ON_REVIEWS} {NEIGHBOURS}",
            damage=partial(damages.prune_weights, share=0.5),
        ),
        Task(
            "rounded-lm",
            *(SMOLLM2, models.smollm2, texts.glosses, 200, 8, 48, "agreement", 900),
            note=f"Its weights were rounded once more, to 3 bits. {ON_GLOSSES} {LIKELIEST}",
            default=False,
            damage=partial(damages.round_weights, bits=3),
            climbs_each=True,
        ),
        # 200 steps: in fewer L1RA's own settings move ranks once or not at all.
        Task("glosses", SMOLLM2, models.smollm2, texts.glosses, 200, 16, 64, guess=1500, **LANGUAGE),
        Task("instructions", SMOLLM2, models.smollm2, texts.instructions, 200, 8, 256, guess=6000, **LANGUAGE),
    )
}
