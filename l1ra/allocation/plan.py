"""From a snapshot of the gates to the next ranks: pure functions of plain numbers.

Nothing here knows of modules or tensors, and nothing is changed: a :class:`Plan` comes out. Deterministic; ties go
to the adapter that comes first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LayerPlan", "Plan", "allocate", "ranks_given_back", "spread", "surplus"]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one adapter: rows ``keep`` stay, in order, and ``grow`` new ones are appended."""

    keep: tuple[int, ...]
    grow: int = 0

    @property
    def rank(self) -> int:
        """The rank after the plan."""
        return len(self.keep) + self.grow


@dataclass(frozen=True)
class Plan:
    """One :class:`LayerPlan` an adapter, and what it leaves of the budget (in the budget's unit)."""

    layers: tuple[LayerPlan, ...]
    spare: int

    @property
    def keep(self) -> tuple[tuple[int, ...], ...]:
        return tuple(layer.keep for layer in self.layers)

    @property
    def grow(self) -> tuple[int, ...]:
        return tuple(layer.grow for layer in self.layers)


def spread(budget: int, costs: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Initial ranks: the same for every adapter as far as the budget and the caps go, a remainder spread evenly.

    Args:
        budget: what all ranks together may cost.
        costs: the cost of one rank of each adapter, in the unit of ``budget``.
        caps: the largest rank of each adapter, at least 1.

    Raises:
        ValueError: the budget does not buy one rank an adapter.
    """
    if budget < sum(costs):
        raise ValueError(
            f"a budget of {budget} is below one rank for each of the {len(costs)} adapters: "
            f"write a budget of at least {sum(costs)}, or name fewer target_modules."
        )
    ranks = [0] * len(costs)
    while True:
        open_ = [i for i, cap in enumerate(caps) if ranks[i] < cap]
        price = sum(costs[i] for i in open_)
        if not open_ or price > budget:
            break
        rounds = min(budget // price, min(caps[i] - ranks[i] for i in open_))
        for i in open_:
            ranks[i] += rounds
        budget -= rounds * price
    # The remainder buys a share of one more round: every n-th adapter, not the first ones ...
    remainder, credit, passed = budget, 0, []
    for i in open_:
        credit += remainder
        if credit >= price and costs[i] <= budget:
            credit -= price
            ranks[i] += 1
            budget -= costs[i]
        else:
            passed.append(i)
    # ... and where ranks differ in cost, whatever still fits.
    for i in passed:
        if costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return ranks


def allocate(
    gates: Sequence[Sequence[float]],
    importance: Sequence[Sequence[float | None]] | None,
    costs: Sequence[int],
    budget: int,
    *,
    min_rank: int,
    caps: Sequence[int],
    prune_threshold: float,
    exclude_pruned: bool = True,
    given_back: Sequence[int] | None = None,
    learning: Sequence[bool] | None = None,
) -> Plan:
    """Cut the ranks whose gate is strictly below ``prune_threshold`` and hand out what the budget then leaves.

    Without ``importance``, the paper's way: if fewer than ``min_rank`` ranks survive, the ones with the highest index
    stay; receivers are ordered by their smallest gate before pruning, largest first, and dealt one rank at a time,
    round-robin. With ``importance``, a rank goes each time to the adapter that needs it most: whose least important
    surviving rank is the most important per cost, divided by the root of one more than what that adapter already got,
    and by that of one more than what it has given back of what was dealt to it before; an adapter with fewer than
    ``min_rank`` survivors gets new ranks in their place, so that none is left with a dead one. What no adapter that is
    ``learning`` can take goes to the others, and then to those that have just had a rank cut: so the budget is spent.

    Args:
        gates: for each adapter the gate of each rank, in row order.
        importance: for each adapter the importance of each rank, None where a rank is too young to be judged.
        costs: the cost of one rank of each adapter, in the unit of ``budget``.
        budget: what all ranks together may cost.
        min_rank: ranks that every adapter keeps.
        caps: the largest rank of each adapter; one that is above its cap keeps what it has and gets nothing.
        exclude_pruned: an adapter that has just had a rank cut gets none (with ``importance``: none that another can
            take).
        given_back: for each adapter what :func:`ranks_given_back` counts; None: nothing. Only with ``importance``.
        learning: for each adapter whether a new rank would have something to learn; None: all of them. Only with
            ``importance``.

    Returns:
        The plan; ``plan.spare`` is what nobody could take.
    """
    keep: list[tuple[int, ...]] = []
    grow = [0] * len(gates)
    had_ranks_pruned = []
    for i, row in enumerate(gates):
        low = [k for k, gate in enumerate(row) if gate < prune_threshold]
        alive = sorted(set(range(len(row))) - set(low))
        had_ranks_pruned.append(bool(low))
        missing = max(0, min(min_rank, len(row)) - len(alive))
        if missing and importance is None:
            alive = sorted(alive + low[-missing:])
        elif missing:
            grow[i] = missing
        keep.append(tuple(alive))
    spare = budget - sum(c * (len(k) + g) for c, k, g in zip(costs, keep, grow, strict=True))

    def fits(i: int) -> bool:
        return costs[i] <= spare and len(keep[i]) + grow[i] < caps[i]

    receivers = [i for i in range(len(gates)) if not (exclude_pruned and had_ranks_pruned[i])]
    if importance is None:
        receivers.sort(key=lambda i: -min(gates[i]))
        while any(fits(i) for i in receivers):
            for i in receivers:
                if fits(i):
                    grow[i] += 1
                    spare -= costs[i]
    else:
        kept = [[row[k] for k in alive] for row, alive in zip(importance, keep, strict=True)]
        back = given_back or [0] * len(gates)
        learners = [i for i in receivers if learning is None or learning[i]]
        groups = (learners, receivers, range(len(gates)))
        while open_ := next(filter(None, ([i for i in group if fits(i)] for group in groups)), []):
            best = max(open_, key=lambda i: (_need(kept[i], costs[i], back[i], grow[i]), -i))
            grow[best] += 1
            spare -= costs[best]
    return Plan(tuple(LayerPlan(k, g) for k, g in zip(keep, grow, strict=True)), spare)


def _need(importance: Sequence[float | None], cost: int, back: int, got: float = 0) -> float:
    """What one more rank is worth per cost to an adapter with these ranks that has ``got`` so many already, and gave so
    many ``back`` before."""
    weakest = min((value for value in importance if value is not None), default=0.0)
    return weakest / cost / math.sqrt((1 + got) * (1 + back))


def ranks_given_back(history: Sequence[Sequence[int]]) -> list[int]:
    """How many of the ranks that it was dealt each adapter has had cut again.

    Args:
        history: the ranks of all adapters, in order, at the start and after each reallocation.

    Returns:
        One number for each adapter.

    Raises:
        ValueError: not always the same number of adapters.
    """
    found = []
    for ranks in zip(*history, strict=True):
        dealt = back = 0
        for before, after in itertools.pairwise(ranks):
            dealt += max(0, after - before)
            back += min(max(0, before - after), dealt - back)
        found.append(back)
    return found


def surplus(
    importance: Sequence[Sequence[float | None]],
    costs: Sequence[int],
    *,
    margin: float,
    most: int,
    min_rank: int,
    caps: Sequence[int],
    given_back: Sequence[int] | None = None,
    learning: Sequence[bool] | None = None,
) -> list[tuple[int, ...]]:
    """The ranks that are worth more elsewhere.

    The least important rank per cost comes first. It is given up if its importance is below ``margin`` times the need
    of the neediest adapter, and counts as given to that one; need is what :func:`allocate` takes for it. The first
    rank that is not given up ends the search. Who receives gives nothing, and who gives receives nothing. Who is not
    ``learning`` needs nothing.

    Args:
        importance: for each adapter the importance of each rank, None where a rank is too young to be judged: it stays.
        costs: the cost of one rank of each adapter.
        margin: from 0, nothing is given up, to 1, whatever is less important than a need elsewhere.
        most: no more ranks than this.
        min_rank: ranks that every adapter keeps.
        caps: the largest rank of each adapter.
        given_back, learning: as for :func:`allocate`.

    Returns:
        For each adapter the rows to be given up, in order.
    """
    back = given_back or [0] * len(costs)
    learners = [i for i in range(len(costs)) if learning is None or learning[i]]
    needy = [(-_need(importance[i], costs[i], back[i]), i) for i in learners]
    heapq.heapify(needy)
    got = [0.0] * len(costs)
    chosen: list[list[int]] = [[] for _ in costs]
    offers = sorted(
        (value / costs[i], i, k) for i, row in enumerate(importance) for k, value in enumerate(row) if value is not None
    )
    left = most
    for value, i, k in offers:
        while needy and (chosen[needy[0][1]] or len(importance[needy[0][1]]) + got[needy[0][1]] >= caps[needy[0][1]]):
            heapq.heappop(needy)
        if not needy or left <= 0 or not value < margin * -needy[0][0]:
            break
        if got[i] or len(importance[i]) - len(chosen[i]) <= min_rank:
            continue
        taker = needy[0][1]
        chosen[i].append(k)
        left -= 1
        got[taker] += costs[i] / costs[taker]
        heapq.heapreplace(needy, (-_need(importance[taker], costs[taker], back[taker], got[taker]), taker))
    return [tuple(sorted(rows)) for rows in chosen]
