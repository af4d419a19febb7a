"""A table of circumstances and models: what goes on in users' trainings besides forward, backward and step.

A circumstance is one line in ``CIRCUMSTANCES``, a model one line in ``MODELS``; ``test_circumstances.py`` runs them on
the fused path and on plain PyTorch and compares.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from helpers import SIZES, trainable
from torch import Tensor, nn

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.model.targets import saved_modules, select_targets
from l1ra.training import probes
from l1ra_kernels import choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
STEPS = 7
# Ranks move after the third and the sixth step; probes ride along in the first two steps of an interval.
SETTINGS = {
    "total_steps": 10,
    "interval": 3,
    "warmup": 0.0,
    "cooldown": 0.2,
    "margin": 1.0,
    "min_coherence": -1.0,
}
RANKS = 2  # of each adapter at first
PROBE_RANKS = probes.PROBE_RANKS if DEVICE == "cuda" else 3  # the interpreter takes its time for each


ONE_LAYER = {**SIZES, "num_hidden_layers": 1}


def llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**ONE_LAYER, **settings}, num_key_value_heads=1))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**ONE_LAYER, **dropout, num_labels=3))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    # Not T5's ReLU: an entry next to its kink has one gradient or another, by how it was rounded.
    return T5ForConditionalGeneration(T5Config(**sizes, **special, dropout_rate=0.0, feed_forward_proj="gated-gelu"))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def twice() -> nn.Module:
    """A Llama whose two decoder layers are one, called twice in each forward."""
    model = llama(num_hidden_layers=2)
    model.model.layers[1] = model.model.layers[0]
    model.config.use_cache = model.generation_config.use_cache = False  # the cache would take the two calls for one
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": llama,
    "GPT-2": gpt2,
    "BERT": bert,
    "T5": t5,
    "a layer called twice": twice,
}


@dataclass
class Training:
    """A model in training; ``rows`` are the token ids of this step, ``halves`` the same in two."""

    model: nn.Module
    controller: l1ra.RankController
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    module: nn.Module  # what is called: the model, or something around it
    autocast: torch.dtype | None
    rows: Tensor | None = None

    @property
    def halves(self) -> tuple[Tensor, ...]:
        return self.rows.chunk(2)

    def loss(self, rows: Tensor) -> Tensor:
        """The mean over the rows."""
        with torch.autocast(DEVICE, self.autocast, enabled=self.autocast is not None):
            return loss_of(self.module, rows)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    classified = any(type(module).__name__.endswith("Classification") for module in model.modules())
    return model(input_ids=rows, labels=rows[:, 0] % 3 if classified else rows).loss


# --- what happens in one step: each leaves the gradients of training.loss(training.rows), and returns its value


def plain(training: Training) -> float:
    loss = training.loss(training.rows)
    training.backward(loss)
    return loss.item()


def in_another_thread(training: Training) -> float:
    """As the backward of a GPU runs."""
    loss = training.loss(training.rows)
    thread = threading.Thread(target=training.backward, args=(loss,))
    thread.start()
    thread.join()
    return loss.item()


def accumulated(training: Training) -> float:
    found = 0.0
    for half in training.halves:
        loss = training.loss(half) / 2
        training.backward(loss)
        found += loss.item()
    return found


def two_forwards(training: Training) -> float:
    loss = sum(training.loss(half) for half in training.halves) / 2
    training.backward(loss)
    return loss.item()


def gradcache(training: Training) -> float:
    with torch.no_grad():
        for half in training.halves:
            training.loss(half)
    return accumulated(training)


def in_between(action: Callable[[Training], None]) -> Callable[[Training], float]:
    """Something between forward and backward."""

    def step(training: Training) -> float:
        loss = training.loss(training.rows)
        action(training)
        training.backward(loss)
        return loss.item()

    return step


def evaluate(training: Training) -> None:
    training.model.eval()
    with torch.no_grad():
        training.loss(training.rows)
        if training.model.can_generate():
            training.model.generate(training.rows[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    training.model.train()


def reference(training: Training) -> None:
    """As of DPO: what the model was before."""
    with torch.no_grad(), training.controller.disabled():
        training.loss(training.rows)


def copies(training: Training) -> None:
    """A copy and a pickle give the same gradients, before and after a step of theirs."""
    if training.controller.steps != STEPS // 2:
        return
    expected = gradients(training.model, training.rows)
    for made in (copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))):
        for _ in range(2):
            found = gradients(made, training.rows)
            assert found.keys() == expected.keys()
            for name, grad in expected.items():
                tolerance = 100 * torch.finfo(training.model.dtype).eps * grad.abs().max()
                assert (found[name] - grad).abs().max() <= tolerance, name
            with torch.no_grad():
                torch._foreach_mul_(trainable(made), 1)


def merged(training: Training) -> float:
    """An evaluation with the adapters in the weights, before the step."""
    l1ra.merge(training.model)
    evaluate(training)
    l1ra.unmerge(training.model)
    return plain(training)


@contextlib.contextmanager
def listening(training: Training) -> Iterator[list]:
    """Hooks on some base layers, that change nothing."""
    layers = [layer for _, layer in find_adapters(training.model)][1::3]
    heard: list = []
    handles = [layer.base_layer.register_forward_hook(lambda *_: heard.append(True)) for layer in layers]
    yield heard
    for handle in handles:
        handle.remove()


def hook_in_forward(training: Training) -> float:
    with listening(training) as heard:
        loss = training.loss(training.rows)
    assert heard
    training.backward(loss)
    return loss.item()


def hook_in_backward(training: Training) -> float:
    loss = training.loss(training.rows)
    with listening(training):
        training.backward(loss)
    return loss.item()


def hook_for_some_steps(training: Training) -> float:
    if training.controller.steps not in (2, 3, 4):
        return plain(training)
    with listening(training) as heard:
        value = plain(training)
    assert heard
    return value


class OutOfMemory(RuntimeError):
    pass


@contextlib.contextmanager
def breaking(where: str, training: Training) -> Iterator[None]:
    """The last adapter but one raises in its first forward, or in the backward."""
    layer = [layer for _, layer in find_adapters(training.model)][-2]

    def fail(*_: Any) -> None:
        raise OutOfMemory

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if where == "forward":
            fail()
        output.register_hook(fail)

    handle = layer.register_forward_hook(hook)
    yield
    handle.remove()


def broken_off(where: str) -> Callable[[Training], float]:
    """Now and then an out-of-memory error, and the batch again in two halves."""

    def step(training: Training) -> float:
        if training.controller.steps not in (0, 4, 6):
            return plain(training)
        with breaking(where, training), contextlib.suppress(OutOfMemory):
            plain(training)
            raise AssertionError("nothing was raised")
        training.optimizer.zero_grad()
        return accumulated(training)

    return step


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def replica(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@dataclass
class Circumstance:
    """One line of the table.

    Attributes:
        step: what happens in one step.
        checkpointing: "", "reentrant" or "non-reentrant".
        settings: of ``l1ra.patch``, besides SETTINGS.
        autocast: of a float32 model to this dtype.
        scaled: with a GradScaler.
        around: makes of the model what is called.
        processes: how many train together.
        models: on which it is tried by default; with --every-circumstance on all of them.
    """

    step: Callable[[Training], float] = plain
    checkpointing: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    scaled: bool = False
    around: Callable[[nn.Module], nn.Module] = lambda model: model
    processes: int = 1
    models: tuple[str, ...] = ("Llama",)

    @property
    def dropout(self) -> bool:
        return "dropout" in self.settings

    @property
    def dtype(self) -> torch.dtype:
        """Of the model. What is compared without plain PyTorch's errors to go by is in float32 everywhere."""
        return torch.float32 if self.dropout or self.autocast is not None else DTYPE


