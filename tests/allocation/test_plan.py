"""From gates to a plan: what holds for any gates, and single cases by hand."""

import random

import pytest

from l1ra.allocation.plan import LayerPlan, allocate, ranks_given_back, ranks_to_prune, spread_evenly

CASES = 1000


def plan(gates, importance=None, costs=None, budget=None, caps=None, **kwargs):
    """``allocate`` with a full budget of ranks and no caps unless given."""
    costs = costs or [1] * len(gates)
    full = sum(c * len(row) for c, row in zip(costs, gates, strict=True))
    settings = {"min_rank": 1, "prune_threshold": 1e-10, **kwargs}
    return allocate(
        gates, importance, costs, full if budget is None else budget, caps=caps or [99] * len(gates), **settings
    )


def some_case(seed):
    """Random adapters whose ranks are within caps and budget."""
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    caps = [rng.randint(1, 9) for _ in range(n)]
    min_rank = rng.randint(1, min(caps))
    ranks = [rng.randint(min_rank, cap) for cap in caps]
    gates = [[rng.choice([0.0, 0.0, 1.0, rng.random()]) for _ in range(r)] for r in ranks]
    importance = None
    if rng.random() < 0.6:
        importance = [[rng.choice([None, rng.random(), 0.5]) for _ in range(r)] for r in ranks]
    costs = [rng.choice([1, rng.randint(1, 12)]) for _ in range(n)]
    spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
    settings = {"min_rank": min_rank, "caps": caps, "prune_threshold": rng.choice([1e-10, 0.3])}
    settings["exclude_pruned"] = rng.random() < 0.5
    return (gates, importance, costs, spent + rng.choice([0, rng.randint(0, 20)])), settings


def test_whatever_the_gates_budget_bounds_and_survivors_are_respected():
    for seed in range(CASES):
        args, settings = some_case(seed)
        gates, importance, costs, budget = args
        result = allocate(*args, **settings)
        assert result == allocate(*args, **settings)  # deterministic
        spent = sum(c * layer.rank for c, layer in zip(costs, result.layers, strict=True))
        assert spent + result.spare == budget and result.spare >= 0
        for row, layer, cap in zip(gates, result.layers, settings["caps"], strict=True):
            alive = [k for k, g in enumerate(row) if g >= settings["prune_threshold"]]
            assert settings["min_rank"] <= layer.rank <= cap
            assert list(layer.keep) == sorted(set(layer.keep)) and set(alive) <= set(layer.keep) <= set(range(len(row)))
            if len(alive) >= settings["min_rank"] or importance is not None:
                assert list(layer.keep) == alive
            if importance is None and settings["exclude_pruned"] and len(alive) < len(row):
                assert layer.grow == max(0, settings["min_rank"] - len(layer.keep))  # only in place of the dead


def test_nothing_is_spare_that_a_receiver_could_take():
    for seed in range(CASES):
        args, settings = some_case(seed)
        result = allocate(*args, **settings)
        for row, layer, cost, cap in zip(args[0], result.layers, args[2], settings["caps"], strict=True):
            had_ranks_pruned = any(g < settings["prune_threshold"] for g in row)
            if layer.rank < cap and not (had_ranks_pruned and settings["exclude_pruned"]):
                assert cost > result.spare


def test_nothing_moves_where_no_gate_is_low_and_the_budget_is_full():
    result = plan([[1.0, 0.5], [1e-10, 1.0]])
    assert result.layers == (LayerPlan((0, 1)), LayerPlan((0, 1))) and result.spare == 0


def test_a_gate_at_the_threshold_stays():
    assert plan([[0.2, 0.19999, 0.5]], prune_threshold=0.2).keep == ((0, 2),)


def test_without_candidates_the_ranks_are_kept_as_spare():
    result = plan([[0.0, 1.0], [1.0, 0.0]])
    assert result.keep == ((1,), (0,)) and result.grow == (0, 0) and result.spare == 2
    assert plan([[0.0, 1.0], [1.0, 0.0]], exclude_pruned=False).spare == 0


