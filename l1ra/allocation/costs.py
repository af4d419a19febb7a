"""What the budget is counted in: the price of a rank, and how many an adapter may have."""

from __future__ import annotations

from l1ra.config import L1RAConfig

__all__ = ["check_budget", "rank_cap", "rank_cost"]


def check_budget(budget: object) -> int:
    """``budget`` if it is a positive int.

    Raises:
        TypeError, ValueError: it is not.
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
    """What one rank of a layer costs, in the unit of the budget."""
    return 1 if config.budget_unit == "ranks" else in_features + out_features


def rank_cap(in_features: int, out_features: int, config: L1RAConfig) -> int:
    """The largest rank that an adapter of a layer may have."""
    return min(in_features, out_features, config.max_rank or in_features, config.reserve or in_features)