NON_REENTRANT, REENTRANT = "non-reentrant", "reentrant"
DROPOUT, RESERVE, AUGMENT = {"dropout": 0.3}, {"reserve": 6}, {"augment": True}
GPT2, BERT, LLAMA = ("GPT-2",), ("BERT",), ("Llama",)

CIRCUMSTANCES: dict[str, Circumstance] = {
    "plain": Circumstance(models=LLAMA + GPT2 + BERT),
    "checkpointing": Circumstance(checkpointing=NON_REENTRANT, models=tuple(MODELS)),
    "reentrant": Circumstance(checkpointing=REENTRANT),
    "dropout, checkpointing": Circumstance(checkpointing=NON_REENTRANT, settings=DROPOUT, models=BERT),
    "dropout, reentrant": Circumstance(checkpointing=REENTRANT, settings=DROPOUT),
    "a thread for the backward, checkpointing": Circumstance(in_another_thread, NON_REENTRANT),
    "accumulation": Circumstance(accumulated, models=GPT2),
    "accumulation, checkpointing": Circumstance(accumulated, NON_REENTRANT, models=GPT2),
    "two forwards": Circumstance(two_forwards, models=GPT2),
    "two forwards, checkpointing": Circumstance(two_forwards, NON_REENTRANT),
    "two forwards, reentrant": Circumstance(two_forwards, REENTRANT, models=GPT2),
    "GradCache, checkpointing": Circumstance(gradcache, NON_REENTRANT, models=BERT),
    "evaluation in between": Circumstance(in_between(evaluate), models=GPT2),
    "evaluation in between, checkpointing": Circumstance(in_between(evaluate), NON_REENTRANT),
    "reference in between": Circumstance(in_between(reference), models=BERT),
    "reference in between, checkpointing": Circumstance(in_between(reference), NON_REENTRANT),
    "copied": Circumstance(in_between(copies)),
    "merged before the step": Circumstance(merged, models=GPT2),
    "reserve, checkpointing": Circumstance(checkpointing=NON_REENTRANT, settings=RESERVE),
    "augment, checkpointing": Circumstance(checkpointing=NON_REENTRANT, settings=AUGMENT),
    "a hook in the forward": Circumstance(hook_in_forward, NON_REENTRANT),
    "a hook in the backward": Circumstance(hook_in_backward, NON_REENTRANT, models=GPT2),
    "a hook for some steps": Circumstance(hook_for_some_steps, models=BERT),
    "out of memory in the forward": Circumstance(broken_off("forward"), models=GPT2),
    "out of memory in the forward, checkpointing": Circumstance(broken_off("forward"), NON_REENTRANT, models=BERT),
    "out of memory in the backward": Circumstance(broken_off("backward"), models=GPT2),
    "out of memory in the backward, checkpointing": Circumstance(broken_off("backward"), NON_REENTRANT),
    "fp16, scaled, accumulation": Circumstance(accumulated, autocast=torch.float16, scaled=True, models=GPT2),
    "fp16, scaled, checkpointing": Circumstance(plain, NON_REENTRANT, autocast=torch.float16, scaled=True),
    "compiled": Circumstance(around=compiled, settings=RESERVE),
    "two processes, checkpointing": Circumstance(plain, NON_REENTRANT, RESERVE, around=replica, processes=2),
}


