"""Shrink: ``H_i = dropout(x) @ A_i.T`` in one pass over x, for one to three adapters that share the input x.

Reads x (M, K), A_i (r_i, K) and g_i (r_i,) of G adapters; writes partial sums of H ``(parts, M, G * R)`` in float32,
R the rank tile. Adapter i has the R columns from i * R on, with zeros beyond its rank. The kernel that reads H next
(expand, or write_behind in augment.py) adds the parts. Rows of A whose gate is 0 are not read. If all gates are 0, x is
not read. With AUGMENT, x is also copied into the first K columns of ``[x | H]`` (M, K + G * R).

H is a sum over K. A program processes a tile of tokens for one part of the features; with few tokens there are more
parts, so that all multiprocessors are occupied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.configs import splits, tile
from l1ra_kernels.dropout import keep_mask, threshold
from l1ra_kernels.launch import PreparedLaunch

__all__ = ["shrink"]

MIN_FEATURES = 256  # per part; a shorter part would cost more to add than it saves


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "run", "inverse_keep", "limit"])
def _shrink(
    p_x,  # (M, K)
    p_a0,  # (r_i, K)
    p_a1,
    p_a2,
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_h,  # (parts, M, G * R) float32
    p_out,  # (M, K + G * R)
    p_seed,  # (1,) int64
    M,
    K,
    s_x,
    rank0,
    rank1,
    rank2,
    run,  # tiles of features per part
    inverse_keep,
    limit,
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DROPOUT: tl.constexpr,
    AUGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_out.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_part = tl.program_id(1)
    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    p_as = (p_a0, p_a1, p_a2)
    p_gates = (p_gate0, p_gate1, p_gate2)
    ranks = (rank0, rank1, rank2)
    gates = ()
    b_hs = ()
    any_live = 0
    for i in tl.static_range(G):
        b_g = tl.load(p_gates[i] + o_r, mask=o_r < ranks[i], other=0.0).to(tl.float32)
        gates = gates + (b_g,)
        b_hs = b_hs + (tl.zeros((BM, R), tl.float32),)
        any_live = tl.maximum(any_live, tl.max((b_g != 0).to(tl.int32)))
    if DROPOUT:
        seed = tl.load(p_seed)
    start = i_part * run * BK
    end = tl.minimum(start + run * BK, K)
    if not AUGMENT:
        end = tl.where(any_live > 0, end, start)
    for k in range(start, end, BK):
        m_k = k + o_k < K
        b_x = tl.load(p_x + o_m[:, None] * s_x + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if AUGMENT:
            tl.store(p_out + o_m[:, None] * (K + G * R) + (k + o_k)[None, :], b_x, mask=m_m[:, None] & m_k[None, :])
        if DROPOUT:
            b_x = tl.where(keep_mask(seed, limit, o_m, k, BM, BK), b_x, 0.0)
        b_x = b_x.to(kind)
        sums = ()
        for i in tl.static_range(G):
            m_r = gates[i] != 0
            b_a = tl.load(
                p_as[i] + o_r.to(tl.int64)[:, None] * K + (k + o_k)[None, :],
                mask=m_r[:, None] & m_k[None, :],
                other=0.0,
            )
            sums = sums + (tl.dot(b_x, tl.trans(b_a.to(kind)), b_hs[i], input_precision=PRECISION),)
        b_hs = sums
    for i in tl.static_range(G):
        b_h = b_hs[i]
        if DROPOUT:
            b_h *= inverse_keep
        p_part = p_h + (i_part.to(tl.int64) * M + o_m[:, None]) * (G * R) + i * R
        tl.store(p_part + o_r[None, :], b_h, mask=m_m[:, None])


def shrink(bundle: Bundle, augment: bool = False) -> tuple[PreparedLaunch, int]:
    """The launch for a bundle, and the number of parts of H.

    The launch takes the tensors ``x, a0, a1, a2, gate0, gate1, gate2, h, out, seed``. All are contiguous, except that
    the rows of x may lie apart. ``h`` is ``(parts, M, G * R)`` float32. ``out`` is in the dtype of the products; with
    ``augment`` it is ``(M, K + G * R)``, otherwise it is not written. ``seed``, int64 ``(1,)``, is read with dropout.
    """
    t = tile("shrink_general" if augment else "shrink", bundle.columns, bundle.dtype, bundle.device)
    blocks = -(-bundle.features // t.features)
    rows = -(-bundle.tokens // t.tokens)
    run, parts = splits(blocks, rows, bundle.device, resident=t.blocks, most=max(1, bundle.features // MIN_FEATURES))
    numbers = (
        *(bundle.tokens, bundle.features, bundle.x_stride),
        *three(bundle.ranks),
        *(run, 1 / (1 - bundle.dropout), threshold(bundle.dropout)),
    )
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "BM": t.tokens,
        "BK": t.features,
        "DROPOUT": bundle.dropout > 0,
        "AUGMENT": augment,
        "PRECISION": bundle.precision,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }
    return PreparedLaunch(_shrink, (rows, parts), numbers, meta, bundle.kind), parts
