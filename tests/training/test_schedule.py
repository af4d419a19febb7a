"""At which steps ranks are moved."""

import pytest

from l1ra import L1RAConfig
from l1ra.training.schedule import Schedule, TrainedSteps


def steps(total, until=None, **settings):
    settings = {"warmup": 0.0, "cooldown": 0.0, "min_interval": 1, **settings}
    schedule = Schedule.from_config(L1RAConfig(**settings), total, judge_early=False)
    return [step for step in range((until or total) + 1) if schedule.reallocates_after(step)]


def test_every_interval_but_not_at_the_start_nor_after_the_last_step():
    assert steps(50, interval=10) == [10, 20, 30, 40]
    assert steps(55, interval=10) == [10, 20, 30, 40, 50]


def test_an_interval_may_be_a_share_of_the_total():
    assert steps(50, interval=0.1) == list(range(5, 50, 5))
    assert steps(5, interval=0.1) == [1, 2, 3, 4]  # at least a step
    assert steps(100, interval=0.1, min_interval=30) == [30, 60, 90]
    assert steps(100, interval=10, min_interval=30) == list(range(10, 100, 10))  # a number of steps is taken as it is


@pytest.mark.parametrize("share, total, interval", [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.1, 30, 3)])
def test_a_share_is_not_lost_to_the_rounding_of_floats(share, total, interval):
    assert (
        Schedule.from_config(L1RAConfig(interval=share, min_interval=1), total, judge_early=False).interval == interval
    )


def test_warmup_and_cooldown_are_left_out():
    assert steps(100, interval=10, warmup=0.25) == [30, 40, 50, 60, 70, 80, 90]
    assert steps(100, interval=10, warmup=0.2) == [20, 30, 40, 50, 60, 70, 80, 90]
    assert steps(100, interval=10, cooldown=0.3) == [10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("cooldown, last", [(0.9, 1), (0.7, 3), (0.4, 6), (0.3, 7)])
def test_the_last_step_is_where_the_cooldown_begins(cooldown, last):
    assert (
        Schedule.from_config(L1RAConfig(interval=1, cooldown=cooldown, warmup=0.0), 10, judge_early=False).last == last
    )


def test_an_unknown_total_means_every_hundred_steps_for_ever():
    assert steps(None, until=350, interval=0.05, warmup=0.1, cooldown=0.3) == [100, 200, 300]
    assert steps(None, until=100, interval=40) == [40, 80]


def test_progress_runs_to_the_last_reallocation():
    schedule = Schedule.from_config(L1RAConfig(interval=10, cooldown=0.5), 100, judge_early=False)
    assert [schedule.progress(s) for s in (0, 25, 50, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert [schedule.over(s) for s in (50, 51)] == [False, True]
    unknown = Schedule.from_config(L1RAConfig(), None, judge_early=False)
    assert unknown.progress(0) == unknown.progress(10**6) == 1.0 and not unknown.over(10**6)


def test_nothing_fades_after_the_last_reallocation_even_if_the_cooldown_has_not_begun():
    schedule = Schedule.from_config(L1RAConfig(interval=40, cooldown=0.25), 100, judge_early=False)
    assert schedule.last == 40
    assert schedule.progress(40) == 1.0 and schedule.over(41)


def test_an_interval_looks_and_closes_if_a_reallocation_follows():
    schedule = Schedule.from_config(L1RAConfig(interval=6, warmup=0.2, cooldown=0.5), 60, judge_early=False)
    assert [s for s in range(60) if schedule.in_second_half(s)] == [9, 10, 11, 15, 16, 17, 21, 22, 23, 27, 28, 29]
    assert [s for s in range(60) if schedule.in_first_half(s)] == [6, 7, 8, 12, 13, 14, 18, 19, 20, 24, 25, 26]
    shortest = Schedule.from_config(L1RAConfig(interval=1, warmup=0.0, cooldown=0.5), 8, judge_early=False)
    assert [s for s in range(8) if shortest.in_second_half(s)] == [0, 1, 2, 3]
    assert not any(shortest.in_first_half(s) for s in range(8))


@pytest.mark.parametrize("total", [1, 2, 9, 10, 19, 20, 40])
@pytest.mark.parametrize("warmup, cooldown", [(0.0, 0.0), (0.3, 0.4), (0.6, 0.3)])
def test_an_empty_schedule_says_so(total, warmup, cooldown):
    config = L1RAConfig(interval=10, warmup=warmup, cooldown=cooldown)
    assert Schedule.from_config(config, total, judge_early=False).empty == (
        not steps(total, interval=10, warmup=warmup, cooldown=cooldown)
    )
    assert not Schedule.from_config(config, None, judge_early=False).empty


@pytest.mark.parametrize(
    "total, interval, warmup, judges, early",
    [
        (200, 40, 0.0, True, True),
        (80, 40, 0.0, False, True),
        (40, 40, 0.0, False, False),
        (100, 40, 0.6, True, True),
        (3, 1, 0.0, True, True),
        (2, 1, 0.0, False, False),
    ],
)
def test_a_schedule_that_ends_before_a_rank_can_be_judged_says_so(total, interval, warmup, judges, early):
    config = L1RAConfig(interval=interval, warmup=warmup, cooldown=0.1)
    assert Schedule.from_config(config, total, judge_early=False).judges == judges
    assert Schedule.from_config(config, None, judge_early=False).judges
    assert Schedule.from_config(config, total, judge_early=True).judges == early


@pytest.mark.parametrize("interval, quarter", [(40, 10), (6, 1), (1, 1)])
def test_in_the_first_interval_a_quarter_of_it_is_enough_if_ranks_are_judged_early(interval, quarter):
    config = L1RAConfig(interval=interval, warmup=0.0)
    early, patient = (Schedule.from_config(config, 10 * interval, judge_early=early) for early in (True, False))
    assert [early.min_age(step) for step in (1, interval)] == [quarter, quarter]
    assert [early.min_age(step) for step in (interval + 1, 3 * interval)] == [interval, interval]
    assert {patient.min_age(step) for step in range(1, 3 * interval)} == {interval}


def test_the_period_in_which_an_adapter_is_trained_is_that_of_its_own_steps():
    trained = TrainedSteps(4, since=100)
    assert trained.periods(100) == [1, 1, 1, 1]
    for step in range(100):
        trained.add([0, 1, 2, 3] if step < 40 else [0, 1] if step % 2 else [0])
    assert trained.periods(200) == [1, 2, 3, 3]
    assert TrainedSteps(1).periods(7) == [1]