def test_spare_ranks_are_offered_again():
    assert plan([[1.0], [1.0]], budget=4).grow == (1, 1)


def test_with_importance_what_no_other_can_take_goes_to_the_pruned():
    gates, importance = [[1.0, 0.0, 0.0], [1.0]], [[9.0, None, None], [1.0]]
    assert plan(gates, importance, caps=[9, 2]).grow == (1, 1)  # the healthy one first, up to its cap
    assert plan(gates, importance, caps=[9, 9]).grow == (0, 2)
    assert plan(gates, importance, caps=[9, 9], exclude_pruned=False).grow == (2, 0)


def test_without_importance_the_dead_with_the_highest_index_stay():
    assert plan([[0.0, 0.0, 0.0], [1.0]]).layers[0] == LayerPlan((2,))
    assert plan([[0.0, 0.0, 0.0, 1.0, 0.0]], min_rank=3).keep == ((2, 3, 4),)


def test_with_importance_new_ranks_come_in_place_of_the_dead():
    result = plan([[0.0, 0.0, 0.0], [1.0]], [[0.1, 0.1, 0.1], [1.0]])
    assert result.layers == (LayerPlan((), 1), LayerPlan((0,), 2))


def test_receivers_are_dealt_to_by_their_smallest_gate_round_robin():
    gates = [[0.0] * 5 + [1.0], [0.3, 1.0], [0.9, 0.9], [0.3, 0.8]]
    assert plan(gates).grow == (0, 2, 2, 1)  # order 2, 1, 3, 2, 1: ties by position


