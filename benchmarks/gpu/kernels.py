"""The registry of kernels that are timed alone: to add one, write a function that returns a KernelCase.

A case holds its inputs: it is built on the device right before it is timed and dropped afterwards. ``bytes`` is the
floor: what must be read, once, and what must be written, once; partial sums and padding are the kernel's own affair. A
case that can't run here raises LeftOut with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, LeftOut
from benchmarks.gpu.sizes import Shape
from l1ra_kernels import choice, dispatch

__all__ = ["LAYER_CASES", "MODEL_CASES", "KernelCase"]

SCALING = 2.0


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
    """The module ``l1ra_kernels.<name>``, if its kernels can be launched on this device."""
    if not (bench.cuda or choice.interpreting()):
        raise LeftOut("Triton kernels need a GPU, or TRITON_INTERPRET=1")
    try:
        return importlib.import_module(f"l1ra_kernels.{name}")
    except ImportError as error:
        raise LeftOut(f"l1ra_kernels.{name}: {error}") from error


def size_of(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Operands(NamedTuple):
    """Of one layer: activations and their gradients in the bench's dtype, the adapter in float32.

    ``h`` is as wide as the kernels' rank tile; ``hidden_bytes`` counts its true ranks.
    """

    x: Tensor
    y: Tensor
    dy: Tensor
    h: Tensor
    a: Tensor
    gate: Tensor
    b: Tensor
    hidden_bytes: int


def operands(bench: Bench, shape: Shape) -> Operands:
    m, k, n, r = shape.tokens, shape.inputs, shape.outputs, shape.rank
    wide = torch.float32
    h = bench.randn(m, fused(bench, "configs").rank_tile(r))
    h[:, r:] = 0
    return Operands(
        bench.randn(m, k),
        bench.randn(m, n),
        bench.randn(m, n),
        h,
        bench.randn(r, k, std=k**-0.5, dtype=wide),
        torch.linspace(0.5, 1.0, r, device=bench.device),
        bench.randn(r, n, dtype=wide),
        m * r * h.element_size(),
    )


def reference_forward(bench: Bench, shape: Shape) -> KernelCase:
    """The unfused forward: the adapter in plain PyTorch, added onto the base layer's output."""
    m, k, n, r = shape.tokens, shape.inputs, shape.outputs, shape.rank
    wide = torch.float32
    x, y = bench.randn(m, k), bench.randn(m, n)
    a, b = bench.randn(r, k, std=k**-0.5, dtype=wide), bench.randn(r, n, dtype=wide)
    gate = torch.ones(r, device=bench.device)
    floor = size_of(x, y, y, a, gate, b)
    op = importlib.import_module("l1ra_kernels.reference").gated_lora
    return KernelCase("torch: adapter forward", lambda: op(y, x, a, gate, b, SCALING), floor)


def single(bench: Bench, name: str) -> Callable[..., Any]:
    """The kernel called by itself, see ``benchmarks/single_launch.py``."""
    fused(bench, name)
    return getattr(importlib.import_module("benchmarks.single_launch"), name)


def shrink(bench: Bench, shape: Shape) -> KernelCase:
    op, o = single(bench, "shrink"), operands(bench, shape)
    return KernelCase("shrink", lambda: op(o.x, (o.a,), (o.gate,)), size_of(o.x, o.a) + o.hidden_bytes)


def expand(bench: Bench, shape: Shape) -> KernelCase:
    """Writes the adapter's output, onto which the product of the base layer is then added."""
    op, o = single(bench, "expand"), operands(bench, shape)
    floor, parts = o.hidden_bytes + size_of(o.b, o.y), o.h.float()[None]
    return KernelCase("expand", lambda: op(parts, (o.gate,), (o.b,), (SCALING,), dtype=o.y.dtype), floor)


def expand_onto(bench: Bench, shape: Shape) -> KernelCase:
    """Adds the adapter's output to that of a foreign base layer."""
    op, o = single(bench, "expand"), operands(bench, shape)
    floor, parts = o.hidden_bytes + size_of(o.b, o.y, o.y), o.h.float()[None]
    base = {"dtype": o.y.dtype, "bases": (o.y,), "kinds": (fused(bench, "expand").OUTPUT,)}
    return KernelCase("expand onto an output", lambda: op(parts, (o.gate,), (o.b,), (SCALING,), **base), floor)


def output_backward(bench: Bench, shape: Shape) -> KernelCase:
    """The one pass over dY: the gradients of H and of B."""
    op, o = single(bench, "output_backward"), operands(bench, shape)
    floor = size_of(o.dy, o.b, o.b) + 2 * o.hidden_bytes
    return KernelCase("output backward", lambda: op((o.dy,), o.h, (o.gate,), (o.b,)), floor)


def input_backward(bench: Bench, shape: Shape) -> KernelCase:
    """The one pass over x: dX of the adapter, and the gradient of A."""
    op, o = single(bench, "input_backward"), operands(bench, shape)
    floor = size_of(o.x, o.x, o.a, o.a) + o.hidden_bytes
    return KernelCase("input backward", lambda: op(o.x, o.h, (o.a,), (o.gate,)), floor)


def adaptive_gate_step(bench: Bench) -> KernelCase:
    """The gates of all adapters of a model."""
    shape = bench.sizes.models[-1]
    count = 7 * shape.layers * bench.sizes.model_rank
    gate, grad, importance_sq, age, weight = (torch.rand(count, device=bench.device) for _ in range(5))
    age *= 100
    skipped = torch.zeros((), dtype=torch.long, device=bench.device)
    settings = {"lr": 0.02, "l1": 2.0, "horizon": 50}

    def call() -> Any:
        return dispatch.adaptive_gate_step(gate, grad, importance_sq, age, weight, skipped, **settings)

    floor = size_of(gate, grad, importance_sq, age, weight, gate, importance_sq, age)
    return KernelCase("adaptive gate step", call, floor)


def move_rows_many(bench: Bench) -> KernelCase:
    """A, gate, B and two moments of A and B of all adapters of a model: two rows of each go, two new ones come."""
    shape, rank = bench.sizes.models[-1], bench.sizes.model_rank
    tensors = []
    for inputs, outputs in list(shape.linears.values()) * shape.layers:
        for width in (inputs,) * 3 + (outputs,) * 3:
            tensors.append(bench.randn(rank, width, dtype=torch.float32))
        tensors.append(torch.ones(rank, device=bench.device))
    source = [*range(2, rank), -1, -1]

    def call() -> Any:
        return dispatch.move_rows_many(tensors, [source] * len(tensors), [0.0] * len(tensors))

    return KernelCase("rank compaction", call, size_of(*tensors) * (2 * rank - 2) // rank)


# Run at every shape of a linear layer, and once for a whole model.
LAYER_CASES: list[Callable[[Bench, Shape], KernelCase]] = [
    reference_forward,
    shrink,
    expand,
    expand_onto,
    output_backward,
    input_backward,
]
MODEL_CASES: list[Callable[[Bench], KernelCase]] = [adaptive_gate_step, move_rows_many]
