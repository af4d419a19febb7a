"""Output backward: ``P_i = dY_i @ B_i.T`` and ``D_i = H_i.T @ dY_i`` in one pass over the dY_i of G adapters.

Reads dY_i (M, N_i), H (M, G * R), g_i (r_i,) and B_i (r_i, N_i). Writes partial sums of P ``(tiles, M, R)`` and D
``(splits, R, N_0 + N_1 + N_2)`` in float32, which the kernels in reductions.py add in a fixed order. The tiles of the
first adapter come first, then those of the next one. Gate and scaling are not applied to P and D. In P the columns of
ranks whose gate is 0 are 0.

P is a sum over N, D is a sum over M. A program processes one tile of features for one split of the tokens. It
accumulates D in registers while it iterates over the tokens, and stores its tile's part of P in each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.configs import splits, tile
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.pick import pick

__all__ = ["OutputParts", "output_backward"]


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "run"])
def _output_backward(
    p_dy0,  # (M, N_i)
    p_dy1,
    p_dy2,
    p_h,  # (M, G * R)
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_b0,  # (r_i, N_i)
    p_b1,
    p_b2,
    p_p,  # (tiles, M, R) float32
    p_d,  # (splits, R, N0 + N1 + N2) float32
    M,
    N0,
    N1,
    N2,
    s_dy0,
    s_dy1,
    s_dy2,
    rank0,
    rank1,
    rank2,
    run,  # tokens per split
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TALL: tl.constexpr,
    NEEDS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_h.dtype.element_ty
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1).to(tl.int64)
    tiles0 = tl.cdiv(N0, BN)
    tiles1 = tiles0 + tl.cdiv(N1, BN)
    i = (i_tile >= tiles0).to(tl.int32) + (i_tile >= tiles1).to(tl.int32)
    N = pick(i, N0, N1, N2, G)
    p_dy = pick(i, p_dy0, p_dy1, p_dy2, G)
    s_dy = pick(i, s_dy0, s_dy1, s_dy2, G)
    p_gate = pick(i, p_gate0, p_gate1, p_gate2, G)
    p_b = pick(i, p_b0, p_b1, p_b2, G)
    o_n = (i_tile - pick(i, 0, tiles0, tiles1, G)).to(tl.int64) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, R)
    m_n = o_n < N
    b_g = tl.load(p_gate + o_r, mask=o_r < pick(i, rank0, rank1, rank2, G), other=0.0)
    m_r = b_g != 0
    b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * N + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
    b_bt = tl.trans(b_b.to(kind))
    if TALL:
        b_d = tl.zeros((BN, R), tl.float32)
    else:
        b_d = tl.zeros((R, BN), tl.float32)
    start = i_split * run
    end = tl.minimum(start + run, M)
    # If all gates are 0, dY and H are not read and P is not written; reduce_hidden then does not read P.
    stop = tl.where(tl.max(m_r.to(tl.int32)) > 0, end, start)
    for m in range(start, stop, BM):
        o_m = m + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < end
        b_dy = tl.load(p_dy + o_m[:, None] * s_dy + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_p = tl.dot(b_dy, b_bt, input_precision=PRECISION)
        tl.store(p_p + (i_tile.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :], b_p, mask=m_m[:, None])
        if NEEDS_D:
            b_h = tl.load(p_h + o_m[:, None] * (G * R) + i * R + o_r[None, :], mask=m_m[:, None], other=0.0)
            if TALL:
                b_d = tl.dot(tl.trans(b_dy), b_h, b_d, input_precision=PRECISION)
            else:
                b_d = tl.dot(tl.trans(b_h), b_dy, b_d, input_precision=PRECISION)
    if NEEDS_D:
        o_column = pick(i, 0, N0, N0 + N1, G) + o_n
        p_row = p_d + i_split * R * (N0 + N1 + N2)
        if TALL:
            tl.store(p_row + o_r[None, :] * (N0 + N1 + N2) + o_column[:, None], b_d, mask=m_n[:, None])
        else:
            tl.store(p_row + o_r[:, None] * (N0 + N1 + N2) + o_column[None, :], b_d, mask=m_n[None, :])


class OutputParts(NamedTuple):
    """The partial sums that the kernel leaves.

    Attributes:
        tiles: of features, for each adapter: parts of P.
        splits: of the tokens: parts of D.
    """

    tiles: tuple[int, ...]
    splits: int


def output_backward(
    bundle: Bundle, strides: Sequence[int], used: Sequence[bool], needs_d: bool = True
) -> tuple[PreparedLaunch, OutputParts]:
    """The launch for a bundle, and the partial sums that it leaves.

    The launch takes the tensors ``dy0, dy1, dy2, h, gate0, gate1, gate2, b0, b1, b2, p, d``. All are contiguous, except
    that the rows of a dY may lie apart. dY is in the dtype of H.

    Args:
        strides: from one row of each dY to the next.
        used: the adapters that have a dY. The features of the others have no columns in ``d``.
        needs_d: whether D is needed.
    """
    general = any(n % 16 or stride % 16 for n, stride in zip(bundle.outputs, strides, strict=True))
    kernel = "output_backward_general" if general else "output_backward"
    t = tile(kernel, bundle.width, bundle.dtype, bundle.device)
    tiles = bundle.columns_of(t.features, used)
    run, count = splits(-(-bundle.tokens // t.tokens), sum(tiles), bundle.device, resident=t.blocks)
    numbers = (
        bundle.tokens,
        *three([n if use else 0 for n, use in zip(bundle.outputs, used, strict=True)], 0),
        *three(strides),
        *three(bundle.ranks),
        run * t.tokens,
    )
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "BM": t.tokens,
        "BN": t.features,
        "TALL": t.tall,
        "NEEDS_D": needs_d,
        "PRECISION": bundle.precision,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }
    launch = PreparedLaunch(_output_backward, (sum(tiles), count), numbers, meta, bundle.kind)
    return launch, OutputParts(tuple(tiles), count)
