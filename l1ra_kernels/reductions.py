"""Reductions: sum the partial sums of the backward passes, ``Q = s * g * P``, ``dB = s * g * D``, dA and dg.

``reduce_hidden`` reads the partial sums of P ``(tiles, M, R)``, and H (M, G * R). It writes ``Q = s * g * P``
(M, G * R), the gradient of H, and partial sums of dg ``(blocks, G * R)``: ``s * sum of P * H`` over a block of tokens.
``reduce_rows`` sums, for all adapters of a bundle, the partial sums of dA ``(parts, G * R, K)``, of D
``(parts, R, N_0 + N_1 + N_2)`` and of dg, and writes dA, ``dB = s * g * D`` and dg.

Partial sums are added in a fixed order. The results for ranks whose gate is 0 are exactly 0; their partial sums may
be uninitialised memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.output_backward import OutputParts
from l1ra_kernels.pick import pick

__all__ = ["hidden_blocks", "reduce_hidden", "reduce_rows"]

TOKENS = 32  # per program of reduce_hidden, at rank tile 16
FEATURES = 64  # per program of reduce_rows, at rank tile 16
# Parts that are loaded together, so that their latencies overlap: as many as there are registers for.
TILES_TOGETHER = 8
ROWS_TOGETHER = 4


@triton.jit(
    do_not_specialize=["M", "tiles0", "tiles1", "tiles2", "rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2"]
)
def _reduce_hidden(
    p_p,  # (tiles0 + tiles1 + tiles2, M, R) float32
    p_h,  # (M, G * R)
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_q,  # (M, G * R)
    p_dg,  # (blocks, G * R) float32
    M,
    tiles0,
    tiles1,
    tiles2,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    NEEDS_DG: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    p_gate = pick(i, p_gate0, p_gate1, p_gate2, G)
    scaling = pick(i, scaling0, scaling1, scaling2, G)
    b_g = tl.load(p_gate + o_r, mask=o_r < pick(i, rank0, rank1, rank2, G), other=0.0).to(tl.float32)
    m_r = b_g != 0
    # If all gates are 0, output_backward has not written P.
    tiles = tl.where(tl.max(m_r.to(tl.int32)) > 0, pick(i, tiles0, tiles1, tiles2, G), 0)
    first = pick(i, 0, tiles0, tiles0 + tiles1, G)
    # The rows of P for a block of tokens are contiguous.
    o_flat = tl.arange(0, BM * R)
    m_flat = i_m * BM * R + o_flat < M.to(tl.int64) * R
    o_part = tl.arange(0, PARTS)
    b_sum = tl.zeros((BM * R,), tl.float32)
    for t in range(0, tiles, PARTS):
        p_tile = p_p + ((first + t + o_part).to(tl.int64)[:, None] * M + i_m * BM) * R + o_flat[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=(t + o_part < tiles)[:, None] & m_flat[None, :], other=0.0), 0)
    b_p = tl.where(m_r[None, :], tl.reshape(b_sum, (BM, R)), 0.0)
    o_h = o_m[:, None] * (G * R) + i * R + o_r[None, :]
    b_q = b_p * (scaling * b_g)[None, :]
    tl.store(p_q + o_h, b_q.to(p_q.dtype.element_ty), mask=m_m)
    if NEEDS_DG:
        b_h = tl.load(p_h + o_h, mask=m_m, other=0.0).to(tl.float32)
        tl.store(p_dg + i_m * (G * R) + i * R + o_r, scaling * tl.sum(b_p * b_h, 0))


def _tokens_per_block(bundle: Bundle) -> int:
    return max(8, TOKENS * 16 // bundle.width)


def hidden_blocks(bundle: Bundle) -> int:
    """The number of partial sums of dg that ``reduce_hidden`` leaves."""
    return -(-bundle.tokens // _tokens_per_block(bundle))


def reduce_hidden(bundle: Bundle, tiles: Sequence[int], needs_dg: bool = True) -> PreparedLaunch:
    """The launch for a bundle.

    The launch takes the tensors ``p, h, gate0, gate1, gate2, q, dg``, all contiguous.

    Args:
        tiles: parts of P of each adapter.
        needs_dg: whether dg is needed.
    """
    numbers = (bundle.tokens, *three(tiles, 0), *three(bundle.ranks), *three(bundle.scalings))
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "BM": _tokens_per_block(bundle),
        "PARTS": TILES_TOGETHER,
        "NEEDS_DG": needs_dg,
        "num_warps": 4,
    }
    return PreparedLaunch(_reduce_hidden, (hidden_blocks(bundle), bundle.adapters), numbers, meta, bundle.kind)


@triton.jit
def _sum_parts(p_part, parts, s_part, m_r, m_n, R: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """The sum of a tile (R, BN) over all parts, in their order."""
    o_r = tl.arange(0, R)
    b_sum = tl.zeros((R, BN), tl.float32)
    for part in range(0, parts, PARTS):
        for k in tl.static_range(PARTS):
            m_part = m_r & (o_r < tl.where(part + k < parts, R, 0))
            b_sum += tl.load(p_part + k * s_part, mask=m_part[:, None] & m_n[None, :], other=0.0)
        p_part += PARTS * s_part
    return b_sum


@triton.jit(
    do_not_specialize=["rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2"]
    + ["a_parts", "d_parts", "g_parts", "wanted"]
)
def _reduce_rows(
    p_da_parts,  # (a_parts, G * R, K) float32
    p_d_parts,  # (d_parts, R, N0 + N1 + N2) float32
    p_dg_parts,  # (g_parts, G * R) float32
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_da0,  # (r_i, K)
    p_da1,
    p_da2,
    p_db0,  # (r_i, N_i)
    p_db1,
    p_db2,
    p_dg0,  # (r_i,)
    p_dg1,
    p_dg2,
    K,
    N0,
    N1,
    N2,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    a_parts,
    d_parts,
    g_parts,
    wanted,  # bits 0 to 2: dA of each adapter, 3 to 5: dB, 6 to 8: dg
    G: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) % G
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, R)
    m_rank = o_r < pick(i, rank0, rank1, rank2, G)
    b_g = tl.load(pick(i, p_gate0, p_gate1, p_gate2, G) + o_r, mask=m_rank, other=0.0).to(tl.float32)
    m_r = b_g != 0
    live = tl.max(m_r.to(tl.int32))
    o_row = o_r.to(tl.int64)[:, None]
    if tl.program_id(1) < G:
        if (wanted >> i) & 1:
            m_n = o_n < K
            p_part = p_da_parts + (i * R + o_row) * K + o_n[None, :]
            s_part = tl.full([], G * R, tl.int64) * K
            b_da = _sum_parts(p_part, a_parts * live, s_part, m_r, m_n, R, BN, PARTS)
            p_da = pick(i, p_da0, p_da1, p_da2, G) + o_row * K + o_n[None, :]
            tl.store(p_da, b_da.to(p_da.dtype.element_ty), mask=m_rank[:, None] & m_n[None, :])
    else:
        if (wanted >> (3 + i)) & 1:
            N = pick(i, N0, N1, N2, G)
            m_n = o_n < N
            p_part = p_d_parts + o_row * (N0 + N1 + N2) + pick(i, 0, N0, N0 + N1, G) + o_n[None, :]
            s_part = tl.full([], R, tl.int64) * (N0 + N1 + N2)
            b_db = _sum_parts(p_part, d_parts * live, s_part, m_r, m_n, R, BN, PARTS)
            b_db *= (pick(i, scaling0, scaling1, scaling2, G) * b_g)[:, None]
            p_db = pick(i, p_db0, p_db1, p_db2, G) + o_row * N + o_n[None, :]
            tl.store(p_db, b_db.to(p_db.dtype.element_ty), mask=m_rank[:, None] & m_n[None, :])
        if ((wanted >> (6 + i)) & 1) & (i_n == 0):
            o_part = tl.arange(0, BN)
            b_dg = tl.zeros((R,), tl.float32)
            for start in range(0, g_parts, BN):
                p_dg_part = p_dg_parts + (start + o_part)[:, None] * (G * R) + i * R + o_r[None, :]
                b_dg += tl.sum(tl.load(p_dg_part, mask=(start + o_part < g_parts)[:, None], other=0.0), 0)
            p_dg = pick(i, p_dg0, p_dg1, p_dg2, G) + o_r
            tl.store(p_dg, tl.where(m_r, b_dg, 0.0).to(p_dg.dtype.element_ty), mask=m_rank)


def reduce_rows(
    bundle: Bundle,
    a_parts: int,
    parts: OutputParts,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
    needs_gate: Sequence[bool],
) -> PreparedLaunch:
    """The launch for a bundle.

    The launch takes the tensors ``da_parts, d_parts, dg_parts``, then for each of three adapters its gate, for each its
    dA, for each its dB, for each its dg; all contiguous.

    Args:
        a_parts: parts of dA.
        parts: of P and D. An adapter without tiles has no columns in D.
        needs_a, needs_b, needs_gate: of each adapter, the gradients to be written.
    """
    needs = (needs_a, needs_b, needs_gate)
    wanted = sum(need << (3 * kind + i) for kind, each in enumerate(needs) for i, need in enumerate(each))
    outputs = [n if tiles else 0 for n, tiles in zip(bundle.outputs, parts.tiles, strict=True)]
    longest = max(bundle.features * any(needs_a), *(n * need for n, need in zip(outputs, needs_b, strict=True)), 1)
    numbers = (
        bundle.features,
        *three(outputs, 0),
        *three(bundle.ranks),
        *three(bundle.scalings),
        *(a_parts, parts.splits, hidden_blocks(bundle), wanted),
    )
    tile = FEATURES * 16 // bundle.width
    meta = {"G": bundle.adapters, "R": bundle.width, "BN": tile, "PARTS": ROWS_TOGETHER, "num_warps": 4}
    grid = (-(-longest // tile), 2 * bundle.adapters)
    return PreparedLaunch(_reduce_rows, grid, numbers, meta, bundle.kind)
