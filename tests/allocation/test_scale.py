"""What planning costs as the number of adapters grows; its plans are those of a search through all adapters."""

import math
import random

import pytest

from l1ra.allocation.plan import LayerPlan, allocate, ranks_given_back, ranks_to_prune, spread_evenly


def plan_by_search(
    gates, importance, costs, budget, *, min_rank, caps, prune_threshold, exclude_pruned, given_back, learning
):
    """``allocate`` as its docstring says it: each rank after a look at every adapter."""
    pruned = [[k for k, gate in enumerate(row) if gate < prune_threshold] for row in gates]
    keep = [[k for k in range(len(row)) if k not in gone] for row, gone in zip(gates, pruned, strict=True)]
    grow = [0] * len(gates)
    for i, row in enumerate(gates):
        missing = max(0, min(min_rank, len(row)) - len(keep[i]))
        if missing and importance is None:
            keep[i] = sorted(keep[i] + pruned[i][-missing:])
        elif missing:
            grow[i] = missing
    spare = budget - sum(c * (len(k) + g) for c, k, g in zip(costs, keep, grow, strict=True))
    receivers = [i for i in range(len(gates)) if not (exclude_pruned and pruned[i])]

    def fits(i):
        return costs[i] <= spare and len(keep[i]) + grow[i] < caps[i]

    def need(i):
        judged = [importance[i][k] for k in keep[i] if importance[i][k] is not None]
        back = given_back[i] if given_back else 0
        return min(judged, default=0.0) / costs[i] / math.sqrt((1 + grow[i]) * (1 + back))

    if importance is None:
        receivers.sort(key=lambda i: -min(gates[i]))
        while any(map(fits, receivers)):
            for i in receivers:
                if fits(i):
                    grow[i] += 1
                    spare -= costs[i]
    else:
        learners = [i for i in receivers if learning is None or learning[i]]
        groups = (learners, receivers, range(len(gates)))
        while growable := next(filter(None, ([i for i in group if fits(i)] for group in groups)), []):
            neediest = max(growable, key=lambda i: (need(i), -i))
            grow[neediest] += 1
            spare -= costs[neediest]
    return [LayerPlan(tuple(k), g) for k, g in zip(keep, grow, strict=True)], spare


def some_case(seed, judged):
    """Random adapters, of which many are alike, so that there are ties."""
    rng = random.Random(seed)
    n = rng.randint(1, 12)
    ranks = [rng.randint(1, 6) for _ in range(n)]
    gates = [[rng.choice([0.0, 0.0, 1.0, rng.random()]) for _ in range(r)] for r in ranks]
    importance = [[rng.choice([None, 0.0, 0.5, 0.5, rng.random()]) for _ in range(r)] for r in ranks]
    costs = [rng.choice([1, 1, rng.randint(1, 12)]) for _ in range(n)]
    spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
    settings = {
        "min_rank": rng.randint(1, 3),
        "caps": [rng.randint(max(1, r - 1), 3 * r + 3) for r in ranks],
        "prune_threshold": rng.choice([1e-10, 0.3]),
        "exclude_pruned": rng.random() < 0.5,
        "given_back": rng.choice([None, [rng.choice([0, 0, 1, 3]) for _ in range(n)]]),
        "learning": rng.choice([None, [rng.random() < 0.6 for _ in range(n)]]),
    }
    return (gates, importance if judged else None, costs, spent + rng.choice([0, rng.randint(0, 40)])), settings


@pytest.mark.parametrize("judged", [True, False])
def test_plans_are_those_of_a_search_through_all_adapters(judged):
    for seed in range(600):
        args, settings = some_case(seed, judged)
        layers, spare = plan_by_search(*args, **settings)
        plan = allocate(*args, **settings)
        assert (list(plan.layers), plan.spare) == (layers, spare), seed


class Counted(list):
    """A list that counts how often an element is read by its number."""

    reads = 0

    def __getitem__(self, i):
        Counted.reads += 1
        return super().__getitem__(i)


def reads_of(plan, adapters):
    """How often ``plan`` reads the cost or the cap of an adapter, for this many adapters of ten ranks."""
    rng = random.Random(adapters)
    costs = Counted(rng.choice([1, 2, 3]) for _ in range(adapters))
    caps = Counted(rng.randint(11, 40 + adapters) for _ in range(adapters))
    Counted.reads = 0
    plan(rng, costs, caps)
    return Counted.reads


def with_importance(rng, costs, caps):
    importance = [[rng.random() for _ in range(10)] for _ in costs]
    gates = [[float(rng.random() < 0.7) for _ in range(10)] for _ in costs]
    learning = [rng.random() < 0.7 for _ in costs]
    plan = allocate(
        gates, importance, costs, 10 * sum(costs), min_rank=1, caps=caps, prune_threshold=0.5, learning=learning
    )
    assert sum(plan.grow) > len(costs)


def without_importance(rng, costs, caps):
    # One adapter has room for all that the others can't take.
    caps[:-1] = [11] * (len(caps) - 1)
    gates = [[1.0] * 10 for _ in costs]
    plan = allocate(gates, None, costs, 20 * sum(costs), min_rank=1, caps=caps, prune_threshold=0.5)
    assert sum(plan.grow) >= len(costs)


def chosen(rng, costs, caps):
    importance = [[rng.random() for _ in range(10)] for _ in costs]
    found = ranks_to_prune(importance, costs, margin=0.7, max_count=3 * len(costs), min_rank=1, caps=caps)
    assert sum(map(len, found)) > len(costs) / 8


def spread(rng, costs, caps):
    spread_evenly(30 * sum(costs), costs, caps)


@pytest.mark.parametrize("plan", [with_importance, without_importance, chosen, spread])
def test_eight_times_the_adapters_are_not_much_more_than_eight_times_the_work(plan):
    assert reads_of(plan, 1600) < 12 * reads_of(plan, 200)


def test_ranks_of_many_adapters_are_spread_as_one_rank_at_a_time_would_be():
    for seed in range(300):
        rng = random.Random(seed)
        costs, caps = ([rng.randint(1, 9) for _ in range(8)] for _ in range(2))
        ranks, budget = [0] * 8, sum(costs) + rng.randint(0, 200)
        found = spread_evenly(budget, costs, caps)
        while (growable := [i for i in range(8) if ranks[i] < caps[i]]) and budget >= sum(costs[i] for i in growable):
            for i in growable:
                ranks[i] += 1
                budget -= costs[i]
        assert all(
            rank in (level, level + (i in growable)) for i, (rank, level) in enumerate(zip(found, ranks, strict=True))
        )


def test_a_history_whose_entries_differ_in_length_is_refused():
    with pytest.raises(ValueError):
        ranks_given_back([[1, 2], [1]])
