"""Dropout without a stored mask: the mask is computed from a seed and the position of each element.

Element (m, k) of x uses number ``k % 4`` of Philox4x32-10 with key ``seed`` and counter ``(k // 4, m, 0, 0)``. It is
kept if that unsigned number is at least ``p * 2**32``. So every kernel computes the same mask, whatever its tile sizes.
``reference.dropout_mask`` computes it in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep_mask", "threshold"]


def threshold(p: float) -> int:
    """``p * 2**32 - 2**31``, the signed threshold with which :func:`keep_mask` compares."""
    return min(int(p * 2**32), 2**32 - 1) - 2**31


@triton.jit
def keep_mask(seed, threshold, o_m, k, BM: tl.constexpr, BK: tl.constexpr):
    """The mask (BM, BK), bool, of the elements that are kept, for rows ``o_m`` (BM,) and the BK columns from ``k`` on.

    ``k`` must be a multiple of 4. ``threshold`` is from :func:`threshold`.
    """
    o_q = k // 4 + tl.arange(0, BK // 4)
    row = tl.broadcast_to(o_m.to(tl.uint32)[:, None], (BM, BK // 4))
    quad = tl.broadcast_to(o_q.to(tl.uint32)[None, :], (BM, BK // 4))
    zero = tl.zeros((BM, BK // 4), tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, quad, row, zero, zero)
    # Joined in this order, flattening the last dimensions puts the four numbers of a counter side by side.
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BM, BK))
    # An unsigned comparison: both sides are shifted by -2**31 and compared as signed numbers.
    return (bits ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
