"""The training loop, the same for every method, and evaluation."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.methods import Adapted
from benchmarks.quality.tasks import IGNORED, Examples, Part

__all__ = ["Trained", "batch_numbers", "collate", "embed", "evaluate", "frozen_classifier", "groups", "train"]

WARMUP = 0.06
WEIGHT_DECAY = 0.01
CLIP = 1.0
CHUNK = 16  # batches that are sorted by length together
# Of a batch that is only read. A language model's logits take 200 kB a token.
EVALUATED, EVALUATED_TOKENS = 64, 2048
LOOK = 20  # steps between two looks at whether the loss is finite
REGULARIZATION = (0.1, 1.0, 10.0, 100.0)


def batch_numbers(lengths: np.ndarray, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """The examples of each step, of similar length, so that little is padded; the same for every method.

    An epoch is shuffled, sorted by length within chunks of 16 batches, cut into batches, and these are shuffled.
    Examples that do not fill a batch are left out of the epoch.

    Raises:
        ValueError: fewer examples than a batch takes.
    """
    if len(lengths) < batch:
        raise ValueError(f"{len(lengths)} examples don't fill a batch of {batch}.")
    random = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    while len(chosen) < steps:
        order = random.permutation(len(lengths))
        order = order[: len(order) // batch * batch]
        epoch = []
        for start in range(0, len(order), CHUNK * batch):
            chunk = order[start : start + CHUNK * batch]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            epoch += np.split(chunk, len(chunk) // batch)
        chosen += [epoch[i] for i in random.permutation(len(epoch))]
    return chosen[:steps]


def collate(part: Part, numbers: np.ndarray, classes: int, pad: int, device: torch.device) -> dict[str, Tensor]:
    """Padded ``input_ids``, ``attention_mask`` and ``labels``: ``(batch,)`` classes or ``(batch, length)`` ids."""
    rows = [part.tokens(n) for n in numbers]
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    labels = part.labels[numbers]
    if not classes:
        # The loss counts the completion alone: neither the prompt nor the padding.
        counted = (np.arange(longest) >= labels[:, None]) & (mask == 1)
        labels = np.where(counted, ids, IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}


@dataclass
class Trained:
    """Time and memory of a training.

    Attributes:
        seconds: of all of it.
        step_seconds: median of a step.
        peak_bytes: of memory on the GPU; None on a CPU.
        diverged: the loss was no finite number any more, and the training was broken off.
    """

    seconds: float
    step_seconds: float
    peak_bytes: int | None
    diverged: bool


def groups(adapted: Adapted, rate: float, head_rate: float | None) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: adapters at ``rate``, then the head at ``head_rate`` if that is not None.

    Raises:
        ValueError: no ``head_rate`` for a head, or one without a head.
    """
    if (head_rate is not None) != bool(adapted.head):
        raise ValueError(f"head_rate is {head_rate}: a fresh head needs a learning rate of its own, and nothing else.")
    if head_rate is None:
        return [{"params": adapted.trained, "lr": rate}]
    head = set(map(id, adapted.head))
    others = [p for p in adapted.trained if id(p) not in head]
    return [{"params": others, "lr": rate}, {"params": adapted.head, "lr": head_rate}]


def train(
    adapted: Adapted,
    examples: Examples,
    batches: list[np.ndarray],
    rate: float,
    seed: int,
    head_rate: float | None = None,
) -> Trained:
    """AdamW at ``rate``, the head at ``head_rate``, warmed up over 6 % of the steps, then falling to 0 in a line.

    Raises:
        ValueError: see :func:`groups`.
    """
    model, device = adapted.model, next(adapted.model.parameters()).device
    optimizer = torch.optim.AdamW(groups(adapted, rate, head_rate), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, len(batches)))
    torch.manual_seed(seed)  # of the model's own dropout: adapters have drawn different numbers until here
    model.train()
    watch, diverged = Stopwatch(device), False
    for step, numbers in enumerate(batches, 1):
        batch = collate(examples.train, numbers, examples.classes, examples.pad, device)
        with precision(device):
            loss = adapted.forward(**batch).loss
        if step % LOOK == 0 and not math.isfinite(loss.item()):
            diverged = True
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.trained, CLIP)
        optimizer.step()
        adapted.after_step(step)
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap()
    return Trained(*watch.read(), diverged)


