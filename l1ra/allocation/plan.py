"""Planning of the next ranks from gates and importance: pure, deterministic functions of plain numbers.

If two adapters are equally entitled to a rank, the first one in order receives it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["LayerPlan", "Plan", "allocate", "ranks_given_back", "ranks_to_prune", "spread_evenly"]


@dataclass(frozen=True)
class LayerPlan:
    """The change of one adapter's rank.

    Attributes:
        keep: the rows that are kept, in ascending order; all other rows are pruned.
        grow: the number of new rows, appended after the kept ones.
    """

    keep: tuple[int, ...]
    grow: int = 0

    @property
    def rank(self) -> int:
        """The rank after the plan."""
        return len(self.keep) + self.grow


@dataclass(frozen=True)
class Plan:
    """The changes of all adapters' ranks.

    Attributes:
        layers: one :class:`LayerPlan` for each adapter, in order.
        spare: the part of the budget that the plan leaves unspent, in the unit of the budget.
    """

    layers: tuple[LayerPlan, ...]
    spare: int

    @property
    def keep(self) -> tuple[tuple[int, ...], ...]:
        """``keep`` of each adapter."""
        return tuple(layer.keep for layer in self.layers)

    @property
    def grow(self) -> tuple[int, ...]:
        """``grow`` of each adapter."""
        return tuple(layer.grow for layer in self.layers)


def spread_evenly(budget: int, costs: Sequence[int], caps: Sequence[int]) -> list[int]:
    """The initial ranks: equal for all adapters as far as the budget and the caps allow.

    A remainder that does not suffice for one more rank for each adapter goes to adapters at even distances.

    Args:
        budget: the largest total cost of all ranks.
        costs: the cost of one rank of each adapter, in the unit of ``budget``.
        caps: the largest rank of each adapter, at least 1.

    Returns:
        The rank of each adapter, at least 1.

    Raises:
        ValueError: the budget is below the cost of one rank for each adapter.
    """
    if budget < sum(costs):
        raise ValueError(
            f"a budget of {budget} is below one rank for each of the {len(costs)} adapters: "
            f"write a budget of at least {sum(costs)}, or name fewer target_modules."
        )
    level, round_cost = 0, sum(costs)  # of the adapters below their caps: their rank so far, and one more rank for each
    for i in sorted(range(len(costs)), key=lambda i: caps[i]):
        rounds = min(budget // round_cost, caps[i] - level)
        budget -= rounds * round_cost
        level += rounds
        if level < caps[i]:
            break
        round_cost -= costs[i]
    ranks = [min(level, cap) for cap in caps]
    growable = [i for i, cap in enumerate(caps) if level < cap]
    # The remainder pays for a part of one more round. Every n-th adapter receives a rank, not the first ones ...
    remainder, credit, passed_over = budget, 0, []
    for i in growable:
        credit += remainder
        if credit >= round_cost and costs[i] <= budget:
            credit -= round_cost
            ranks[i] += 1
            budget -= costs[i]
        else:
            passed_over.append(i)
    # ... and if ranks differ in cost, so do the other adapters for which the rest of the budget suffices.
    for i in passed_over:
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
    """Prune the ranks whose gate is below ``prune_threshold``, and distribute the budget that becomes free.

    Without ``importance`` the plan follows the L1RA paper. If fewer than ``min_rank`` ranks of an adapter survive, the
    pruned ranks with the highest indices are kept. The receivers are sorted by their smallest gate before pruning, in
    descending order, and receive one rank at a time, round-robin.

    With ``importance`` each rank goes to the adapter with the greatest need for it. The need of an adapter is
    ``importance of its least important surviving rank / cost / sqrt((1 + received) * (1 + given_back))``, where
    ``received`` is the number of ranks that it has received in this plan. An adapter with fewer than ``min_rank``
    survivors first receives new ranks in place of the pruned ones, so that no adapter keeps a rank whose gate is 0.
    The adapters that are ``learning`` are served first. What they cannot take goes to the other adapters, and what
    these cannot take to the adapters that have lost a rank in this plan, so that the budget is spent.

    Args:
        gates: for each adapter the gate of each rank, in the order of the rows.
        importance: for each adapter the importance of each rank; None for a rank that is too young to be judged.
        costs: the cost of one rank of each adapter, in the unit of ``budget``.
        budget: the largest total cost of all ranks.
        min_rank: the smallest rank of each adapter.
        caps: the largest rank of each adapter. An adapter above its cap keeps its ranks and receives none.
        prune_threshold: ranks whose gate is strictly below it are pruned.
        exclude_pruned: give no rank to an adapter that loses one in this plan (with ``importance``: only ranks that no
            other adapter can take).
        given_back: for each adapter the result of :func:`ranks_given_back`; None stands for zeros. Only used with
            ``importance``.
        learning: for each adapter whether a new rank would have something to learn; None stands for True. Only used
            with ``importance``.

    Returns:
        The plan. ``plan.spare`` is the part of the budget that no adapter could take.
    """
    keep: list[tuple[int, ...]] = []
    grow = [0] * len(gates)
    receivers = []
    for i, row in enumerate(gates):
        pruned = [k for k, gate in enumerate(row) if gate < prune_threshold]
        kept = [k for k, gate in enumerate(row) if not gate < prune_threshold]
        if not (exclude_pruned and pruned):
            receivers.append(i)
        missing = max(0, min(min_rank, len(row)) - len(kept))
        if missing and importance is None:
            kept = sorted(kept + pruned[-missing:])
        elif missing:
            grow[i] = missing
        keep.append(tuple(kept))
    spare = budget - sum(c * (len(k) + g) for c, k, g in zip(costs, keep, grow, strict=True))

    def fits(i: int) -> bool:
        return costs[i] <= spare and len(keep[i]) + grow[i] < caps[i]

    # Once an adapter can't take a rank, it can't take a later one: each look at an adapter gives it a rank or is the
    # last one.
    if importance is None:
        receivers.sort(key=lambda i: -min(gates[i]))
        while receivers:
            growable, receivers = receivers, []
            for i in growable:
                if fits(i):
                    grow[i] += 1
                    spare -= costs[i]
                    receivers.append(i)
    else:
        weakest = [_weakest(row[k] for k in kept) for row, kept in zip(importance, keep, strict=True)]
        back = given_back or [0] * len(gates)
        learners = [i for i in receivers if learning is None or learning[i]]
        for group in (learners, receivers, range(len(gates))):
            needs = [(-_need(weakest[i], costs[i], back[i], grow[i]), i) for i in group]  # a heap, as below
            heapq.heapify(needs)
            while needs:
                i = needs[0][1]
                if not fits(i):
                    heapq.heappop(needs)
                    continue
                grow[i] += 1
                spare -= costs[i]
                heapq.heapreplace(needs, (-_need(weakest[i], costs[i], back[i], grow[i]), i))
    return Plan(tuple(LayerPlan(k, g) for k, g in zip(keep, grow, strict=True)), spare)


def _weakest(importance: Iterable[float | None]) -> float:
    """The importance of an adapter's least important rank; 0 if no rank can be judged."""
    return min((value for value in importance if value is not None), default=0.0)


