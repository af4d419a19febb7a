"""The tensors of an adapted layer, as the kernels receive them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Layer"]


class Layer(NamedTuple):
    """One adapted layer, ``y = base(x) + s * ((dropout(x) @ A.T) * g) @ B``.

    Attributes:
        a, gate, b: ``(r, K)``, ``(r,)`` and ``(r, N)``, of any floating dtype.
        scaling: s.
        weight, bias: ``(N, K)`` and ``(N,)`` or None, of a base layer whose product is computed by this package.
        output: ``(..., N)``, the output of a base layer that was computed by its own forward. Then weight and bias are
            None.
        augmented: ``(N, K + padding)``, last stride 1, or None: a tensor whose first K columns are the weight. The
            columns behind it are overwritten in each forward.
    """

    a: Tensor
    gate: Tensor
    b: Tensor
    scaling: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    output: Tensor | None = None
    augmented: Tensor | None = None
