"""Augment: write ``C.T`` behind the columns of the weight W, so that one matrix product computes base and adapter.

    y = [x | H] @ [W | C.T].T,   C = s * g * B

Reads g (r,) and B (r, N); writes the columns behind W in ``[W | C.T]`` (N, K + columns). The weight is stored as the
first K columns of a wider tensor, which has memory for C.T; the shrink kernel writes ``[x | H]``. H may also contain
columns of other layers that share the input x. In the columns of these layers, zeros are written behind this layer's
weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.launch import launch

__all__ = ["write_behind"]

FEATURES = 64  # rows of the weight per program


@triton.jit(do_not_specialize=["rank", "column", "scaling"])
def _write_behind(
    p_padding,  # (N, *), the columns behind the weight
    p_gate,  # (r,)
    p_b,  # (r, N)
    N,
    rank,
    column,
    s_padding,
    s_b,
    scaling,
    COLUMNS: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.arange(0, BC)
    o_r = o_c - column
    m_n = o_n < N
    m_mine = (o_r >= 0) & (o_r < rank)
    b_g = tl.load(p_gate + o_r, mask=m_mine, other=0.0).to(tl.float32)
    m_r = b_g != 0
    b_b = tl.load(p_b + o_r.to(tl.int64)[:, None] * s_b + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
    b_c = (b_b.to(tl.float32) * (scaling * b_g)[:, None]).to(p_padding.dtype.element_ty)
    m_c = o_c < COLUMNS
    tl.store(p_padding + o_n[:, None] * s_padding + o_c[None, :], tl.trans(b_c), mask=m_n[:, None] & m_c[None, :])


def write_behind(padding: Tensor, column: int, gate: Tensor, b: Tensor, scaling: float) -> None:
    """Write C.T into ``padding``, starting at ``column``, and zeros into the other columns.

    Args:
        padding: ``(N, columns)``, last stride 1: the columns behind the weight.
        column: the first of this layer's columns in H.
        gate, b: ``(r,)`` and ``(r, N)``, last stride 1.
        scaling: s.
    """
    features, columns = padding.shape
    launch(
        _write_behind,
        (triton.cdiv(features, FEATURES),),
        padding,
        gate,
        b,
        features,
        b.shape[0],
        column,
        padding.stride(0),
        b.stride(0),
        scaling,
        COLUMNS=columns,
        BC=triton.next_power_of_2(columns),
        BN=FEATURES,
        num_warps=8,
    )