def share_of_rate(step: int, steps: int) -> float:
    """From 0 exclusive to 1 over the warm-up, then down to 0 after the last step."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else max(0, steps - step) / max(1, steps - warm)


class Stopwatch:
    """Seconds of steps; on a GPU from CUDA events, so that the host does not wait for each step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        self.marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def read(self) -> tuple[float, float, int | None]:
        """Seconds in all, median seconds of a step, peak of the GPU's memory."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        pairs = zip(self.marks, self.marks[1:], strict=False)
        steps = [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]
        return seconds, statistics.median(steps or [0.0]), torch.cuda.max_memory_allocated() if self.cuda else None


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 for products on a GPU, float32 on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def reading(part: Part, examples: Examples, device: torch.device) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Numbers and batches of a part, the shortest first."""
    order = np.argsort(part.lengths, kind="stable")
    lengths = part.lengths[order]
    start = 0
    while start < len(order):
        # Sorted: the last example of a batch is its longest, and fewer of them fit the longer it is.
        padded = lengths[start : start + EVALUATED] * np.arange(1, len(lengths[start : start + EVALUATED]) + 1)
        count = max(1, int(np.searchsorted(padded, EVALUATED_TOKENS, side="right")))
        numbers = order[start : start + count]
        start += count
        yield numbers, collate(part, numbers, examples.classes, examples.pad, device)


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, examples: Examples) -> tuple[float, float]:
    """Mean loss of an example (of a token, for a language model), and accuracy from 0 to 1 (or perplexity)."""
    model.eval()
    device = next(model.parameters()).device
    loss, right, count = 0.0, 0, 0
    for _, batch in reading(part, examples, device):
        labels = batch.pop("labels")
        with precision(device):
            logits = model(**batch).logits
        if not examples.classes:
            logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    mean = loss / count
    if examples.classes:
        return mean, right / count
    return mean, math.exp(mean) if mean < 700 else math.inf


# --- the model as it is


@torch.no_grad()
def embed(model: nn.Module, part: Part, examples: Examples) -> np.ndarray:
    """Mean of the last hidden states over the tokens, ``(examples, hidden)``."""
    model.eval()
    device = next(model.parameters()).device
    rows = np.empty((len(part), model.config.hidden_size), np.float32)
    for numbers, batch in reading(part, examples, device):
        batch.pop("labels")
        mask = batch["attention_mask"].unsqueeze(-1)
        with precision(device):
            hidden = model.base_model(**batch).last_hidden_state.float()
        rows[numbers] = ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()
    return rows


def frozen_classifier(
    model: nn.Module, examples: Examples, batches: list[np.ndarray]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A logistic regression on the embeddings of the very examples that the other methods see.

    Its regularisation is chosen by the loss on the validation part.

    Returns:
        Loss and accuracy on the validation part, and on the test part.
    """
    from sklearn.linear_model import LogisticRegression

    numbers = np.unique(np.concatenate(batches))
    whole = examples.train
    rows = [whole.tokens(n) for n in numbers]
    seen = Part(np.concatenate(rows), np.cumsum([len(row) for row in rows]), whole.labels[numbers])
    found = {part: embed(model, part, examples) for part in (seen, examples.validation, examples.test)}
    best = None
    for strength in REGULARIZATION:
        regression = LogisticRegression(C=strength, max_iter=1000).fit(found[seen], seen.labels)
        scores = []
        for part in (examples.validation, examples.test):
            odds = np.full((len(part), examples.classes), 1e-12)
            odds[:, regression.classes_] = regression.predict_proba(found[part]).clip(1e-12)
            loss = -np.log(odds[np.arange(len(part)), part.labels]).mean()
            scores.append((float(loss), float((odds.argmax(1) == part.labels).mean())))
        if best is None or scores[0][0] < best[0][0]:
            best = scores
    return best[0], best[1]
