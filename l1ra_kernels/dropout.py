"""Dropout that is never stored: the keep mask is a function of a seed and an element's place.

Element (m, k) of x takes number ``k % 4`` of Philox4x32-10 with key ``seed`` and counter ``(k // 4, m, 0, 0)``; it is
kept if that number, unsigned, is at least ``p * 2**32``. So any tile of any kernel finds the same mask, which is
``reference.dropout_mask``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep_mask", "threshold"]


def threshold(p: float) -> int:
    """``p * 2**32`` as a signed number lowered by ``2**31``: what the kernels compare to."""
    return min(int(p * 2**32), 2**32 - 1) - 2**31


@triton.jit
def keep_mask(seed, threshold, o_m, k, BM: tl.constexpr, BK: tl.constexpr):
    """Which elements of the rows ``o_m`` (BM,), columns from ``k`` on, are kept: (BM, BK) bool. ``k`` % 4 = 0."""
    o_q = k // 4 + tl.arange(0, BK // 4)
    row = tl.broadcast_to(o_m.to(tl.uint32)[:, None], (BM, BK // 4))
    quad = tl.broadcast_to(o_q.to(tl.uint32)[None, :], (BM, BK // 4))
    zero = tl.zeros((BM, BK // 4), tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, quad, row, zero, zero)
    # Joined so that flattening the last two dimensions puts the four numbers side by side.
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BM, BK))
    # Unsigned against unsigned, both lowered by 2**31.
    return (bits ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
