"""Means with confidence intervals, and percentiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CONFIDENCE", "Interval", "geometric_interval", "ratios", "spread", "t_interval"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values and its 95 % confidence interval, which is None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width."""
        return None if self.low is None else (self.high - self.low) / 2


def t_interval(values: Iterable[float]) -> Interval:
    """Mean, and Student's t interval.

    Raises:
        ValueError: no values.
    """
    found = list(values)
    if not found:
        raise ValueError("a mean needs at least one value.")
    mean = statistics.fmean(found)
    if len(found) == 1:
        return Interval(mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half, len(found))


def geometric_interval(values: Iterable[float]) -> Interval:
    """Geometric mean, and the t interval of the mean logarithm.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    found = t_interval(math.log(value) for value in values)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, found.count)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of values."""
    p20, median, p80 = (float(v) for v in np.percentile(np.asarray(values, dtype=float), [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80, "n": len(values)}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Spread of the percentages by which ``values`` are above ``base``, pair by pair."""
    return spread([100 * (v / b - 1) for v, b in zip(values, base, strict=True)])
