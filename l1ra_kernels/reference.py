"""The specification of every op in plain PyTorch, for any device; ``gated_lora`` is differentiable.

Dimensions: M tokens, K in_features, N out_features, r rank. A ``(r, K)`` and B ``(r, N)`` have one row per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

CONCATENATED_BYTES = 1 << 26  # of tensors whose rows are moved together: a copy of them is held meanwhile


def gated_lora(y0: Tensor, x: Tensor, a: Tensor, gate: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y = y0 + s * ((x @ A.T) * g) @ B``, computed in the dtype of ``y0``.

    Scaling and gate are multiplied into B, ``C = s * g * B``, before C is rounded to the dtype of ``y0``. So they need
    no pass over the tokens, and the gradient ``dg = s * sum(B * dC, dim=1)`` is computed in the dtype of the adapter.
    A rank whose gate is exactly 0 is pruned: its rows do not affect y, even if they contain NaN, and its gradients are
    0.

    Args:
        y0: output of the frozen layer, ``(..., N)``.
        x: input of the layer, ``(..., K)``, any strides.
        a, gate, b: ``(r, K)``, ``(r,)`` and ``(r, N)``, of any floating dtype.
        scaling: s.

    Returns:
        ``(..., N)`` in the dtype of ``y0``.
    """
    dtype = y0.dtype
    # The dtype of the products is that of y0; an enclosing autocast region must not lower it. The meta device has no
    # autocast. Its name is compared because torch.compile can't trace is_autocast_available in torch 2.11.
    kind = y0.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        live = (gate != 0).unsqueeze(1)
        c = (torch.where(live, b, 0.0) * (scaling * gate).unsqueeze(1)).to(dtype)
        h = F.linear(x.to(dtype).reshape(-1, x.shape[-1]), torch.where(live, a, 0.0).to(dtype))
        return torch.addmm(y0.reshape(-1, y0.shape[-1]), h, c).view(y0.shape)