# --- a training, and what is compared


def gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """By name, of one forward and backward; the gradients that the parameters have stay as they are."""
    names, params = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss_of(model, rows), params, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def rows_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step % 3)
    starts = torch.randint(0, 50, (4, 1), generator=generator)
    return ((starts + 3 * torch.arange(8)) % 50).to(DEVICE)


def built(name: str, how: Circumstance) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0, 0.2)  # random tiny models are too dull to learn anything
    model.to(DEVICE, how.dtype).train()
    if how.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": how.checkpointing == REENTRANT})
        model.config.use_cache = False
    return model


def train(name: str, how: Circumstance, kernels: str, audit: Callable[[Training], None], process: int = 0) -> dict:
    """Losses and ranks of a training; ``audit`` is called with the gradients of each step on the parameters."""
    model = built(name, how)
    with choice.using(kernels), mock.patch.object(probes, "PROBE_RANKS", PROBE_RANKS):
        count = len(select_targets(model, "all-linear", saved_modules(model, None)))
        controller = l1ra.patch(model, RANKS * count, **SETTINGS, **how.settings)
        optimizer = torch.optim.AdamW(trainable(model), lr=5e-3, eps=1e-5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=how.scaled)
        training = Training(model, controller, optimizer, scaler, how.around(model), how.autocast)
        losses = []
        for step in range(STEPS):
            training.rows = rows_of(step).chunk(how.processes)[process]
            torch.manual_seed(100 + step)
            losses.append(how.step(training))
            scaler.unscale_(optimizer)
            audit(training)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return {"losses": losses, "ranks": [entry["ranks"] for entry in controller.history], "moved": controller.moved}
