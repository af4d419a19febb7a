"""Selection among the adapters of a bundle within a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pick"]


@triton.jit
def pick(i, first, second, third, G: tl.constexpr):
    """The value for adapter ``i`` of the ``G`` <= 3 adapters of a bundle. The values are pointers or numbers.

    Selecting keeps the known divisibility of pointers and numbers, so loads stay vectorised.
    """
    if G > 1:
        first = tl.where(i == 1, second, first)
    if G > 2:
        first = tl.where(i == 2, third, first)
    return first
