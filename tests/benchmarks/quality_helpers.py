"""Tiny tasks for the comparison of methods: made-up token ids, runs within this process."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from benchmarks.quality import damages, methods, runs
from benchmarks.quality.runs import Spec
from benchmarks.quality.tasks import TASKS, Examples, Part, Task

VOCABULARY, CLASSES, STEPS = 40, 3, 12
ALPHA = 4.0
HEAD_RATE = 3e-2


def part(count, seed, prompts=False):
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 10, count)
    ids = random.integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    ends = np.cumsum(lengths)
    # The class is in the first token: something to learn.
    labels = np.full(count, 2) if prompts else ids[ends - lengths] % CLASSES
    return Part(ids, ends.astype(np.int64), labels.astype(np.int64))


def examples(classes, counts=(80, 20, 30)):
    return Examples(classes, 0, *(part(count, seed, not classes) for seed, count in enumerate(counts)))


@dataclass(frozen=True)
class TinyTask(Task):
    """Made-up ids instead of texts."""

    def examples(self):
        return examples(0 if self.metric == "perplexity" else CLASSES)


def save_models(folders):
    """Two tiny pretrained models, into ``folders["bert"]`` and ``folders["llama"]``."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    little = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = BertConfig(**little, num_attention_heads=2, max_position_embeddings=16)
    BertModel(bert).save_pretrained(folders["bert"])
    llama = LlamaConfig(**little, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    LlamaForCausalLM(llama).save_pretrained(folders["llama"])


def spec(tmp_path, method="lora", multiplier=2, seed=0, rate=1e-2, task="bert", **more):
    head_rate = HEAD_RATE if task == "bert" and method != methods.FROZEN else None
    return Spec(task, method, multiplier, seed, rate, STEPS, str(tmp_path), **{"head_rate": head_rate, **more})


def put_tiny_tasks(monkeypatch, folders):
    """Tasks ``bert`` and ``llama`` on the models in ``folders``, and ``damaged-...``, which were rounded to 3 bits."""
    damage = partial(damages.round_weights, bits=3)
    for name, metric in (("bert", "accuracy"), ("llama", "perplexity")):
        terms = (name, lambda name=name: folders[name], None, STEPS, 4, 10)
        monkeypatch.setitem(TASKS, name, TinyTask(name, *terms, metric, 10.0))
        damaged = TinyTask(f"damaged-{name}", *terms, "agreement", 10.0, damage=damage)
        monkeypatch.setitem(TASKS, damaged.name, damaged)


class InProcess:
    """A run without a process of its own."""

    def __init__(self, spec):
        self.output, self.returncode = "", 0
        try:
            runs.run(spec)
        except Exception as error:
            self.output, self.returncode = str(error), 1

    def poll(self):
        return self.returncode

    def communicate(self):
        return self.output, None
