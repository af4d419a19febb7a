"""Which implementation of an op runs, and the reason in words when it is not a fused one.

Everything outside this package calls the ops through here. ``choice`` says what is wanted (``L1RA_KERNELS=torch`` turns
the Triton kernels off); Triton is imported only where its kernels are going to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from l1ra_kernels import choice
from l1ra_kernels.layer import Layer
from l1ra_kernels.plain import plain_linear
from l1ra_kernels.reference import gated_lora
from l1ra_kernels.state_ops import (
    adam_gate_step,
    adaptive_gate_step,
    compact_rows_,
    move_rows_many,
    unless_not_finite,
)

__all__ = [
    "Layer",
    "Path",
    "adam_gate_step",
    "adaptive_gate_step",
    "compact_rows_",
    "gated_linears",
    "move_rows_many",
    "path_for",
    "unless_not_finite",
]

PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Path:
    """How a gated low-rank layer is computed.

    Attributes:
        name: ``"chain"``: fused, the adapter's output first, then cuBLAS adds the product with the weight to it;
            ``"aug"``: fused, one product of ``[x | H]`` with the weight and the adapter behind its columns;
            ``"add"``: fused, the adapter is added to the output of the base layer's own forward; ``"torch"``.
        reason: why it is not a faster one, "" for chain and aug.
        dense: whether the product with the weight is done here, and not by the base layer's own forward.
    """

    name: str
    reason: str = ""
    dense: bool = True

    @property
    def fused(self) -> bool:
        """Whether Triton kernels run."""
        return self.name != "torch"

    def __str__(self) -> str:
        if not self.fused:
            return f"torch ({self.reason})"
        return f"fused ({self.name}: {self.reason})" if self.reason else f"fused ({self.name})"


CHAIN = Path("chain")
AUG = Path("aug")


def path_for(device: torch.device, dtype: torch.dtype, foreign: str = "") -> Path:
    """The path of a layer on ``device`` whose products are in ``dtype``.

    Args:
        foreign: why the product with the weight has to be left to the base layer itself, "" if it need not.

    Raises:
        RuntimeError: fused kernels are wanted on a device that they can't run on.
    """
    obstacle = choice.obstacle(device)
    if not obstacle and _transformed():
        obstacle = "torch.func transforms operations, not kernels"
    if not obstacle and dtype not in PRODUCTS:
        obstacle = f"no fused kernel takes {str(dtype).removeprefix('torch.')}"
    if obstacle:
        return Path("torch", obstacle, dense=not foreign)
    return Path("add", foreign, dense=False) if foreign else CHAIN


def gated_linears(x: Tensor, layers: Sequence[Layer], dropout: float, path: Path) -> tuple[Tensor, ...]:
    """The outputs of adapted layers that read the same x: ``base(x) + s * ((dropout(x) @ A.T) * g) @ B`` each.

    Differentiable: in x, in each A, gate and B, and in a base output that was handed over; never in a weight.

    Args:
        x: ``(..., K)``, any strides.
        layers: with the ``output`` of their base, which settles the dtype of the products, or (dense paths) with its
            ``weight`` in the dtype of x.
        dropout: probability that an element of the adapters' input is dropped, from 0 to below 1.
        path: from :func:`path_for`.

    Returns:
        ``(..., N)`` each. Fused, one dropout mask serves all layers.
    """
    if path.fused:
        from l1ra_kernels.autograd import fused

        return fused(x, layers, dropout)
    return tuple(_unfused(x, layer, dropout) for layer in layers)


def _unfused(x: Tensor, layer: Layer, dropout: float) -> Tensor:
    base = layer.output
    if base is None:
        if not (dropout or _watched()):
            return plain_linear(x, layer)
        base = F.linear(x, layer.weight, layer.bias)
    return gated_lora(base, F.dropout(x, dropout) if dropout else x, layer.a, layer.gate, layer.b, layer.scaling)


def _watched() -> bool:
    """Whether somebody sees through operations, but not through a Function of our own that writes in place: a tracer, a
    transform of functions, or a mode such as that of selective checkpointing, which keeps the results of some."""
    return torch.compiler.is_compiling() or _transformed() or torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
