"""Which learning rates to try: a climb from the middle of a grid to the best one, as pure functions of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["RATES", "START", "best", "nearest", "next_rates", "start", "validation_loss_of"]

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
START = 2e-3


def start(rates: Iterable[float] = RATES) -> float:
    """The rate of the grid at which a climb begins: the one nearest to ``START``."""
    return nearest(START, rates)


def nearest(value: float, choices: Iterable[float]) -> float:
    """The one of ``choices`` that is nearest to ``value`` as a ratio, the lower of two."""
    return min(sorted(set(choices)), key=lambda choice: abs(math.log(choice / value)))


def next_rates(losses: Mapping[float, float], rates: Iterable[float] = RATES) -> list[float]:
    """The rates that come next, none when the climb is over.

    The rate of the grid nearest to ``START`` and the next higher one come first, then those in the direction of the
    better one, until a loss is no better than the one before or the grid ends. If both diverged, it goes down until one
    does not, and on from there.

    Args:
        losses: rate -> validation loss of the rates that have been tried; infinite where the training diverged.
        rates: the grid.
    """
    grid = sorted(set(rates))
    here = grid.index(start(grid))
    first = [rate for rate in grid[here : here + 2] if rate not in losses]
    if first:
        return first
    step = -1
    if here + 1 < len(grid) and losses[grid[here + 1]] < losses[grid[here]]:
        here, step = here + 1, 1
    while 0 <= here + step < len(grid):
        if grid[here + step] not in losses:
            return [grid[here + step]]
        worse = losses[grid[here + step]] >= losses[grid[here]]
        if worse and math.isfinite(losses[grid[here]]):
            break
        here += step
    return []


def best(losses: Mapping[float, float]) -> float | None:
    """The rate with the least loss, the lowest of several; None if there is none without divergence."""
    finite = [rate for rate in losses if math.isfinite(losses[rate])]
    return min(finite, key=lambda rate: (losses[rate], rate), default=None)


def validation_loss_of(record: dict[str, Any]) -> float:
    """The loss on the validation part; infinite where the training diverged."""
    loss = record["validation_loss"]
    return math.inf if record["diverged"] or loss is None else loss