def dropout_mask(seed: int, tokens: int, features: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """The dropout mask of the fused kernels for an input ``(tokens, features)``: bool, True for kept elements.

    Each element is dropped with probability ``p``. Element (m, k) is kept if number ``k % 4`` of Philox4x32-10 with key
    ``seed`` and counter ``(k // 4, m, 0, 0)`` is at least ``p * 2**32``. Source: Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    quad = torch.arange(-(-features // 4), device=device).expand(tokens, -1)
    row = torch.arange(tokens, device=device).unsqueeze(1).expand_as(quad)
    c0, c1, c2, c3 = quad, row & low, torch.zeros_like(quad), torch.zeros_like(quad)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        (h0, l0), (h2, l2) = _wide_product(0xD2511F53, c0), _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    bits = torch.stack([c0, c1, c2, c3], -1).reshape(tokens, -1)[:, :features]
    return bits >= min(int(p * 2**32), low)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers; all are stored as int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def move_rows(rows: Tensor, keep: Sequence[int], grow: int, fill: float = 0.0) -> Tensor:
    """The rows ``keep`` of ``rows`` ``(r, ...)``, in order and bit for bit, followed by ``grow`` rows of ``fill``.

    Returns:
        A new tensor ``(len(keep) + grow, ...)``, same dtype and device.
    """
    moved = rows.new_full((len(keep) + grow, *rows.shape[1:]), fill)
    moved[: len(keep)] = rows[torch.as_tensor(keep, dtype=torch.long, device=rows.device)]
    return moved


@torch.no_grad()
def move_rows_many(tensors: Sequence[Tensor], sources: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Tensor]:
    """New tensors whose row i is row ``sources[i]`` of the old tensor ``(r, ...)``, or ``fill`` if that is -1.

    Tensors with rows of the same shape are concatenated, so that they take one op together.
    """
    alike: dict[tuple, list[int]] = {}
    for i, rows in enumerate(tensors):
        alike.setdefault((rows.device, rows.dtype, rows.shape[1:]), []).append(i)
    moved: dict[int, Tensor] = {}
    for chosen in alike.values():
        count = max(1, CONCATENATED_BYTES // max(1, *(tensors[i].nbytes for i in chosen)))
        for start in range(0, len(chosen), count):
            part = chosen[start : start + count]
            results = _move_alike(*([values[i] for i in part] for values in (tensors, sources, fills)))
            moved.update(zip(part, results, strict=True))
    return [moved[i] for i in range(len(tensors))]


def _move_alike(tensors: list[Tensor], sources: list[Sequence[int]], fills: list[float]) -> tuple[Tensor, ...]:
    first, index, start = tensors[0], [], 0
    fills = [float(fill).hex() for fill in fills]  # -0.0 and 0.0 differ
    new_rows = {fill: sum(map(len, tensors)) + i for i, fill in enumerate(dict.fromkeys(fills))}  # behind the old ones
    for rows, source, fill in zip(tensors, sources, fills, strict=True):
        index += [new_rows[fill] if row < 0 else start + row for row in source]
        start += len(rows)
    filled = [first.new_full((1, *first.shape[1:]), float.fromhex(fill)) for fill in new_rows]
    rows = torch.cat([*tensors, *filled])
    moved = rows.index_select(0, torch.tensor(index, dtype=torch.long, device=first.device))
    return torch.split_with_sizes_copy(moved, [len(source) for source in sources])


@torch.no_grad()
def compact_rows_(tensors: Sequence[Tensor], keeps: Sequence[Sequence[int]]) -> None:
    """Move the rows ``keep`` of each tensor ``(r, ...)`` to the front, and set the rows behind them to 0, in place."""
    for rows, keep in zip(tensors, keeps, strict=True):
        rows[: len(keep)] = rows[torch.as_tensor(keep, dtype=torch.long, device=rows.device)]
        rows[len(keep) :] = 0


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

    All tensors are flat ``(R,)`` float32. ``age`` is the number of steps of each gate before this one; the bias
    correction of Adam uses it, because gates of new ranks have made fewer steps. The L1 term is a soft threshold of
    ``lr * l1``, so that gates reach exactly 0. Source: L1RA.

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

    The average is a plain mean while a rank has been trained for fewer than ``horizon`` steps, and exponential
    afterwards. All tensors are ``(R,)``.
    """
    weight = (1.0 / (age + 1)).clamp(min=1.0 / horizon)
    return torch.lerp(mean_sq, (gate * grad).square(), weight)


def weighted_l1_step(gate: Tensor, weight: Tensor, *, lr: float, l1: float) -> Tensor:
    """``g <- clamp(g + lr * (1 - l1 * weight), 0, 1)``: a constant increase towards 1, minus a weighted L1 step.

    A gate that has reached 0 stays at 0. ``gate`` and ``weight`` are ``(R,)``.
    """
    return torch.where(gate > 0, (gate + lr * (1 - l1 * weight)).clamp(0.0, 1.0), gate)


def unless_not_finite(
    new: Sequence[Tensor], old: Sequence[Tensor], grad: Tensor, skipped: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Select the new state of the gates, or the old state if a gradient is not finite.

    If the gradient of any gate, or its square, is not finite, all gates keep their old state and ``skipped`` increases
    by 1. Otherwise the value would stay in the moving averages forever. No value is copied to the host.

    Args:
        new, old: tensors ``(R,)`` of the state after and before a step.
        grad: ``(R,)``, the gradients of the gates.
        skipped: int64 scalar, the number of skipped steps so far.
        seen: bool ``(R,)``, the gates that had a gradient; the others keep their old state. None: all gates had one.

    Returns:
        One tensor for each of ``new``, then the new ``skipped``.
    """
    finite = torch.isfinite(grad.square()).all()
    where = finite if seen is None else finite & seen
    return *(torch.where(where, n, o) for n, o in zip(new, old, strict=True)), skipped + ~finite


def adam_gate_step(
    gate: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    skipped: Tensor,
    seen: Tensor | None = None,
    *,
    lr: float,
    l1: float,
    l2: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`adam_elastic_net_step` and ``age + 1`` for all gates, then :func:`unless_not_finite`.

    All tensors are ``(R,)`` float32, except ``skipped`` (int64 scalar) and ``seen`` (bool).

    Returns:
        The new ``(gate, exp_avg, exp_avg_sq, age, skipped)``; the inputs are not changed.
    """
    moved = adam_elastic_net_step(gate, grad, exp_avg, exp_avg_sq, age, lr=lr, l1=l1, l2=l2, betas=betas, eps=eps)
    return unless_not_finite((*moved, age + 1), (gate, exp_avg, exp_avg_sq, age), grad, skipped, seen)


def adaptive_gate_step(
    gate: Tensor,
    grad: Tensor,
    importance_sq: Tensor,
    age: Tensor,
    weight: Tensor,
    skipped: Tensor,
    seen: Tensor | None = None,
    *,
    lr: float,
    l1: float,
    horizon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`importance_step`, :func:`weighted_l1_step` and ``age + 1`` for all gates, then :func:`unless_not_finite`.

    ``weight`` is the weight of each rank's L1 penalty. All tensors are ``(R,)`` float32, except ``skipped`` (int64
    scalar) and ``seen`` (bool).

    Returns:
        The new ``(gate, importance_sq, age, skipped)``; the inputs are not changed.
    """
    mean_sq = importance_step(gate, grad, importance_sq, age, horizon)
    moved = weighted_l1_step(gate, weight, lr=lr, l1=l1)
    return unless_not_finite((moved, mean_sq, age + 1), (gate, importance_sq, age), grad, skipped, seen)
