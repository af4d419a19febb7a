"""The unit of the rank budget: the cost of one rank, and the largest rank of an adapter."""

from __future__ import annotations

import math
from collections.abc import Collection

from l1ra.config import L1RAConfig

__all__ = ["check_budget", "rank_cap", "rank_cost", "rows_to_reserve"]

RESERVE_FACTOR = 4


def check_budget(budget: object) -> int:
    """Return ``budget`` if it is a positive int.

    Raises:
        TypeError: ``budget`` is not an int.
        ValueError: ``budget`` is below 1.
    """
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise TypeError(
            f"budget must be an int, the sum of all adapters' ranks (or parameters), not {budget!r}: "
            "for 8 ranks an adapter write 8 * number_of_adapters."
        )
    if budget < 1:
        raise ValueError(f"budget must be positive, not {budget}.")
    return budget


def rank_cost(in_features: int, out_features: int, config: L1RAConfig) -> int:
    """The cost of one rank of a layer, in ``config.budget_unit``: 1, or the number of parameters in A and B."""
    return 1 if config.budget_unit == "ranks" else in_features + out_features


def rank_cap(in_features: int, out_features: int, config: L1RAConfig) -> int:
    """The largest rank that the adapter of a layer may have.

    It is the largest possible rank of the weight, further limited by ``max_rank`` and ``reserve`` of ``config``.
    """
    return min(in_features, out_features, config.max_rank or in_features, config.reserve or in_features)


def rows_to_reserve(ranks: Collection[int], config: L1RAConfig) -> int:
    """How many rows adapters of these ranks should have where their shapes must stay: four times the mean rank."""
    rows = max(max(ranks), RESERVE_FACTOR * math.ceil(sum(ranks) / len(ranks)))
    return min(rows, config.max_rank or rows)
