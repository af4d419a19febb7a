"""LoRA linears in the structure that Unsloth publishes: products onto the output, by cuBLAS, written by hand.

Forward ``Y = X W^T`` and ``Y += s (X A^T) B``; X is saved, X A^T is computed again. Backward: dA and dB from skinny
products, ``dX = dY W`` and ``dX += s (dY B^T) A``. Linears that read one X are one function, as theirs for q, k and v
is: dX of the second and third is added by the products themselves, not by autograd. The code is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["UnslothStyle", "together"]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``tensors``: W, A and B of each linear."""
        ys, kept = [], []
        for w, a, b in zip(*[iter(tensors)] * 3, strict=True):
            # Masters in float32, cast once a call: small.
            a16, b16 = a.to(x.dtype), b.to(x.dtype)
            y = x @ w.t()
            ys.append(y.addmm_(x @ a16.t(), b16, alpha=scaling))
            kept += [w, a16, b16]
        ctx.save_for_backward(x, *kept)
        ctx.scaling, ctx.dtypes = scaling, [t.dtype for t in tensors]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor):
        x, *kept = ctx.saved_tensors
        s = ctx.scaling
        dx, grads = None, []
        for dy, w, a, b in zip(dys, *[kept[i::3] for i in range(3)], strict=True):
            da, db = torch.empty_like(a), torch.empty_like(b)
            p = dy @ b.t()
            da.addmm_(p.t(), x, alpha=s, beta=0)
            db.addmm_((x @ a.t()).t(), dy, alpha=s, beta=0)
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(p, a, alpha=s)
            grads += [None, da, db]
        return dx, None, *(g if g is None else g.to(kind) for g, kind in zip(grads, ctx.dtypes, strict=True))


class UnslothStyle(nn.Module):
    """``x W^T + s (x A^T) B`` with a (r, K) and b (r, N); x is two-dimensional."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scaling = linear, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        return together([self], x)[0]


def together(layers: Sequence[UnslothStyle], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of linears that read the same x, as one function."""
    tensors = [t for layer in layers for t in (layer.base.weight, layer.a, layer.b)]
    return _Function.apply(x, layers[0].scaling, *tensors)
