"""Shrink: ``H_i = dropout(x) @ A_i.T`` in one pass over x, for one to three adapters that share the input x.

Reads x (M, K), A_i (r_i, K) and g_i (r_i,) of G adapters; writes H (M, G * R), R the rank tile. Adapter i has the R
columns from i * R on, with zeros beyond its rank. Rows of A whose gate is 0 are not read. If all gates are 0, x is not
read. With AUGMENT, ``[x | H]`` (M, K + G * R) is also written, for the product with ``[W | C.T]``; see augment.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.configs import tile
from l1ra_kernels.dropout import keep_mask, threshold
from l1ra_kernels.launch import launch

__all__ = ["shrink"]


@triton.jit(do_not_specialize=["M", "rank0", "rank1", "rank2", "inverse_keep", "limit"])
def _shrink(
    p_x,  # (M, K)
    p_as,  # G tensors (r, K)
    p_gates,  # G tensors (r,)
    p_h,  # (M, *), its G * R columns
    p_out,  # (M, K + G * R)
    p_seed,  # (1,) int64
    M,
    K,
    rank0,  # not in a tuple: Triton would specialise on its numbers, and recompile for the ranks 1 and 16
    rank1,
    rank2,
    s_x,
    s_as,
    s_h,
    s_out,
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
    kind = p_h.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    gates = ()
    b_hs = ()
    any_live = 0
    ranks = (rank0, rank1, rank2)
    for i in tl.static_range(G):
        b_g = tl.load(p_gates[i] + o_r, mask=o_r < ranks[i], other=0.0).to(tl.float32)
        gates = gates + (b_g,)
        b_hs = b_hs + (tl.zeros((BM, R), tl.float32),)
        any_live = tl.maximum(any_live, tl.max((b_g != 0).to(tl.int32)))
    if DROPOUT:
        seed = tl.load(p_seed)
    end = K if AUGMENT else tl.where(any_live > 0, K, 0)
    for k in range(0, end, BK):
        m_k = k + o_k < K
        b_x = tl.load(p_x + o_m[:, None] * s_x + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if AUGMENT:
            tl.store(p_out + o_m[:, None] * s_out + (k + o_k)[None, :], b_x, mask=m_m[:, None] & m_k[None, :])
        if DROPOUT:
            b_x = tl.where(keep_mask(seed, limit, o_m, k, BM, BK), b_x, 0.0)
        b_x = b_x.to(kind)
        sums = ()
        for i in tl.static_range(G):
            m_r = gates[i] != 0
            b_a = tl.load(
                p_as[i] + o_r.to(tl.int64)[:, None] * s_as[i] + (k + o_k)[None, :],
                mask=m_r[:, None] & m_k[None, :],
                other=0.0,
            )
            sums = sums + (tl.dot(b_x, tl.trans(b_a.to(kind)), b_hs[i], input_precision=PRECISION),)
        b_hs = sums
    for i in tl.static_range(G):
        b_h = b_hs[i]
        if DROPOUT:
            b_h *= inverse_keep
        b_h = b_h.to(kind)
        tl.store(p_h + o_m[:, None] * s_h + i * R + o_r[None, :], b_h, mask=m_m[:, None])
        if AUGMENT:
            tl.store(p_out + o_m[:, None] * s_out + K + i * R + o_r[None, :], b_h, mask=m_m[:, None])


def shrink(
    x: Tensor,
    rows: Sequence[Tensor],
    gates: Sequence[Tensor],
    h: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    augmented: Tensor | None = None,
    precision: str = "ieee",
) -> None:
    """Launch the kernel, which writes H into ``h``.

    Args:
        x: ``(M, K)``, last stride 1, any floating dtype.
        rows: A of each adapter, ``(r, K)``, last stride 1.
        gates: the gate of each adapter, ``(r,)``.
        h: ``(M, G * R)``, last stride 1. Its dtype is the dtype of the products.
        dropout: probability that an element of x is dropped.
        seed: int64 ``(1,)`` on the device of x. Read only if ``dropout`` > 0.
        augmented: ``(M, K + G * R)``, last stride 1, in the dtype of x, into which ``[x | H]`` is written; None: it is
            not written.
        precision: ``input_precision`` of ``tl.dot``, ``"ieee"`` or ``"tf32"``.
    """
    tokens, features = x.shape
    t = tile("shrink", h.shape[1], h.dtype, x.device)
    ranks = [a.shape[0] for a in rows] + [0] * (3 - len(rows))
    launch(
        _shrink,
        (triton.cdiv(tokens, t.tokens),),
        x,
        tuple(rows),
        tuple(gates),
        h,
        h if augmented is None else augmented,
        h if seed is None else seed,
        tokens,
        features,
        *ranks,
        x.stride(0),
        tuple(a.stride(0) for a in rows),
        h.stride(0),
        0 if augmented is None else augmented.stride(0),
        1 / (1 - dropout),
        threshold(dropout),
        G=len(rows),
        R=h.shape[1] // len(rows),
        BM=t.tokens,
        BK=t.features,
        DROPOUT=dropout > 0,
        AUGMENT=augmented is not None,
        PRECISION=precision,
        num_warps=t.warps,
        num_stages=t.stages,
    )
