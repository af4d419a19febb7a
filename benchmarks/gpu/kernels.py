"""The registry of kernels that are timed alone: to add one, write a function that returns a KernelCase.

A case holds its inputs: it is built on the device right before it is timed and dropped afterwards. ``bytes`` is the
floor: every input read once, every output written once. A case that can't run here raises LeftOut with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, LeftOut
from benchmarks.gpu.sizes import Shape
from l1ra_kernels import dispatch

__all__ = ["LAYER_CASES", "MODEL_CASES", "KernelCase"]


@dataclass
class KernelCase:
    """A kernel with its inputs.

    Attributes:
        call: launches it once.
        bytes: that have to be moved through device memory.
        before: what must be put right before each call, not timed.
    """

    name: str
    call: Callable[[], Any]
    bytes: int
    before: Callable[[], Any] = lambda: None


def fused(bench: Bench, name: str) -> ModuleType:
    """The module ``l1ra_kernels.<name>``, if there is one that can be launched on this device."""
    if not bench.cuda:
        raise LeftOut("Triton kernels are timed on a GPU only")
    try:
        return importlib.import_module(f"l1ra_kernels.{name}")
    except ImportError as error:
        raise LeftOut(f"l1ra_kernels.{name}: {error}") from error


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def adapter(bench: Bench, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, gate and B, all float32, as a layer holds them."""
    wide = torch.float32
    a = bench.randn(shape.rank, shape.inputs, std=shape.inputs**-0.5, dtype=wide)
    return a, torch.ones(shape.rank, device=bench.device), bench.randn(shape.rank, shape.outputs, dtype=wide)


def reference_adapter(bench: Bench, shape: Shape) -> KernelCase:
    """The plain PyTorch op that the fused forward replaces: shrink and add onto the base layer's output."""
    a, gate, b = adapter(bench, shape)
    x, y = bench.randn(shape.tokens, shape.inputs), bench.randn(shape.tokens, shape.outputs)
    floor = size_of(x, y, y, a, gate, b)
    return KernelCase("reference: adapter forward", lambda: dispatch.gated_lora(y, x, a, gate, b, 1.0), floor)


def shrink(bench: Bench, shape: Shape) -> KernelCase:
    op = fused(bench, "shrink").shrink
    a, gate, _ = adapter(bench, shape)
    x = bench.randn(shape.tokens, shape.inputs)
    floor = size_of(x, a) + shape.tokens * shape.rank * x.element_size()
    return KernelCase("shrink", lambda: op(x, (a,), (gate,), x.dtype), floor)


def gate_step(bench: Bench) -> KernelCase:
    """All gates of the model at once; their moments come and go with them."""
    shape = bench.sizes.models[-1]
    count = 7 * shape.layers * bench.sizes.model_rank
    gate, grad, mean, mean_sq, age = (torch.rand(count, device=bench.device) for _ in range(5))
    settings = {"lr": 1e-2, "l1": 1e-3, "l2": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}

    def call() -> Any:
        return dispatch.adam_elastic_net_step(gate, grad, mean, mean_sq, age, **settings)

    return KernelCase("gate step (Adam, L1)", call, size_of(gate, grad, mean, mean_sq, age, gate, mean, mean_sq))


# Run at every shape of a linear layer, and once for a whole model.
LAYER_CASES: list[Callable[[Bench, Shape], KernelCase]] = [reference_adapter, shrink]
MODEL_CASES: list[Callable[[Bench], KernelCase]] = [gate_step]
