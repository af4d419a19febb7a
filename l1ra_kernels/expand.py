"""Expand: ``Y_i = base_i + s_i * (H_i * g_i) @ B_i``, where base is the frozen layer's output, a bias, or 0.

Reads the parts of H ``(parts, M, G * R)``, g_i (r_i,), B_i (r_i, N_i) and base_i (M, N_i) or (N_i,) of G adapters;
writes Y_i (M, N_i). Gate and scaling are multiplied into B in float32 before rounding, as in the reference. If all
gates of an adapter are 0, its B is not read. With STORE_H, the sum of the parts is also written, H (M, G * R), which
the backward reads.

A program computes several tiles of features of one adapter, for one tile of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.configs import splits, tile
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.pick import pick

__all__ = ["BIAS", "NOTHING", "OUTPUT", "expand", "sum_parts"]

# What an adapter's output is added to. LEFT: to what the pieces of the same layer before it have left in Y.
NOTHING, OUTPUT, BIAS, LEFT = 0, 1, 2, 3


@triton.jit
def sum_parts(p_part, parts, s_part, left, kind: tl.constexpr, BM: tl.constexpr, R: tl.constexpr):
    """H of one adapter (BM, R), rounded to ``kind``: the sum of its parts, in their order.

    ``left`` is the number of rows to be read. Several parts are loaded together, so that their latencies overlap: as
    many as there are registers for.
    """
    TOGETHER: tl.constexpr = 64 // R if R < 64 else 1
    o_m = tl.arange(0, BM)
    b_h = tl.zeros((BM, R), tl.float32)
    for part in range(0, parts, TOGETHER):
        for k in tl.static_range(TOGETHER):
            m_part = o_m < tl.where(part + k < parts, left, 0)
            b_h += tl.load(p_part + k * s_part, mask=m_part[:, None], other=0.0)
        p_part += TOGETHER * s_part
    return b_h.to(kind)


@triton.jit(
    do_not_specialize=["M", "rank0", "rank1", "rank2", "scaling0", "scaling1", "scaling2", "parts", "run"]
    + ["base0", "base1", "base2"]
)
def _expand(
    p_parts,  # (parts, M, G * R) float32
    p_gate0,  # (r_i,)
    p_gate1,
    p_gate2,
    p_b0,  # (r_i, N_i)
    p_b1,
    p_b2,
    p_base0,  # (M, N_i) or (N_i,)
    p_base1,
    p_base2,
    p_y0,  # (M, N_i)
    p_y1,
    p_y2,
    p_h,  # (M, G * R)
    M,
    N0,
    N1,
    N2,
    s_base0,
    s_base1,
    s_base2,
    rank0,
    rank1,
    rank2,
    scaling0,
    scaling1,
    scaling2,
    base0,  # 0: nothing, 1: (M, N_i), 2: (N_i,)
    base1,
    base2,
    parts,
    run,  # tiles of features per program
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_y0.dtype.element_ty
    i_run = tl.program_id(1)
    runs0 = tl.cdiv(tl.cdiv(N0, BN), run)
    runs1 = runs0 + tl.cdiv(tl.cdiv(N1, BN), run)
    i = (i_run >= runs0).to(tl.int32) + (i_run >= runs1).to(tl.int32)
    i_run -= pick(i, 0, runs0, runs1, G)
    N = pick(i, N0, N1, N2, G)
    p_gate = pick(i, p_gate0, p_gate1, p_gate2, G)
    p_b = pick(i, p_b0, p_b1, p_b2, G)
    p_base = pick(i, p_base0, p_base1, p_base2, G)
    p_y = pick(i, p_y0, p_y1, p_y2, G)
    s_base = pick(i, s_base0, s_base1, s_base2, G)
    base = pick(i, base0, base1, base2, G)

    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    m_m = o_m < M
    o_h = o_m[:, None] * (G * R) + i * R + o_r[None, :]
    b_h = sum_parts(p_parts + o_h, parts, M.to(tl.int64) * (G * R), M - tl.program_id(0) * BM, kind, BM, R)
    if STORE_H:
        if i_run == 0:
            tl.store(p_h + o_h, b_h, mask=m_m[:, None])
    b_g = tl.load(p_gate + o_r, mask=o_r < pick(i, rank0, rank1, rank2, G), other=0.0).to(tl.float32)
    m_r = b_g != 0
    # Where all gates are 0, H may hold NaN.
    b_h = tl.where(tl.max(m_r.to(tl.int32)) > 0, b_h, 0.0).to(kind)
    b_factor = (pick(i, scaling0, scaling1, scaling2, G) * b_g)[:, None]
    start = i_run * run * BN
    for n in range(start, tl.minimum(start + run * BN, N), BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        m_mn = m_m[:, None] & m_n[None, :]
        b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * N + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_c = (b_b.to(tl.float32) * b_factor).to(kind)
        b_y = tl.dot(b_h, b_c, input_precision=PRECISION)
        if HAS_OUTPUT:
            m_base = m_m[:, None] & (o_n < tl.where(base == 1, N, 0))[None, :]
            b_y += tl.load(p_base + o_m[:, None] * s_base + o_n[None, :], mask=m_base, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_y += tl.load(p_base + o_n, mask=o_n < tl.where(base == 2, N, 0), other=0.0).to(tl.float32)[None, :]
        tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(kind), mask=m_mn)


def expand(
    bundle: Bundle, parts: int, bases: Sequence[int], base_strides: Sequence[int], used: Sequence[bool]
) -> PreparedLaunch:
    """The launch for a bundle.

    The launch takes the tensors ``parts, gate0, gate1, gate2, b0, b1, b2, base0, base1, base2, y0, y1, y2, h``. All are
    contiguous, except that the rows of a base may lie apart. Bases, Y and H are in the dtype of the products.

    Args:
        parts: the number of parts of H.
        bases: what each adapter's output is added to: ``NOTHING``, ``OUTPUT``, ``BIAS`` or ``LEFT``.
        base_strides: from one row of each base to the next.
        used: the adapters whose output is computed. If it is that of all of them, H is written too.
    """
    t = tile("expand", bundle.width, bundle.dtype, bundle.device)
    rows = -(-bundle.tokens // t.tokens)
    columns = bundle.columns_of(t.features, used)
    run, _ = splits(sum(columns), rows, bundle.device, resident=t.blocks)
    numbers = (
        bundle.tokens,
        *three([n if use else 0 for n, use in zip(bundle.outputs, used, strict=True)], 0),
        *three(base_strides),
        *three(bundle.ranks),
        *three(bundle.scalings),
        *three([OUTPUT if base == LEFT else base for base in bases]),
        *(parts, run),
    )
    meta = {
        "G": bundle.adapters,
        "R": bundle.width,
        "BM": t.tokens,
        "BN": t.features,
        "HAS_OUTPUT": OUTPUT in bases or LEFT in bases,
        "HAS_BIAS": BIAS in bases,
        "STORE_H": all(used),
        "PRECISION": bundle.precision,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }
    return PreparedLaunch(_expand, (rows, sum(-(-n // run) for n in columns)), numbers, meta, bundle.kind)
