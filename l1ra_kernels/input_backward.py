"""Input backward: ``dA_i = Q_i.T @ dropout(x)`` and ``dX = dropout'(sum of Q_i @ A_i)`` in one pass over x.

Reads x (M, K), Q (M, G * R) = s * g * P, which is the gradient of H, and A_i (r_i, K) of the G adapters that share x.
Writes dX (M, K), to which cuBLAS then adds the frozen layers' part (beta = 1), and partial sums of dA
``(splits, G * R, K)`` in float32. A program processes one tile of features for one split of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.configs import splits, tile
from l1ra_kernels.dropout import keep_mask, threshold
from l1ra_kernels.launch import PreparedLaunch

__all__ = ["input_backward"]


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "run", "inverse_keep", "limit"])
def _input_backward(
    p_x,  # (M, K)
    p_q,  # (M, G * R)
    p_a0,  # (r_i, K)
    p_a1,
    p_a2,
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_dx,  # (M, K)
    p_da,  # (splits, G * R, K) float32
    p_seed,  # (1,) int64
    M,
    K,
    s_x,
    rank0,
    rank1,
    rank2,
    run,  # tokens per split
    inverse_keep,
    limit,
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TALL: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_q.dtype.element_ty
    i_k = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, R)
    m_k = o_k < K
    p_as = (p_a0, p_a1, p_a2)
    p_gates = (p_gate0, p_gate1, p_gate2)
    ranks = (rank0, rank1, rank2)
    rows = ()
    sums = ()
    live = 0
    for i in tl.static_range(G):
        b_g = tl.load(p_gates[i] + o_r, mask=o_r < ranks[i], other=0.0)
        m_r = b_g != 0
        live = tl.maximum(live, tl.max(m_r.to(tl.int32)))
        b_a = tl.load(
            p_as[i] + o_r.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0
        )
        rows = rows + (b_a.to(kind),)
        if TALL:
            sums = sums + (tl.zeros((BK, R), tl.float32),)
        else:
            sums = sums + (tl.zeros((R, BK), tl.float32),)
    if DROPOUT:
        seed = tl.load(p_seed)
    start = i_split * run
    end = tl.minimum(start + run, M)
    # If all gates are 0, x is not read.
    stop = tl.where(live > 0, end, start)
    for m in range(start, end, BM):
        o_m = m + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < end
        m_mk = m_m[:, None] & m_k[None, :]
        if DROPOUT:
            keep = keep_mask(seed, limit, o_m, i_k * BK, BM, BK)
        if NEEDS_DA:
            b_x = tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=(o_m < stop)[:, None] & m_k[None, :], other=0.0)
            if DROPOUT:
                b_x = tl.where(keep, b_x, 0.0)
            b_x = b_x.to(kind)
        b_dx = tl.zeros((BM, BK), tl.float32)
        new = ()
        for i in tl.static_range(G):
            b_q = tl.load(p_q + o_m[:, None] * (G * R) + i * R + o_r[None, :], mask=m_m[:, None], other=0.0)
            if NEEDS_DX:
                b_dx = tl.dot(b_q, rows[i], b_dx, input_precision=PRECISION)
            if NEEDS_DA:
                if TALL:
                    new = new + (tl.dot(tl.trans(b_x), b_q, sums[i], input_precision=PRECISION),)
                else:
                    new = new + (tl.dot(tl.trans(b_q), b_x, sums[i], input_precision=PRECISION),)
            else:
                new = new + (sums[i],)
        sums = new
        if NEEDS_DX:
            if DROPOUT:
                b_dx = tl.where(keep, b_dx * inverse_keep, 0.0)
            tl.store(p_dx + o_m[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_mk)
    if NEEDS_DA:
        for i in tl.static_range(G):
            b_da = sums[i]
            if DROPOUT:
                b_da *= inverse_keep
            p_rows = p_da + (i_split * (G * R) + i * R) * K
            if TALL:
                tl.store(p_rows + o_r[None, :] * K + o_k[:, None], b_da, mask=m_k[:, None])
            else:
                tl.store(p_rows + o_r[:, None] * K + o_k[None, :], b_da, mask=m_k[None, :])


def input_backward(bundle: Bundle, needs_dx: bool = True, needs_da: bool = True) -> tuple[PreparedLaunch, int]:
    """The launch for a bundle, and the number of partial sums of dA.

    The launch takes the tensors ``x, q, a0, a1, a2, gate0, gate1, gate2, dx, da, seed``. All are contiguous, except
    that the rows of x may lie apart. ``dx`` is ``(M, K)`` in any floating dtype, ``da`` is ``(splits, G * R, K)``
    float32; they are written only if they are needed. ``seed`` is read only with dropout.

    Args:
        needs_dx, needs_da: whether dX and dA are needed.
    """
    general = bundle.dropout > 0 or bundle.input != bundle.dtype
    kernel = "input_backward_general" if general else "input_backward"
    t = tile(kernel, bundle.columns, bundle.dtype, bundle.device)
    columns = -(-bundle.features // t.features)
    run, count = splits(-(-bundle.tokens // t.tokens), columns, bundle.device, resident=t.blocks)
    numbers = (
        *(bundle.tokens, bundle.features, bundle.x_stride),
        *three(bundle.ranks),
        *(run * t.tokens, 1 / (1 - bundle.dropout), threshold(bundle.dropout)),
    )
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "BM": t.tokens,
        "BK": t.features,
        "TALL": t.tall,
        "DROPOUT": bundle.dropout > 0,
        "NEEDS_DX": needs_dx,
        "NEEDS_DA": needs_da,
        "PRECISION": bundle.precision,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }
    return PreparedLaunch(_input_backward, (columns, count), numbers, meta, bundle.kind), count
