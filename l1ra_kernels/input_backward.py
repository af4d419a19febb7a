"""Input backward: ``dA_i = Q_i.T @ dropout(x)`` and ``dX = dropout'(sum of Q_i @ A_i)`` in one pass over x.

Reads x (M, K), Q (M, G * R) = s * g * P, which is the gradient of H, and A_i (r_i, K) of the G adapters that share x.
Writes dX (M, K), to which cuBLAS then adds the frozen layers' part (beta = 1), and partial sums of dA
``(splits, G * R, K)`` in float32. A program processes one tile of features for one split of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.configs import split_tokens, tile
from l1ra_kernels.dropout import keep_mask, threshold
from l1ra_kernels.launch import launch

__all__ = ["input_backward"]


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "run", "inverse_keep", "limit"])
def _input_backward(
    p_x,  # (M, K)
    p_q,  # (M, G * R)
    p_as,  # G tensors (r, K)
    p_gates,  # G tensors (r,)
    p_dx,  # (M, K)
    p_da,  # (splits, G * R, K) float32
    p_seed,  # (1,) int64
    M,
    K,
    rank0,  # not in a tuple: Triton would specialise on its numbers, and recompile for the ranks 1 and 16
    rank1,
    rank2,
    run,  # tokens per split
    s_x,
    s_as,
    inverse_keep,
    limit,
    G: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_q.dtype.element_ty
    i_k = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, R)
    m_k = o_k < K
    rows = ()
    sums = ()
    live = 0
    ranks = (rank0, rank1, rank2)
    for i in tl.static_range(G):
        b_g = tl.load(p_gates[i] + o_r, mask=o_r < ranks[i], other=0.0)
        m_r = b_g != 0
        live = tl.maximum(live, tl.max(m_r.to(tl.int32)))
        b_a = tl.load(
            p_as[i] + o_r.to(tl.int64)[:, None] * s_as[i] + o_k[None, :],
            mask=m_r[:, None] & m_k[None, :],
            other=0.0,
        )
        rows = rows + (b_a.to(kind),)
        sums = sums + (tl.zeros((R, BK), tl.float32),)
    if DROPOUT:
        seed = tl.load(p_seed)
    start = i_s * run
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
            tl.store(p_da + (i_s * (G * R) + i * R + o_r[:, None]) * K + o_k[None, :], b_da, mask=m_k[None, :])


def input_backward(
    x: Tensor,
    q: Tensor,
    rows: Sequence[Tensor],
    gates: Sequence[Tensor],
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    needs_dx: bool = True,
    needs_da: bool = True,
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the kernel.

    Args:
        x: ``(M, K)``, last stride 1.
        q: ``(M, G * R)`` contiguous, the gradient of H.
        rows, gates, dropout, seed, precision: as in ``shrink``.
        needs_dx, needs_da: whether dX and dA are needed.

    Returns:
        dX ``(M, K)`` in the dtype of x, and partial sums of dA ``(splits, G * R, K)`` float32; None if not needed.
    """
    tokens, features = x.shape
    t = tile("input_backward", q.shape[1], q.dtype, x.device)
    columns = triton.cdiv(features, t.features)
    run, count = split_tokens(tokens, t.tokens, columns, x.device)
    dx = x.new_empty(tokens, features) if needs_dx else None
    da = x.new_empty(count, q.shape[1], features, dtype=torch.float32) if needs_da else None
    ranks = [a.shape[0] for a in rows] + [0] * (3 - len(rows))
    launch(
        _input_backward,
        (columns, count),
        x,
        q,
        tuple(rows),
        tuple(gates),
        x if dx is None else dx,
        q if da is None else da,
        q if seed is None else seed,
        tokens,
        features,
        *ranks,
        run,
        x.stride(0),
        tuple(a.stride(0) for a in rows),
        1 / (1 - dropout),
        threshold(dropout),
        G=len(rows),
        R=q.shape[1] // len(rows),
        BM=t.tokens,
        BK=t.features,
        DROPOUT=dropout > 0,
        NEEDS_DX=needs_dx,
        NEEDS_DA=needs_da,
        PRECISION=precision,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return dx, da
