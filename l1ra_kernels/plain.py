"""The adapted dense layer in plain PyTorch, as an autograd Function that saves memory traffic.

    y = x @ W.T + bias + s * ((x @ A.T) * g) @ B

The adapter's part of y and of dX is added in place by the matrix product that computes it (``addmm_``). No gradient is
computed for the frozen weight. The result is the same as that of ``reference.gated_lora`` on the output of the frozen
layer. Differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from l1ra_kernels.layer import Layer

__all__ = ["plain_linear"]


def plain_linear(x: Tensor, layer: Layer) -> Tensor:
    """The output ``(..., N)`` for ``x`` ``(..., K)``, which must have the dtype of the layer's weight."""
    y = _Plain.apply(x.reshape(-1, x.shape[-1]), *layer[:6])
    return y.view(*x.shape[:-1], y.shape[-1])


def _operands(a: Tensor, gate: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and ``C = s * g * B`` in ``dtype``. Rows whose gate is 0 are 0, also if they contain NaN."""
    live = (gate != 0).unsqueeze(1)
    c = torch.where(live, b, 0.0) * (scaling * gate).unsqueeze(1)
    return torch.where(live, a, 0.0).to(dtype), c.to(dtype)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, gate, b, scaling, weight, bias):
        a_live, c = _operands(a, gate, b, scaling, x.dtype)
        h = F.linear(x, a_live)
        ctx.save_for_backward(x, h, a, gate, b, weight)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(h, c)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, a, gate, b, weight = ctx.saved_tensors
        a_live, c = _operands(a, gate, b, ctx.scaling, x.dtype)
        needs_dx, needs_a, needs_gate, needs_b = ctx.needs_input_grad[:4]
        dx = da = dgate = db = None
        if needs_dx or needs_a:
            dh = dy @ c.t()
            if needs_dx:
                dx = (dy @ weight).addmm_(dh, a_live)
            if needs_a:
                da = (dh.t() @ x).to(a.dtype)
        if needs_gate or needs_b:
            # As in the reference, dg and dB are computed in the dtype of the adapter.
            dc = ctx.scaling * (h.t() @ dy).to(b.dtype)
            if needs_gate:
                dgate = torch.where(gate != 0, (dc * torch.where((gate != 0).unsqueeze(1), b, 0.0)).sum(1), 0.0)
                dgate = dgate.to(gate.dtype)
            if needs_b:
                db = (dc * gate.unsqueeze(1)).to(b.dtype)
        return dx, da, dgate, db, None, None, None
