"""Expand: ``Y = base + s * (H * g) @ B``, where base is the frozen layer's output, a bias, or 0.

Reads H (M, R), the columns of one adapter, g (r,), B (r, N) and base (M, N) or (N,); writes Y (M, N). Gate and scaling
are multiplied into B in float32 before rounding, as in the reference. If all gates are 0, H and B are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.configs import tile
from l1ra_kernels.launch import launch

__all__ = ["expand"]


@triton.jit(do_not_specialize=["M", "rank", "scaling"])
def _expand(
    p_h,  # (M, *), its R columns
    p_gate,  # (r,)
    p_b,  # (r, N)
    p_base,  # (M, N) with HAS_OUTPUT, (N,) with HAS_BIAS
    p_y,  # (M, N)
    M,
    N,
    rank,
    s_h,
    s_b,
    s_base,
    scaling,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kind = p_y.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, R)
    m_m = o_m < M
    m_n = o_n < N
    m_mn = m_m[:, None] & m_n[None, :]
    b_g = tl.load(p_gate + o_r, mask=o_r < rank, other=0.0).to(tl.float32)
    m_r = b_g != 0
    b_y = tl.zeros((BM, BN), tl.float32)
    if tl.max(m_r.to(tl.int32)) > 0:
        b_h = tl.load(p_h + o_m[:, None] * s_h + o_r[None, :], mask=m_m[:, None], other=0.0)
        b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * s_b + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_c = (b_b.to(tl.float32) * (scaling * b_g)[:, None]).to(kind)
        b_y = tl.dot(b_h, b_c, b_y, input_precision=PRECISION)
    if HAS_OUTPUT:
        b_y += tl.load(p_base + o_m[:, None] * s_base + o_n[None, :], mask=m_mn, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(p_base + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(kind), mask=m_mn)


def expand(
    h: Tensor,
    gate: Tensor,
    b: Tensor,
    scaling: float,
    *,
    output: Tensor | None = None,
    bias: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Launch the kernel.

    Args:
        h: ``(M, R)``, this adapter's columns of H, which shrink has written.
        gate, b: ``(r,)`` and ``(r, N)``, last stride 1.
        scaling: s.
        output: ``(M, N)``, last stride 1: the base. Can't be combined with ``bias``.
        bias: ``(N,)``: the base, added to each row.
        precision: ``input_precision`` of ``tl.dot``, ``"ieee"`` or ``"tf32"``.

    Returns:
        Y ``(M, N)``, contiguous, in the dtype of ``h``.
    """
    tokens, features = h.shape[0], b.shape[1]
    width = h.shape[1]
    y = h.new_empty(tokens, features)
    t = tile("expand", width, h.dtype, h.device)
    base = output if output is not None else bias if bias is not None else h
    launch(
        _expand,
        (triton.cdiv(tokens, t.tokens), triton.cdiv(features, t.features)),
        h,
        gate,
        b,
        base,
        y,
        tokens,
        features,
        b.shape[0],
        h.stride(0),
        b.stride(0),
        output.stride(0) if output is not None else 0,
        scaling,
        R=width,
        BM=t.tokens,
        BN=t.features,
        HAS_OUTPUT=output is not None,
        HAS_BIAS=bias is not None,
        PRECISION=precision,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return y
