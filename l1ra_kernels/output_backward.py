"""Output backward: ``P = dY @ B.T`` and ``D = H.T @ dY`` in one pass over dY.

Reads dY (M, N), H (M, R), the columns of one adapter, g (r,) and B (r, N). Writes partial sums of P ``(tiles, M, R)``
and D ``(splits, R, N)`` in float32, which the kernels in reductions.py add in a fixed order. Gate and scaling are not
applied to P and D. In P the columns of ranks whose gate is 0 are 0.

P is a sum over N, D is a sum over M. A program processes one tile of features for one split of the tokens. It
accumulates D in registers while it iterates over the tokens, and stores its tile's part of P in each iteration.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.configs import split_tokens, tile
from l1ra_kernels.launch import launch

__all__ = ["output_backward"]


@triton.jit(do_not_specialize=["M", "rank", "run"])
def _output_backward(
    p_dy,  # (M, N)
    p_h,  # (M, *), its R columns
    p_gate,  # (r,)
    p_b,  # (r, N)
    p_p,  # (tiles, M, R) float32
    p_d,  # (splits, R, N) float32
    M,
    N,
    rank,
    run,  # tokens per split
    s_dy,
    s_h,
    s_b,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NEEDS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_h.dtype.element_ty
    i_n = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, R)
    m_n = o_n < N
    b_g = tl.load(p_gate + o_r, mask=o_r < rank, other=0.0)
    m_r = b_g != 0
    b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * s_b + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
    b_bt = tl.trans(b_b.to(kind))
    b_d = tl.zeros((R, BN), tl.float32)
    start = i_s * run
    end = tl.minimum(start + run, M)
    # If all gates are 0, dY and H are not read and P is not written; reduce_hidden then does not read P.
    stop = tl.where(tl.max(m_r.to(tl.int32)) > 0, end, start)
    for m in range(start, stop, BM):
        o_m = m + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < end
        b_dy = tl.load(p_dy + o_m[:, None] * s_dy + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_p = tl.dot(b_dy, b_bt, input_precision=PRECISION)
        tl.store(p_p + (i_n * M + o_m[:, None]) * R + o_r[None, :], b_p, mask=m_m[:, None])
        if NEEDS_D:
            b_h = tl.load(p_h + o_m[:, None] * s_h + o_r[None, :], mask=m_m[:, None], other=0.0)
            b_d = tl.dot(tl.trans(b_h), b_dy, b_d, input_precision=PRECISION)
    if NEEDS_D:
        tl.store(p_d + (i_s * R + o_r[:, None]) * N + o_n[None, :], b_d, mask=m_n[None, :])


def output_backward(
    dy: Tensor, h: Tensor, gate: Tensor, b: Tensor, *, needs_d: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        dy: ``(M, N)`` in the dtype of ``h``, last stride 1.
        h: ``(M, R)``, this adapter's columns of H.
        gate, b: ``(r,)`` and ``(r, N)``, last stride 1.
        needs_d: whether D is needed.
        precision: ``input_precision`` of ``tl.dot``, ``"ieee"`` or ``"tf32"``.

    Returns:
        Partial sums of P ``(tiles, M, R)`` and of D ``(splits, R, N)``, float32; None in place of D if not needed.
    """
    tokens, features = dy.shape
    width = h.shape[1]
    t = tile("output_backward", width, h.dtype, h.device)
    columns = triton.cdiv(features, t.features)
    run, count = split_tokens(tokens, t.tokens, columns, h.device)
    p = h.new_empty(columns, tokens, width, dtype=torch.float32)
    d = h.new_empty(count, width, features, dtype=torch.float32) if needs_d else None
    launch(
        _output_backward,
        (columns, count),
        dy,
        h,
        gate,
        b,
        p,
        p if d is None else d,
        tokens,
        features,
        b.shape[0],
        run,
        dy.stride(0),
        h.stride(0),
        b.stride(0),
        R=width,
        BM=t.tokens,
        BN=t.features,
        NEEDS_D=needs_d,
        PRECISION=precision,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return p, d
