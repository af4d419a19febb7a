"""What the kernels know of an adapted layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Layer"]


class Layer(NamedTuple):
    """One adapted layer, ``y = base(x) + s * ((dropout(x) @ A.T) * g) @ B``.

    Attributes:
        a, gate, b: ``(r, K)``, ``(r,)`` and ``(r, N)``, of any floating dtype.
        scaling: s.
        weight, bias: of a dense base, ``(N, K)`` and ``(N,)`` or None.
        output: of any other base, ``(..., N)``, computed already; then weight and bias are None.
        augmented: ``(N, K + room)``, last stride 1, or None: the memory whose first K columns are the weight. What is
            behind them is written at each use.
    """

    a: Tensor
    gate: Tensor
    b: Tensor
    scaling: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    output: Tensor | None = None
    augmented: Tensor | None = None
