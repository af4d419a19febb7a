"""Augment: write ``C.T`` behind the columns of the weight W, so that one matrix product computes base and adapter.

    y = [x | H] @ [W | C.T].T,   C = s * g * B

Reads g_i (r_i,) and B_i (r_i, N_i) of G adapters; writes the columns behind W_i in ``[W_i | C.T]`` (N_i, K + G * R).
The weight is stored as the first K columns of a wider tensor, which has memory for C.T. H contains the columns of all
adapters of the bundle. In the columns of the others, zeros are written behind this adapter's weight.

The same launch adds the parts of H ``(parts, M, G * R)``, and writes H (M, G * R) and the columns of ``[x | H]`` behind
x, which the shrink kernel has written.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.expand import sum_parts
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.pick import pick

__all__ = ["write_behind"]

FEATURES = 64  # rows of the weight per program
TOKENS = 64  # rows of H per program


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2", "parts", "blocks"])
def _write_behind(
    p_parts,  # (parts, M, G * R) float32
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_b0,  # (r_i, N_i)
    p_b1,
    p_b2,
    p_w0,  # (N_i, K + *)
    p_w1,
    p_w2,
    p_h,  # (M, G * R)
    p_out,  # (M, K + G * R)
    M,
    K,
    N0,
    N1,
    N2,
    s_w0,
    s_w1,
    s_w2,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    parts,
    blocks,  # of tokens, per adapter
    G: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of 2, at least G * R
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    kind = p_h.dtype.element_ty
    i_block = tl.program_id(0)
    o_r = tl.arange(0, R)
    if i_block < G * blocks:
        i = i_block // blocks
        i_m = i_block % blocks
        o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
        m_m = (o_m < M)[:, None]
        o_h = o_m[:, None] * (G * R) + i * R + o_r[None, :]
        b_h = sum_parts(p_parts + o_h, parts, M.to(tl.int64) * (G * R), M - i_m * BM, kind, BM, R)
        tl.store(p_h + o_h, b_h, mask=m_m)
        tl.store(p_out + o_m[:, None] * (K + G * R) + K + i * R + o_r[None, :], b_h, mask=m_m)
    else:
        i_block -= G * blocks
        tiles0 = tl.cdiv(N0, BN)
        tiles1 = tiles0 + tl.cdiv(N1, BN)
        i = (i_block >= tiles0).to(tl.int32) + (i_block >= tiles1).to(tl.int32)
        i_block -= pick(i, 0, tiles0, tiles1, G)
        N = pick(i, N0, N1, N2, G)
        o_n = i_block.to(tl.int64) * BN + tl.arange(0, BN)
        o_c = tl.arange(0, COLUMNS)
        o_rank = o_c - i * R
        m_n = o_n < N
        m_mine = (o_rank >= 0) & (o_rank < pick(i, rank0, rank1, rank2, G))
        b_g = tl.load(pick(i, p_gate0, p_gate1, p_gate2, G) + o_rank, mask=m_mine, other=0.0).to(tl.float32)
        m_r = b_g != 0
        p_b = pick(i, p_b0, p_b1, p_b2, G) + o_rank.to(tl.int64)[:, None] * N + o_n[None, :]
        b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_c = (b_b.to(tl.float32) * (pick(i, scaling0, scaling1, scaling2, G) * b_g)[:, None]).to(kind)
        p_w = pick(i, p_w0, p_w1, p_w2, G) + o_n[:, None] * pick(i, s_w0, s_w1, s_w2, G) + K + o_c[None, :]
        tl.store(p_w, tl.trans(b_c), mask=m_n[:, None] & (o_c < G * R)[None, :])


def write_behind(bundle: Bundle, parts: int, strides: Sequence[int], used: Sequence[bool]) -> PreparedLaunch:
    """The launch for a bundle.

    The launch takes the tensors ``parts, gate0, gate1, gate2, b0, b1, b2, w0, w1, w2, h, out``. All are contiguous,
    except that the rows of a weight lie apart. Weights, H and ``[x | H]`` are in the dtype of the products.

    Args:
        parts: the number of parts of H.
        strides: from one row of each weight to the next.
        used: the adapters whose weight has memory behind its columns.
    """
    blocks = -(-bundle.tokens // TOKENS)
    numbers = (
        *(bundle.tokens, bundle.features),
        *three([n if use else 0 for n, use in zip(bundle.outputs, used, strict=True)], 0),
        *three(strides),
        *three(bundle.ranks),
        *three(bundle.scalings),
        *(parts, blocks),
    )
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "COLUMNS": triton.next_power_of_2(bundle.columns),
        "BM": TOKENS,
        "BN": FEATURES,
        "num_warps": 8,
    }
    grid = (bundle.adapters * blocks + sum(bundle.columns_of(FEATURES, used)),)
    return PreparedLaunch(_write_behind, grid, numbers, meta, bundle.kind)
