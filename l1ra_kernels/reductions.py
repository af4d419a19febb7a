"""Reductions: sum the partial sums of the backward passes, ``Q = s * g * P``, ``dB = s * g * D``, dA and dg.

``reduce_hidden`` reads the partial sums of P ``(tiles, M, R)``, and H (M, R). It writes ``Q = s * g * P`` (M, R), the
gradient of H, and partial sums of dg ``(blocks, R)``: ``s * sum of P * H`` over a block of tokens.
``reduce_rows`` reads partial sums ``(parts, R, N)`` and writes ``out[k] = factor[k] * sum of parts[:, k]``. It computes
dB from D with the factor ``s * g``, and dA with the factor 1. It also sums the partial sums of dg.

Partial sums are added in a fixed order. The results for ranks whose gate is 0 are exactly 0; their partial sums may
be uninitialised memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.launch import launch

__all__ = ["reduce_hidden", "reduce_rows"]

TOKENS = 32  # per program of reduce_hidden, at rank tile 16
FEATURES = 256  # per program of reduce_rows


@triton.jit(do_not_specialize=["tiles", "M", "rank", "scaling"])
def _reduce_hidden(
    p_p,  # (tiles, M, R) float32
    p_h,  # (M, *), its R columns
    p_gate,  # (r,)
    p_q,  # (M, *), its R columns
    p_dg,  # (blocks, R) float32
    tiles,
    M,
    rank,
    s_p,
    s_h,
    s_q,
    scaling,
    R: tl.constexpr,
    BM: tl.constexpr,
    NEEDS_DG: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    b_g = tl.load(p_gate + o_r, mask=o_r < rank, other=0.0).to(tl.float32)
    m_r = b_g != 0
    b_p = tl.zeros((BM, R), tl.float32)
    p_tile = p_p + o_m[:, None] * R + o_r[None, :]
    # If all gates are 0, output_backward has not written P.
    for _ in range(tl.where(tl.max(m_r.to(tl.int32)) > 0, tiles, 0)):
        b_p += tl.load(p_tile, mask=m_m, other=0.0)
        p_tile += s_p
    b_p = tl.where(m_r[None, :], b_p, 0.0)
    b_q = b_p * (scaling * b_g)[None, :]
    tl.store(p_q + o_m[:, None] * s_q + o_r[None, :], b_q.to(p_q.dtype.element_ty), mask=m_m)
    if NEEDS_DG:
        b_h = tl.load(p_h + o_m[:, None] * s_h + o_r[None, :], mask=m_m, other=0.0).to(tl.float32)
        tl.store(p_dg + i_m * R + o_r, scaling * tl.sum(b_p * b_h, 0))


def reduce_hidden(
    p: Tensor, h: Tensor, gate: Tensor, scaling: float, q: Tensor, *, needs_dg: bool = True
) -> Tensor | None:
    """Launch the kernel, which writes Q into ``q``.

    Args:
        p: ``(tiles, M, R)`` from output_backward.
        h, q: ``(M, R)``, this adapter's columns of H and Q.
        gate: ``(r,)``.
        scaling: s.
        needs_dg: whether dg is needed.

    Returns:
        Partial sums of dg ``(blocks, R)`` float32; None if not needed.
    """
    tiles, tokens, width = p.shape
    block = max(8, TOKENS * 16 // width)
    blocks = triton.cdiv(tokens, block)
    dg = p.new_empty(blocks, width) if needs_dg else None
    launch(
        _reduce_hidden,
        (blocks,),
        p,
        h,
        gate,
        q,
        p if dg is None else dg,
        tiles,
        tokens,
        gate.shape[0],
        p.stride(0),
        h.stride(0),
        q.stride(0),
        scaling,
        R=width,
        BM=block,
        NEEDS_DG=needs_dg,
        num_warps=4,
    )
    return dg


@triton.jit(do_not_specialize=["parts", "dg_parts", "rank", "scaling"])
def _reduce_rows(
    p_parts,  # (parts, *, N) float32, its R rows
    p_gate,  # (r,)
    p_dg_parts,  # (dg_parts, R) float32
    p_out,  # (r, N)
    p_dg,  # (r,)
    parts,
    dg_parts,
    N,
    rank,
    s_parts,
    scaling,
    R: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    NEEDS_DG: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_g = tl.load(p_gate + i_r).to(tl.float32)
    b_sum = tl.zeros((BN,), tl.float32)
    if b_g != 0:
        p_part = p_parts + i_r.to(tl.int64) * N + o_n
        for _ in range(parts):
            b_sum += tl.load(p_part, mask=m_n, other=0.0)
            p_part += s_parts
        if GATED:
            b_sum *= scaling * b_g
    tl.store(p_out + i_r.to(tl.int64) * N + o_n, b_sum.to(p_out.dtype.element_ty), mask=m_n)
    if NEEDS_DG:
        if i_n == 0:
            b_dg = tl.zeros((BN,), tl.float32)
            for i in range(0, dg_parts, BN):
                o_i = i + tl.arange(0, BN)
                b_dg += tl.load(p_dg_parts + o_i * R + i_r, mask=o_i < dg_parts, other=0.0)
            tl.store(p_dg + i_r, tl.where(b_g != 0, tl.sum(b_dg, 0), 0.0).to(p_dg.dtype.element_ty))


def reduce_rows(
    parts: Tensor,
    gate: Tensor,
    dtype: torch.dtype,
    *,
    scaling: float | None = None,
    dg_parts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        parts: ``(parts, R, N)`` float32, this adapter's rows.
        gate: ``(r,)``.
        dtype: of the result.
        scaling: s, if the result is multiplied by ``s * gate``; None: the factor is 1.
        dg_parts: ``(blocks, R)`` from reduce_hidden; None if dg is not needed.

    Returns:
        out ``(r, N)`` in ``dtype``, and dg ``(r,)`` in the dtype of the gate; None if not needed.
    """
    count, _, features = parts.shape
    rank = gate.shape[0]
    out = parts.new_empty(rank, features, dtype=dtype)
    dg = None if dg_parts is None else torch.empty_like(gate)
    launch(
        _reduce_rows,
        (triton.cdiv(features, FEATURES), rank),
        parts,
        gate,
        parts if dg_parts is None else dg_parts,
        out,
        out if dg is None else dg,
        count,
        0 if dg_parts is None else dg_parts.shape[0],
        features,
        rank,
        parts.stride(0),
        0.0 if scaling is None else scaling,
        R=1 if dg_parts is None else dg_parts.shape[1],
        BN=FEATURES,
        GATED=scaling is not None,
        NEEDS_DG=dg_parts is not None,
        num_warps=4,
    )
    return out, dg
