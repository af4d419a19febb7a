"""Random layers, what the kernels make of them, and the formula written out in plain torch to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from l1ra_kernels import choice
from l1ra_kernels.autograd import fused
from l1ra_kernels.layer import Layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A product of bfloat16 is wrong in Triton's interpreter, silently: there float16 stands in for it.
HALF = torch.float16 if choice.interpreting() else torch.bfloat16
SINGLE = torch.float32
# What training on a GPU meets most: 2-byte activations, adapters in float32.
USUAL = (HALF, SINGLE)


@dataclass
class Case:
    """One x, the layers that read it, and the gradients of their outputs."""

    x: Tensor
    layers: list[Layer]
    dys: list[Tensor | None]
    dropout: float = 0.0
    leaves: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.leaves = {"x": self.x}
        for i, layer in enumerate(self.layers):
            self.leaves |= {f"A{i}": layer.a, f"g{i}": layer.gate, f"B{i}": layer.b}
            if layer.output is not None:
                self.leaves[f"base{i}"] = layer.output
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def copy(self, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = torch.clone) -> Case:
        """The same numbers, or what ``change`` makes of them, in another dtype."""
        cast = lambda t: change(t.detach()).to(dtype) if isinstance(t, Tensor) else t  # noqa: E731
        return Case(
            cast(self.x), [Layer(*map(cast, layer)) for layer in self.layers], list(map(cast, self.dys)), self.dropout
        )


def case(
    ranks: Sequence[int] = (5,),
    outs: Sequence[int] = (47,),
    lead: tuple[int, ...] = (37,),
    features: int = 65,
    dtypes: tuple[torch.dtype, torch.dtype] = USUAL,
    base: str = "weight",
    dropout: float = 0.0,
) -> Case:
    """``base``: "weight", "bias" (a weight and a bias), "output" (of a layer that is not dense), or "nothing"."""
    dtype, adapter = dtypes
    make = lambda *shape, of=dtype: torch.randn(*shape, dtype=torch.float64).to(DEVICE, of)  # noqa: E731
    scaled = lambda t: t / math.sqrt(features)  # noqa: E731
    layers = [
        Layer(
            scaled(make(r, features, of=adapter)),
            torch.rand(r, dtype=torch.float64).add(0.1).to(DEVICE, adapter),
            make(r, n, of=adapter),
            0.7 + i,
            scaled(make(n, features)) if base in ("weight", "bias") else None,
            make(n) if base == "bias" else None,
            make(*lead, n) if base == "output" else None,
        )
        for i, (r, n) in enumerate(zip(ranks, outs, strict=True))
    ]
    return Case(make(*lead, features), layers, [make(*lead, n) for n in outs], dropout)


def formula(case: Case, mask: Tensor | None = None) -> list[Tensor]:
    """The outputs, by the formula; ``mask`` is what dropout keeps of x."""
    x = case.x
    dropped = x if mask is None else torch.where(mask.view(x.shape), x, 0) / (1 - case.dropout)
    ys = []
    for layer in case.layers:
        y = layer.scaling * ((dropped @ layer.a.T) * layer.gate) @ layer.b
        if layer.weight is not None:
            y = y + F.linear(x, layer.weight, layer.bias)
        ys.append(y if layer.output is None else layer.output + y)
    return ys


def kernels(case: Case) -> list[Tensor]:
    """The outputs, by the kernels."""
    return list(fused(case.x, case.layers, case.dropout))


def results(case: Case, ys: list[Tensor]) -> dict[str, Tensor | None]:
    """Outputs and all gradients, by name; None for the gradient of what no used output depends on."""
    used = [(y, dy) for y, dy in zip(ys, case.dys, strict=True) if dy is not None]
    leaves = {name: leaf for name, leaf in case.leaves.items() if leaf.requires_grad}
    outputs, dys = zip(*used, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), dys, allow_unused=True)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(
        zip((f"d{name}" for name in leaves), grads, strict=True)
    )


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_as_exact_as_torch(
    case: Case, mask: Tensor | None = None, ours: dict[str, Tensor | None] | None = None
) -> dict[str, Tensor | None]:
    """What the kernels give, or ``ours``, errs by no more than plain torch in the dtype of x does, and a little.

    A little: one rounding of the result, and of the sums in float32 of its terms, which may cancel.
    """
    dtype = case.x.dtype
    ours = results(case, kernels(case)) if ours is None else ours
    wide, same = case.copy(torch.float64), case.copy(dtype)
    exact, plain = results(wide, formula(wide, mask)), results(same, formula(same, mask))
    positive = case.copy(torch.float64, torch.abs)
    terms = results(positive, formula(positive, mask))
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        if value is None:
            assert ours[name] is None, name
            continue
        assert ours[name].shape == value.shape, name
        if value.numel():
            little = torch.finfo(dtype).eps * value.abs().max() + torch.finfo(SINGLE).eps * terms[name].max()
            assert error(ours[name], value) <= 1.2 * error(plain[name], value) + little.item(), name
    for name, leaf in case.leaves.items():
        assert ours[f"d{name}"] is None or ours[f"d{name}"].dtype == leaf.dtype, name
    return ours


def assert_same_bits(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    from helpers import same_bits

    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or (tensor.shape == other.shape and same_bits(tensor, other)), name


def assert_close(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """The same but for the order of sums in float32."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-4, msg=name)
