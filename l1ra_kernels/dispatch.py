"""The public ops: each call runs a Triton kernel, or plain PyTorch with the reason why.

Code outside of this package calls the ops from this module. ``L1RA_KERNELS=torch`` turns the Triton kernels off, see
``choice``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

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

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Path:
    """The implementation that computes an adapted layer.

    Attributes:
        name: ``"chain"``: kernels compute the adapter's output, then cuBLAS adds ``x @ W.T`` to it. ``"aug"``: one
            cuBLAS product of ``[x | H]`` with ``[W | C.T]``, see ``augment``. ``"add"``: kernels add the adapter's
            output to the output of the base layer's own forward. ``"torch"``: plain PyTorch.
        reason: why no faster path is used; "" for ``"chain"`` and ``"aug"``.
        dense: whether the product with the weight is computed here. If False, the base layer's own forward computes it.
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


def path_for(device: torch.device, dtype: torch.dtype, fallback_reason: str = "") -> Path:
    """The path of a layer on ``device`` with matrix products in ``dtype``.

    Args:
        fallback_reason: why the base layer's own forward must compute the product with the weight; "" if it need not.

    Raises:
        RuntimeError: fused kernels were chosen (``L1RA_KERNELS=fused``) and can't run on ``device``.
    """
    obstacle = choice.obstacle(device)
    if not obstacle:
        if _in_functorch_transform():
            obstacle = "torch.func transforms operations, not kernels"
        elif dtype not in FUSED_DTYPES:
            obstacle = f"no fused kernel takes {str(dtype).removeprefix('torch.')}"
    if obstacle:
        return Path("torch", obstacle, dense=not fallback_reason)
    return Path("add", fallback_reason, dense=False) if fallback_reason else CHAIN


def gated_linears(x: Tensor, layers: Sequence[Layer], dropout: float, path: Path) -> tuple[Tensor, ...]:
    """The outputs of adapted layers that share the input x: ``base(x) + s * ((dropout(x) @ A.T) * g) @ B`` for each.

    Differentiable with respect to x, each A, gate and B, and ``Layer.output``; not with respect to weights and biases.

    Args:
        x: ``(..., K)``, any strides.
        layers: each with its base layer's ``output``, whose dtype is the dtype of the products; or, for dense paths,
            with the base layer's ``weight`` in the dtype of x.
        dropout: probability that an element of the adapters' input is dropped, in [0, 1).
        path: from :func:`path_for`.

    Returns:
        ``(..., N)`` for each layer. On fused paths all layers use the same dropout mask.
    """
    if path.fused:
        return _fused_layers().fused(x, layers, dropout)
    return tuple(_unfused(x, layer, dropout) for layer in layers)


@cache
def _fused_layers() -> ModuleType:
    # Triton is imported only if its kernels are going to run. An import statement takes some time at each call.
    from l1ra_kernels import autograd

    return autograd


def _unfused(x: Tensor, layer: Layer, dropout: float) -> Tensor:
    base = layer.output
    if base is None:
        if not (dropout or _operations_are_intercepted()):
            return plain_linear(x, layer)
        base = F.linear(x, layer.weight, layer.bias)
    return gated_lora(base, F.dropout(x, dropout) if dropout else x, layer.a, layer.gate, layer.b, layer.scaling)


def _operations_are_intercepted() -> bool:
    """Whether a tracer, a functorch transform or a dispatch mode (e.g. of selective checkpointing) intercepts ops.

    These need the single ops of autograd. They do not see the ops inside of ``plain_linear``, an autograd Function that
    also writes in place.
    """
    return torch.compiler.is_compiling() or _in_functorch_transform() or torch._C._len_torch_dispatch_stack() > 0


def _in_functorch_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