def _need(weakest: float, cost: int, given_back: int, received: float = 0) -> float:
    """The need of an adapter for one more rank, see :func:`allocate`. ``weakest`` is that of its surviving ranks."""
    return weakest / cost / math.sqrt((1 + received) * (1 + given_back))


def ranks_given_back(history: Sequence[Sequence[int]]) -> list[int]:
    """For each adapter the number of ranks that it received at a reallocation and lost again at a later one.

    Args:
        history: the ranks of all adapters, in order: at the start and after each reallocation.

    Returns:
        One number for each adapter.

    Raises:
        ValueError: the entries of ``history`` have different lengths.
    """
    found = []
    for ranks in zip(*history, strict=True):
        received = given_back = 0
        for before, after in itertools.pairwise(ranks):
            received += max(0, after - before)
            given_back += min(max(0, before - after), received - given_back)
        found.append(given_back)
    return found


def ranks_to_prune(
    importance: Sequence[Sequence[float | None]],
    costs: Sequence[int],
    *,
    margin: float,
    max_count: int,
    min_rank: int,
    caps: Sequence[int],
    given_back: Sequence[int] | None = None,
    learning: Sequence[bool] | None = None,
) -> list[tuple[int, ...]]:
    """Choose the ranks to be pruned because another adapter needs them more.

    The candidates are visited in the order of their importance per cost, the least important first. A candidate is
    chosen if its importance per cost is below ``margin`` times the need of the neediest adapter (see :func:`allocate`),
    which then counts as having received it. The search ends at the first candidate that is not below this bound. An
    adapter that receives ranks gives none, and an adapter that gives ranks receives none. An adapter that is not
    ``learning`` receives none.

    Args:
        importance: for each adapter the importance of each rank; None for a rank that is too young to be judged, which
            is never chosen.
        costs: the cost of one rank of each adapter.
        margin: from 0 (no rank is chosen) to 1 (any rank that is less important than a need elsewhere).
        max_count: the largest number of ranks to choose.
        min_rank: the smallest rank of each adapter.
        caps: the largest rank of each adapter.
        given_back, learning: as in :func:`allocate`.

    Returns:
        For each adapter the rows to be pruned, in ascending order.
    """
    back = given_back or [0] * len(costs)
    learners = [i for i in range(len(costs)) if learning is None or learning[i]]
    weakest = [_weakest(row) for row in importance]
    needs = [(-_need(weakest[i], costs[i], back[i]), i) for i in learners]  # a heap, the neediest adapter first
    heapq.heapify(needs)
    received = [0.0] * len(costs)  # in ranks of the receiving adapter
    chosen: list[list[int]] = [[] for _ in costs]

    def receives_none(i: int) -> bool:
        return bool(chosen[i]) or len(importance[i]) + received[i] >= caps[i]

    candidates = sorted(
        (value / costs[i], i, k) for i, row in enumerate(importance) for k, value in enumerate(row) if value is not None
    )
    for value, i, k in candidates:
        while needs and receives_none(needs[0][1]):
            heapq.heappop(needs)
        if not needs or max_count <= 0 or not value < margin * -needs[0][0]:
            break
        if received[i] or len(importance[i]) - len(chosen[i]) <= min_rank:
            continue
        receiver = needs[0][1]
        chosen[i].append(k)
        max_count -= 1
        received[receiver] += costs[i] / costs[receiver]
        need = _need(weakest[receiver], costs[receiver], back[receiver], received[receiver])
        heapq.heapreplace(needs, (-need, receiver))
    return [tuple(sorted(rows)) for rows in chosen]
