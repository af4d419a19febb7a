"""Means, intervals and ratios of errors over seeds: all on the logarithm, since errors differ by factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Spread", "geometric", "paired"]


@dataclass(frozen=True)
class Spread:
    """Geometric mean of ``n`` positive numbers with its 95 % confidence interval; ``low``, ``high`` None for one."""

    mean: float
    low: float | None
    high: float | None
    n: int


def geometric(values: Iterable[float]) -> Spread:
    """Geometric mean, and the t interval of the mean logarithm.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    from scipy.stats import t

    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("a mean needs at least one value.")
    n = len(logs)
    mean = sum(logs) / n
    if n == 1:
        return Spread(math.exp(mean), None, None, 1)
    deviation = math.sqrt(sum((log - mean) ** 2 for log in logs) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Spread(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Spread | None:
    """Ratios of values to others, seed by seed; None if they have no seed in common."""
    ratios = [values[seed] / others[seed] for seed in sorted(set(values) & set(others))]
    return geometric(ratios) if ratios else None
