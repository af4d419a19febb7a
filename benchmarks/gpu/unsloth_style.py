"""A LoRA linear in the structure that Unsloth publishes for a single projection: products onto the output, by cuBLAS.

Forward ``Y = X W^T`` and ``Y += s (X A^T) B``; X is saved, X A^T is computed again. Backward by hand: dA and dB from
skinny products, ``dX = dY W`` and ``dX += s (dY B^T) A``. The code is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["UnslothStyle"]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        # Masters in float32, cast once a call: small.
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        y = x @ w.t()
        y.addmm_(x @ a16.t(), b16, alpha=scaling)
        ctx.save_for_backward(x, a16, b16)
        ctx.w, ctx.scaling, ctx.dtypes = w, scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, a, b = ctx.saved_tensors
        s = ctx.scaling
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.addmm_((dy @ b.t()).t(), x, alpha=s, beta=0)
        db.addmm_((x @ a.t()).t(), dy, alpha=s, beta=0)
        dx = dy @ ctx.w
        dx.addmm_(dy @ b.t(), a, alpha=s)
        return dx, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


class UnslothStyle(nn.Module):
    """``x W^T + s (x A^T) B`` with a (r, K) and b (r, N); x is two-dimensional."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = linear, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        return _Function.apply(x, self.base.weight, self.a, self.b, self.scaling)
