"""Gate step: one launch updates the gates of a whole model, by the rule ``"l1"`` (AdamE) or ``"adaptive-l1"``.

Reads the gates, their gradients and the state of the rule; writes the new gates and the new state to new tensors. All
vectors are flat ``(R,)`` float32. The formulas are those of ``adam_gate_step`` and ``adaptive_gate_step`` in
reference.py.

If the square of any gradient is not finite, no gate is updated. Therefore every program loads all R gradients before it
updates its own block of gates. R is a few thousand, so the gradients stay in the cache. This is cheaper than a second
launch, and needs neither atomics nor a synchronisation with the host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.launch import launch

__all__ = ["adam_gate_step", "adaptive_gate_step"]

BLOCK = 1024
WARPS = 8
VARYING = ["R"]  # not specialised: a change of the sum of ranks must not recompile the kernels


@triton.jit
def _all_finite(p_grad, R, BLOCK: tl.constexpr):
    b_bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, R, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_grad = tl.load(p_grad + o, mask=o < R, other=0.0)
        b_bad |= tl.where(b_grad * b_grad < float("inf"), 0, 1)  # a comparison with NaN is false
    return tl.max(b_bad, 0) == 0


@triton.jit
def _count_skipped(p_skipped, p_new_skipped, finite):
    if tl.program_id(0) == 0:
        tl.store(p_new_skipped, tl.load(p_skipped) + tl.where(finite, 0, 1))


@triton.jit
def _bias_correction(b_t, log_beta):
    """``1 - beta**t``, accurate also if ``beta**t`` is close to 1, where the subtraction would lose most digits."""
    x = b_t * log_beta
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series))))
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))


@triton.jit(do_not_specialize=VARYING)
def _adam_gate_step(
    p_gate,  # (R,), as all tensors here, except p_skipped and p_new_skipped: scalar int64; p_seen is uint8
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_age,
    p_skipped,
    p_seen,
    p_new_gate,
    p_new_exp_avg,
    p_new_exp_avg_sq,
    p_new_age,
    p_new_skipped,
    R,
    lr,
    shrink,  # 1 - lr * l2
    threshold,  # lr * l1
    beta2,
    fresh1,  # 1 - beta1
    fresh2,  # 1 - beta2
    log_beta1,
    log_beta2,
    eps,
    HAS_SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    finite = _all_finite(p_grad, R, BLOCK)
    _count_skipped(p_skipped, p_new_skipped, finite)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < R
    b_gate = tl.load(p_gate + o, mask=m, other=0.0)
    b_grad = tl.load(p_grad + o, mask=m, other=0.0)
    b_exp_avg = tl.load(p_exp_avg + o, mask=m, other=0.0)
    b_exp_avg_sq = tl.load(p_exp_avg_sq + o, mask=m, other=0.0)
    b_age = tl.load(p_age + o, mask=m, other=0.0)
    m_moves = finite & m
    if HAS_SEEN:
        m_moves &= tl.load(p_seen + o, mask=m, other=0) != 0

    b_m = b_exp_avg + fresh1 * (b_grad - b_exp_avg)
    b_v = b_exp_avg_sq * beta2 + b_grad * b_grad * fresh2
    b_mean = tl.div_rn(b_m, _bias_correction(b_age + 1, log_beta1))
    b_root = tl.sqrt_rn(tl.div_rn(b_v, _bias_correction(b_age + 1, log_beta2)))
    b_new = (b_gate - lr * tl.div_rn(b_mean, b_root + eps)) * shrink - threshold
    b_new = tl.clamp(b_new, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)

    tl.store(p_new_gate + o, tl.where(m_moves, b_new, b_gate), mask=m)
    tl.store(p_new_exp_avg + o, tl.where(m_moves, b_m, b_exp_avg), mask=m)
    tl.store(p_new_exp_avg_sq + o, tl.where(m_moves, b_v, b_exp_avg_sq), mask=m)
    tl.store(p_new_age + o, tl.where(m_moves, b_age + 1, b_age), mask=m)


@triton.jit(do_not_specialize=VARYING)
def _adaptive_gate_step(
    p_gate,  # (R,), as all tensors here, except p_skipped and p_new_skipped: scalar int64; p_seen is uint8
    p_grad,
    p_importance_sq,
    p_age,
    p_weight,
    p_skipped,
    p_seen,
    p_new_gate,
    p_new_importance_sq,
    p_new_age,
    p_new_skipped,
    R,
    lr,
    l1,
    horizon,
    HAS_SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    finite = _all_finite(p_grad, R, BLOCK)
    _count_skipped(p_skipped, p_new_skipped, finite)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < R
    b_gate = tl.load(p_gate + o, mask=m, other=0.0)
    b_old = tl.load(p_importance_sq + o, mask=m, other=0.0)
    b_age = tl.load(p_age + o, mask=m, other=0.0)
    m_moves = finite & m
    if HAS_SEEN:
        m_moves &= tl.load(p_seen + o, mask=m, other=0) != 0

    b_change = b_gate * tl.load(p_grad + o, mask=m, other=0.0)
    b_fresh = tl.maximum(tl.div_rn(1.0, b_age + 1), tl.div_rn(1.0, horizon))
    b_new = b_old + b_fresh * (b_change * b_change - b_old)
    b_moved = b_gate + lr * (1 - l1 * tl.load(p_weight + o, mask=m, other=0.0))
    b_moved = tl.clamp(b_moved, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)

    tl.store(p_new_gate + o, tl.where(m_moves & (b_gate > 0), b_moved, b_gate), mask=m)
    tl.store(p_new_importance_sq + o, tl.where(m_moves, b_new, b_old), mask=m)
    tl.store(p_new_age + o, tl.where(m_moves, b_age + 1, b_age), mask=m)


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
    """Launch the kernel; arguments and result as of :func:`l1ra_kernels.reference.adam_gate_step`."""
    old = _contiguous(gate, grad, exp_avg, exp_avg_sq, age, skipped, seen)
    new = [torch.empty_like(old[i]) for i in (0, 2, 3, 4, 5)]
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    launch(
        _adam_gate_step,
        (triton.cdiv(gate.numel(), BLOCK),),
        *old,
        *new,
        gate.numel(),
        lr,
        1 - lr * l2,
        lr * l1,
        betas[1],
        1 - betas[0],
        1 - betas[1],
        *logs,
        eps,
        HAS_SEEN=seen is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return tuple(new)


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
    """Launch the kernel; arguments and result as of :func:`l1ra_kernels.reference.adaptive_gate_step`."""
    old = _contiguous(gate, grad, importance_sq, age, weight, skipped, seen)
    new = [torch.empty_like(old[i]) for i in (0, 2, 3, 5)]
    launch(
        _adaptive_gate_step,
        (triton.cdiv(gate.numel(), BLOCK),),
        *old,
        *new,
        gate.numel(),
        *map(float, (lr, l1, horizon)),
        HAS_SEEN=seen is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return tuple(new)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    *vectors, seen = tensors
    return [*(t.contiguous() for t in vectors), None if seen is None else seen.contiguous().view(torch.uint8)]
