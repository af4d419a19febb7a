"""Frozen linear layers with their inputs and gradients, and what must come out of them, in float64.

Each competitor gets linears of its own that share the weights, and puts its adapters into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import ModelShape, Shape

__all__ = ["SCALING", "Problem", "decoder_layer", "single"]

SCALING = 2.0


class Single(nn.Module):
    """One linear layer."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.proj = linears["proj"]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.proj(x),)


def one_by_one(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


class DecoderLinears(nn.Module):
    """The linears of a decoder layer in the tree that transformers has, and nothing between them.

    q, k and v read the same tensor, gate and up another one.

    Attributes:
        together: computes layers that read one tensor: one after the other, unless a competitor has something better.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.together = one_by_one
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, linears[name])
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.mlp.add_module(name, linears[name])

    def forward(self, x: Tensor, mixed: Tensor, normed: Tensor, gated: Tensor) -> tuple[Tensor, ...]:
        attention, mlp = self.self_attn, self.mlp
        return (
            *self.together((attention.q_proj, attention.k_proj, attention.v_proj), x),
            attention.o_proj(mixed),
            *self.together((mlp.gate_proj, mlp.up_proj), normed),
            mlp.down_proj(gated),
        )


@dataclass
class Problem:
    """Linears by name, in the order of the outputs.

    Attributes:
        weights: name -> frozen (N, K).
        reads: name -> index of the input.
        inputs: (M, K) each, requiring gradients.
        gradients: of the outputs, (M, N) each.
        rows: name -> A (r, K) and B (r, N) in float32.
        base: name -> ``x W^T`` and ``dY W`` in float64, computed when asked for and dropped by :meth:`forget`.
    """

    title: str
    shape: Shape
    tree: type[nn.Module]
    weights: dict[str, nn.Parameter]
    reads: dict[str, int]
    inputs: list[Tensor]
    gradients: list[Tensor]
    rows: dict[str, tuple[Tensor, Tensor]]
    base: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """A fresh module around the shared weights."""
        linears = {}
        for name, weight in self.weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = weight
            linears[name] = linear
        return self.tree(linears)

    def clear(self) -> None:
        """Drop the gradients of the inputs."""
        for x in self.inputs:
            x.grad = None

    def products(self, name: str) -> tuple[Tensor, Tensor]:
        """``x W^T`` and ``dY W`` of one linear in float64."""
        if name not in self.base:
            x, dy = self.read_by(name)
            w = self.weights[name].detach().double()
            self.base[name] = (x @ w.T, dy @ w)
        return self.base[name]

    def read_by(self, name: str) -> tuple[Tensor, Tensor]:
        """Input and output gradient of one linear in float64."""
        x = self.inputs[self.reads[name]].detach().double()
        return x, self.gradients[list(self.weights).index(name)].double()

    def forget(self) -> None:
        self.base.clear()


def make(
    bench: Bench,
    title: str,
    shape: Shape,
    tree: type[nn.Module],
    sizes: dict[str, tuple[int, int]],
    reads: dict[str, int],
) -> Problem:
    tokens, rank = shape.tokens, shape.rank
    widths = {reads[name]: inputs for name, (inputs, _) in sizes.items()}
    wide = torch.float32
    return Problem(
        title,
        shape,
        tree,
        {n: nn.Parameter(bench.randn(o, i, std=i**-0.5), requires_grad=False) for n, (i, o) in sizes.items()},
        reads,
        [bench.randn(tokens, widths[i]).requires_grad_(True) for i in sorted(widths)],
        [bench.randn(tokens, o) for _, o in sizes.values()],
        {
            n: (bench.randn(rank, i, std=i**-0.5, dtype=wide), bench.randn(rank, o, std=0.3, dtype=wide))
            for n, (i, o) in sizes.items()
        },
    )


def single(bench: Bench, shape: Shape) -> Problem:
    """One linear layer of ``shape``."""
    return make(bench, str(shape), shape, Single, {"proj": (shape.inputs, shape.outputs)}, {"proj": 0})


def decoder_layer(bench: Bench, model: ModelShape, tokens: int, rank: int) -> Problem:
    """The seven linears of a decoder layer of ``model``."""
    reads = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    title = f"seven linears of a layer, {model.name}, M={tokens} r={rank}"
    shape = Shape(tokens, model.hidden, model.intermediate, rank)
    return make(bench, title, shape, DecoderLinears, model.linears, reads)
