"""Every op in a few lines of torch: the specification, on any device, differentiable where it makes sense.

Dimensions: M tokens, K in_features, N out_features, r rank. Adapter tensors are rank-major: one row a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_lora(y0: Tensor, x: Tensor, a: Tensor, gate: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y = y0 + s * ((x @ A.T) * g) @ B``, computed in the dtype of ``y0``.

    The gate is folded into B, ``C = s * g * B``, before anything is rounded: no pass over the tokens is spent
    on it, and its gradient ``dg = s * sum(B * dC, dim=1)`` leaves in the dtype of the adapter.

    Args:
        y0: output of the frozen layer, ``(..., N)``.
        x: input of the layer, ``(..., K)``, any strides.
        a: ``(r, K)``, any floating dtype; so are ``gate``, ``(r,)``, and ``b``, ``(r, N)``.
        scaling: s.

    Returns:
        ``(..., N)`` in the dtype of ``y0``.
    """
    dtype = y0.dtype
    # The dtype is settled by y0; an enclosing autocast region must not lower it further. The meta device has none.
    kind = y0.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        c = (b * (scaling * gate).unsqueeze(1)).to(dtype)
        h = F.linear(x.to(dtype).reshape(-1, x.shape[-1]), a.to(dtype))
        return torch.addmm(y0.reshape(-1, y0.shape[-1]), h, c).view(y0.shape)


def move_rows(rows: Tensor, keep: Sequence[int], grow: int, fill: float = 0.0) -> Tensor:
    """The kept rows of ``rows`` ``(r, ...)``, bit for bit and in order, then ``grow`` rows of ``fill``.

    Returns:
        A new tensor ``(len(keep) + grow, ...)``, same dtype and device.
    """
    moved = rows.new_full((len(keep) + grow, *rows.shape[1:]), fill)
    moved[: len(keep)] = rows[torch.as_tensor(keep, dtype=torch.long, device=rows.device)]
    return moved


def adam_elastic_net_step(
    gate: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    *,
    lr: float,
    l1: float,
    l2: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamE on gates: Adam, then decoupled L2 and L1, then the clamp to [0, 1].

    All tensors are flat ``(R,)`` float32; ``age`` counts each gate's steps before this one, so that a young gate
    has its own bias correction. The L1 term is a soft threshold of ``lr * l1``: it reaches exactly 0.

    Returns:
        The new ``(gate, exp_avg, exp_avg_sq)``; the inputs are not changed.
    """
    beta1, beta2 = betas
    t = age + 1
    exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    denom = (exp_avg_sq / (1 - beta2**t)).sqrt() + eps
    gate = gate - lr * (exp_avg / (1 - beta1**t)) / denom
    gate = gate * (1 - lr * l2) - lr * l1
    return gate.clamp(0.0, 1.0), exp_avg, exp_avg_sq


def importance_step(gate: Tensor, grad: Tensor, mean_sq: Tensor, age: Tensor, horizon: float) -> Tensor:
    """Moving average of ``(g * dL/dg)**2``, the squared first-order change of the loss if the rank were removed.

    A plain mean while a rank is younger than ``horizon`` steps, an exponential one afterwards. All ``(R,)``.
    """
    weight = (1.0 / (age + 1)).clamp(min=1.0 / horizon)
    return torch.lerp(mean_sq, (gate * grad).square(), weight)


def weighted_l1_step(gate: Tensor, weight: Tensor, *, lr: float, l1: float) -> Tensor:
    """``g <- clamp(g + lr * (1 - l1 * weight), 0, 1)``: a weighted L1 step against a constant pull back to 1.

    A gate that has reached 0 stays there. ``gate`` and ``weight`` are ``(R,)``.
    """
    return torch.where(gate > 0, (gate + lr * (1 - l1 * weight)).clamp(0.0, 1.0), gate)