def test_a_rank_goes_where_the_weakest_rank_matters_most():
    gates = [[0.0, 0.0, 0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    importance = [[0.0, 0.0, 0.0, 9.0], [0.5, 9.0], [0.8, 0.8]]
    # needs 0.5 and 0.8; then 0.5 and 0.57; then 0.5 and 0.46
    assert plan(gates, importance).grow == (0, 1, 2)
    importance[2] = [0.5, 0.5]
    assert plan(gates, importance).grow == (0, 2, 1)  # a tie goes to the first


def test_importance_is_judged_per_cost():
    gates = [[0.0, 1.0], [1.0], [1.0]]
    result = plan(gates, [[0.0, 1.0], [1.0], [0.6]], costs=[4, 4, 2])
    assert result.grow == (0, 0, 2) and result.spare == 0


def test_a_rank_too_young_to_be_judged_does_not_count_as_weak():
    gates = [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert plan(gates, [[0.0, 1.0], [None, 1.0], [0.9, 0.9]]).grow == (0, 1, 0)
    assert plan(gates, [[0.0, 1.0], [None, None], [0.9, 0.9]]).grow == (0, 0, 1)


def test_an_adapter_above_its_cap_keeps_what_it_has():
    result = plan([[1.0] * 4, [1.0]], budget=9, caps=[2, 3])
    assert [layer.rank for layer in result.layers] == [4, 3] and result.spare == 2


# --- what is worth more elsewhere


def test_those_who_have_something_to_learn_are_dealt_first():
    gates, importance = [[0.0, 1.0], [1.0], [1.0]], [[1.0, 1.0], [2.0], [1.0]]
    assert plan(gates, importance).grow == (0, 1, 0)
    assert plan(gates, importance, learning=[True, False, True]).grow == (0, 0, 1)
    assert plan(gates, importance, learning=[True, False, False]).grow == (0, 1, 0)
    assert plan(gates, importance, learning=[True, False, True], caps=[9, 9, 1]).grow == (0, 1, 0)
    assert plan(gates, importance, learning=[False, True, True], caps=[9, 1, 1]).grow == (1, 0, 0)


def given_up(importance, costs=None, **settings):
    settings = {"margin": 1.0, "max_count": 99, "min_rank": 1, "caps": [99] * len(importance), **settings}
    return ranks_to_prune(importance, costs or [1] * len(importance), **settings)


def test_the_least_important_ranks_are_given_up_for_a_greater_need():
    assert given_up([[0.1, 5.0, 0.2], [1.0, 2.0]]) == [(0, 2), ()]
    assert given_up([[0.1, 5.0, 0.2], [1.0, 2.0]], max_count=1) == [(0,), ()]
    assert given_up([[0.1, 5.0, 0.2], [1.0, 2.0]], min_rank=2) == [(0,), ()]
    assert given_up([[0.1, 5.0, 0.2], [1.0, 2.0]], margin=0.15) == [(0,), ()]
    assert given_up([[0.1, 5.0, 0.2], [1.0, 2.0]], margin=0.0) == [(), ()]


def test_nothing_is_given_up_for_an_adapter_that_has_nothing_to_learn():
    importance = [[0.1, 5.0, 0.2], [1.0, 2.0], [0.6, 0.6]]
    assert given_up(importance) == [(0, 2), (), ()]
    assert given_up(importance, learning=[True, False, True]) == [(0, 2), (), ()]  # for the 0.6 of the third one
    assert given_up(importance, learning=[True, False, False]) == [(), (), ()]
    assert given_up(importance, learning=[False] * 3) == [(), (), ()]


def test_a_need_is_less_with_each_rank_that_is_given_to_it():
    # 1, then 0.71, then 0.58
    assert given_up([[0.5, 0.6, 0.9, 9.0], [1.0]]) == [(0, 1), ()]
    assert given_up([[0.5, 0.6, 0.65, 9.0], [1.0], [0.8]]) == [(0, 1, 2), (), ()]


def test_where_all_matter_alike_nothing_is_given_up():
    assert given_up([[1.0, 1.0], [1.0, 1.0], [1.0]]) == [(), (), ()]
    assert given_up([[0.0, 0.0], [0.0]]) == [(), ()]


def test_who_is_at_its_cap_needs_nothing():
    assert given_up([[0.1, 0.2], [1.0]], caps=[9, 1]) == [(), ()]
    assert given_up([[0.1, 0.2, 0.3], [1.0]], caps=[9, 2]) == [(0,), ()]
    assert given_up([[0.1, 0.2], [9.0], [1.0]], caps=[9, 1, 9]) == [(0,), (), ()]


def test_young_ranks_are_neither_given_up_nor_a_need():
    assert given_up([[0.1, None, None], [1.0]]) == [(0,), ()]
    assert given_up([[None, None], [1.0]]) == [(), ()]
    assert given_up([[0.1, 0.2], [None, 1.0], [None]]) == [(0,), (), ()]


def test_surplus_counts_per_cost():
    # Worth 0.25 and 0.5 per cost; two ranks of cost 2 make one of 4.
    assert given_up([[1.0, 9.0], [1.0, 9.0]], costs=[4, 2]) == [(0,), ()]
    assert given_up([[0.1, 0.1, 0.1, 9.0], [9.0]], costs=[2, 4], margin=0.029) == [(0, 1), ()]


def test_whatever_the_importance_nobody_gives_and_receives():
    for seed in range(CASES):
        rng = random.Random(seed)
        n = rng.randint(1, 6)
        importance = [[rng.choice([None, rng.random(), 0.5]) for _ in range(rng.randint(1, 9))] for _ in range(n)]
        costs = [rng.choice([1, rng.randint(1, 9)]) for _ in range(n)]
        margin, most, min_rank = rng.random(), rng.randint(0, 20), rng.randint(1, 3)
        rows = given_up(importance, costs, margin=margin, max_count=most, min_rank=min_rank)
        assert sum(map(len, rows)) <= most
        weakest = [
            min((v for v in row if v is not None), default=0.0) / c for row, c in zip(importance, costs, strict=True)
        ]
        for i, given in enumerate(rows):
            assert list(given) == sorted(set(given))
            assert not given or len(importance[i]) - len(given) >= min_rank
            needs = [need for j, need in enumerate(weakest) if not rows[j]]
            assert all(importance[i][k] / costs[i] < margin * max(needs) for k in given)


# --- what was dealt and came back


def test_what_came_back_is_what_was_dealt_and_cut_again():
    up, down, up_and_down, twice, only_down = [2, 3, 5], [2, 1, 1], [2, 5, 3], [2, 4, 2, 3, 1, 1], [4, 3, 4]
    assert [ranks_given_back([[r] for r in ranks]) for ranks in (up, down, up_and_down, twice)] == [[0], [0], [2], [3]]
    assert ranks_given_back([[r] for r in only_down]) == [0]
    assert ranks_given_back([[4], [2], [3], [1]]) == [1]  # of its first ranks nobody says that they were dealt in vain
    assert ranks_given_back([[2, 2], [3, 1], [2, 2]]) == [1, 0]
    assert ranks_given_back([[2, 2]]) == [0, 0]


def test_who_gave_ranks_back_needs_less():
    gates, importance = [[0.0, 1.0, 1.0], [1.0], [1.0]], [[0.0, 1.0, 1.0], [0.5], [0.4]]
    assert plan(gates, importance).grow == (0, 1, 0)
    assert plan(gates, importance, given_back=[0, 1, 0]).grow == (0, 0, 1)  # 0.35 and 0.4
    assert given_up([[0.4, 5.0], [0.5]]) == [(0,), ()]
    assert given_up([[0.4, 5.0], [0.5]], given_back=[0, 1]) == [(), ()]  # 0.35
    assert given_up([[0.3, 5.0], [0.5]], given_back=[0, 1]) == [(0,), ()]
    assert given_up([[0.2, 0.24, 5.0], [0.5]], given_back=[0, 1]) == [(0, 1), ()]  # 0.35, then 0.25
    assert given_up([[0.2, 0.26, 5.0], [0.5]], given_back=[0, 1]) == [(0,), ()]


# --- the initial ranks


def test_an_even_budget_is_spread_evenly():
    assert spread_evenly(12, [1] * 4, [99] * 4) == [3, 3, 3, 3]


def test_a_remainder_is_spread_over_the_whole_model():
    ranks = spread_evenly(14, [1] * 8, [99] * 8)
    assert sorted(ranks) == [1, 1, 2, 2, 2, 2, 2, 2]
    assert ranks.index(1) < 4 and 1 in ranks[4:]  # one in each half, not the last two


def test_what_a_cap_leaves_goes_to_the_others():
    assert spread_evenly(12, [1, 1, 1], [2, 99, 99]) == [2, 5, 5]


def test_a_budget_below_one_rank_each_names_the_least():
    with pytest.raises(ValueError, match="write a budget of at least 7"):
        spread_evenly(6, [2, 5], [9, 9])


def test_whatever_the_costs_the_spread_is_even_and_leaves_nothing_it_could_give():
    for seed in range(CASES):
        rng = random.Random(seed)
        n = rng.randint(1, 12)
        costs = [1] * n if rng.random() < 0.4 else [rng.randint(1, 9) for _ in range(n)]
        caps = [rng.choice([999, rng.randint(1, 6)]) for _ in range(n)]
        budget = sum(costs) + rng.randint(0, 60)
        ranks = spread_evenly(budget, costs, caps)
        left = budget - sum(c * r for c, r in zip(costs, ranks, strict=True))
        assert left >= 0 and all(1 <= r <= cap for r, cap in zip(ranks, caps, strict=True))
        uncapped = [r for r, cap in zip(ranks, caps, strict=True) if r < cap]
        assert not uncapped or max(ranks) - min(uncapped) <= 1
        assert all(c > left for c, r, cap in zip(costs, ranks, caps, strict=True) if r < cap) or len(set(costs)) > 1
        assert ranks == spread_evenly(budget, costs, caps)
