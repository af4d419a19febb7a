"""Which runs are done when, with made-up losses: the climb to a learning rate, the order of runs, time that is up."""

import collections
import json
import math
import time

import pytest

pytest.importorskip("peft")
pytest.importorskip("scipy")

from benchmarks.common import records
from benchmarks.quality import learning_rates
from benchmarks.quality.run_queue import Plan, PlannedTask, Queue
from benchmarks.quality.runs import TUNING_SEED, store


def walk(loss, rates=learning_rates.RATES):
    """The rates that a climb tries on ``loss``, a function, and the one it takes."""
    losses = {}
    while rates_now := learning_rates.next_rates(losses, rates):
        assert not set(rates_now) & set(losses)
        losses |= {rate: loss(rate) for rate in rates_now}
    return list(losses), learning_rates.best(losses)


def valley(bottom, diverges=math.inf):
    return lambda rate: math.inf if rate >= diverges else abs(math.log(rate / bottom))


@pytest.mark.parametrize("bottom", learning_rates.RATES)
def test_the_climb_finds_the_minimum_and_goes_one_rate_further(bottom):
    tried, best = walk(valley(bottom))
    assert best == bottom and tried[:2] == [2e-3, 4e-3]
    span = [rate for rate in learning_rates.RATES if min(bottom / 2, 2e-3) * 0.99 < rate < max(bottom * 2, 4e-3) * 1.01]
    assert sorted(tried) == span


def test_a_diverged_rate_is_infinitely_bad():
    assert walk(valley(8e-3, diverges=8e-3)) == ([2e-3, 4e-3, 8e-3], 4e-3)
    assert walk(valley(8e-3, diverges=2e-3)) == ([2e-3, 4e-3, 1e-3, 5e-4], 1e-3)
    assert walk(valley(1e-3, diverges=0)) == ([2e-3, 4e-3, 1e-3, 5e-4, 2.5e-4], None)


def test_a_climb_on_other_grids_begins_at_the_rate_nearest_to_the_usual_one():
    assert walk(valley(3e-2), (1e-2, 3e-2, 1e-1)) == ([1e-2, 3e-2, 1e-1], 3e-2)
    assert walk(valley(1e-4), (1e-4, 1e-3)) == ([1e-3, 1e-4], 1e-4)
    assert walk(valley(1.0), (5e-3,)) == ([5e-3], 5e-3)


def test_equal_losses_end_the_climb_at_the_lower_rate():
    assert walk(lambda rate: 1.0) == ([2e-3, 4e-3, 1e-3], 1e-3)


# --- plans and the queue

BOTTOMS = {"frozen": 1.0, "lora": 1e-3, "l1ra": 8e-3}
HEAD = 1.6e-2  # the best rate of a head


class Pretended:
    """Starts runs that are over at once, and keeps a list of them."""

    returncode = 0

    def __init__(self, launched):
        self.launched = launched

    def __call__(self, spec):
        self.launched.append(spec)
        tuning = spec.seed == TUNING_SEED
        record = {
            "task": spec.task, "method": spec.name, "base_method": spec.method, "seed": spec.seed, "rate": spec.rate,
            "validation_loss": valley(BOTTOMS[spec.method])(spec.rate or 1.0) + valley(HEAD)(spec.head_rate or HEAD),
            "diverged": False,
            "multiplier": spec.multiplier, "validation_metric": 0.5, "test_metric": None if tuning else 0.5,
            "metric": "accuracy", "device": spec.device, "total_seconds": 1.0, "head_rate": spec.head_rate,
        }  # fmt: skip
        store(spec.out).add(record)
        return self

    def poll(self):
        return 0

    def communicate(self):
        return "", None


def plan(tmp_path, methods=("frozen", "lora", "l1ra"), seeds=2, **more):
    tasks = {name: PlannedTask(10, 4, (2, 4, 8), has_head=name == "words") for name in ("words", "posts")}
    return Plan(tasks, methods, seeds, str(tmp_path), **more)


def work(a_plan, deadline=None, jobs=2):
    launched = []
    queue = Queue(jobs, deadline, {"words": 1.0, "posts": 100.0}, Pretended(launched))
    queue.work(a_plan.ready)
    return queue, launched


def test_climbs_come_first_and_seeds_are_the_outermost_loop(tmp_path):
    a_plan = plan(tmp_path)
    _, launched = work(a_plan, jobs=1)
    tries = [spec for spec in launched if spec.seed == TUNING_SEED]
    assert {(spec.method, spec.multiplier) for spec in tries} == {("lora", 4), ("l1ra", 4)}
    assert launched[: len(tries)] == tries
    # Two tasks; from 4e-3 and 2e-3 down to 5e-4 or up to 1.6e-2. And one head, from 2e-3 to 3.2e-2 beside LoRA at 2e-3,
    # which is a try of LoRA's then.
    assert len(tries) == 2 * (4 + 4) + 5 - 1 and len(set(tries)) == len(tries)
    finals = launched[len(tries) :]
    assert [spec.seed for spec in finals] == sorted(spec.seed for spec in finals)
    # A seed: the frozen model, LoRA at three budgets, L1RA at these and at 70 % of the two large ones, on two tasks.
    assert len(finals) == 2 * 2 * (1 + 3 + 5) and len(set(finals)) == len(finals)
    assert {s.multiplier for s in finals if s.method == "l1ra"} == {2, 4, 8, 2.8, 5.6}
    assert {(spec.method, spec.rate) for spec in finals} == {*(BOTTOMS | {"frozen": 0.0}).items()}
    assert not a_plan.unsettled() and not a_plan.ready()


def test_rates_are_tried_at_each_budget_where_a_task_asks_for_it(tmp_path):
    a_plan = plan(tmp_path, ("lora", "l1ra"), seeds=1)
    a_plan.tasks["posts"] = a_plan.tasks["posts"]._replace(climbs_each=True)
    _, launched = work(a_plan)
    tries = [(s.task, s.method, s.multiplier) for s in launched if s.seed == TUNING_SEED]
    assert collections.Counter(t for t in tries if t[0] == "posts") == {
        ("posts", method, m): 4 for method in ("lora", "l1ra") for m in (2, 4, 8)
    }
    for spec in a_plan._tries("posts", "lora", 8).values():  # another valley there
        if record := spec.record():
            store(tmp_path).add({**record, "validation_loss": valley(2e-3)(spec.rate)})
    assert [a_plan.chosen("posts", "lora", m) for m in (2, 4, 5.6, 8)] == [1e-3, 1e-3, 1e-3, 2e-3]
    assert a_plan.chosen("words", "lora", 8) == a_plan.chosen("words", "lora", 2) == 1e-3


def test_climbs_of_tasks_and_methods_go_side_by_side_once_the_head_has_its_rate(tmp_path):
    a_plan = plan(tmp_path, ("lora", "l1ra"), seeds=0)
    ready = [(s.task, s.method, s.rate, s.head_rate) for s in a_plan.ready()]
    posts = [("posts", method, rate, None) for method in ("lora", "l1ra") for rate in (2e-3, 4e-3)]
    assert ready == [("words", "lora", 2e-3, rate) for rate in (2e-3, 4e-3)] + posts
    assert a_plan.chosen("words", "lora", 4) is None and a_plan.tries("words", "lora") == []
    assert a_plan.unsettled() == ["words/lora", "words/l1ra", "posts/lora", "posts/l1ra"]
    climb_of_the_head(a_plan)
    ready = [(s.task, s.method, s.rate, s.head_rate) for s in a_plan.ready()]
    pairs = [("lora", 4e-3), ("lora", 1e-3), ("l1ra", 2e-3), ("l1ra", 4e-3)]
    assert set(ready) == {*(("words", method, rate, HEAD) for method, rate in pairs), *posts} - {
        ("words", "lora", 1e-3, HEAD)  # comes when 2e-3 and 4e-3 have been compared
    }


def climb_of_the_head(a_plan):
    while tries := a_plan.head_tries("words"):
        for spec in tries:
            Pretended([])(spec)


def test_the_head_has_the_same_rate_beside_all_adapters(tmp_path):
    _, launched = work(plan(tmp_path))
    reported = [spec for spec in launched if spec.seed != TUNING_SEED]
    adapted = [spec for spec in reported if spec.method != "frozen"]
    assert {(spec.task, spec.head_rate) for spec in adapted} == {("words", HEAD), ("posts", None)}
    assert all(spec.head_rate is None for spec in reported if spec.method == "frozen")


def test_runs_beside_a_head_at_another_rate_are_other_runs(tmp_path):
    _, launched = work(plan(tmp_path, ("lora",), seeds=1, rate=1e-3))
    _, again = work(plan(tmp_path, ("lora",), seeds=1, rate=1e-3, rates=(2e-3,)))
    assert {(s.task, s.method, s.rate, s.head_rate) for s in again} == {("words", "lora", 1e-3, 2e-3)}
    assert len(again) == 3 and not set(launched) & set(again)


def test_the_climb_of_the_head_knows_nothing_of_an_experiment(tmp_path):
    a_plan = plan(tmp_path, ("l1ra",), seeds=1, label="m03", settings=(("margin", 0.3),))
    assert a_plan.unsettled() == ["words/m03", "posts/m03"]
    _, launched = work(a_plan)
    found = {(s.method, s.name, s.settings) for s in launched}
    assert found == {("lora", "lora", ()), ("l1ra", "m03", (("margin", 0.3),))}


def test_the_model_as_it_is_needs_no_rate_of_a_head(tmp_path):
    _, launched = work(plan(tmp_path, ("frozen",)))
    assert {spec.method for spec in launched} == {"frozen"}


def test_a_climb_is_resumed_and_no_rate_is_tried_twice(tmp_path):
    whole = [spec.rate for spec in work(plan(tmp_path / "whole", ("lora",)))[1] if spec.seed == TUNING_SEED]
    part = plan(tmp_path / "part", ("lora",))
    Pretended([])(part.ready()[0])
    assert part.unsettled() == ["words/lora", "posts/lora"]
    _, launched = work(part)
    assert sorted([2e-3, *(s.rate for s in launched if s.seed == TUNING_SEED)]) == sorted(whole)
    assert work(part)[1] == []


def diverge(spec):
    Pretended([])(spec)
    store(spec.out).add({**spec.record(), "validation_loss": None, "diverged": True})


def test_a_file_of_records_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    a_plan = plan(tmp_path, ("lora",), seeds=0)
    work(a_plan)
    reads, loads = [], json.loads
    monkeypatch.setattr(records.json, "loads", lambda text: (reads.append(text), loads(text))[1])
    for _ in range(2):
        assert a_plan.chosen("posts", "lora", 4) == BOTTOMS["lora"]
    assert len(reads) <= len(store(tmp_path).read_all())  # what was written last had not been read
    diverge(a_plan._tries("posts", "lora", 4)[BOTTOMS["lora"]])
    assert a_plan.chosen("posts", "lora", 4) != BOTTOMS["lora"]


def test_a_given_rate_needs_no_climb_but_the_heads(tmp_path):
    a_plan = plan(tmp_path, ("lora",), seeds=1, rate=3e-3, share=False)
    assert a_plan.chosen("posts", "lora", 4) == 3e-3 and a_plan.chosen("words", "lora", 4) is None
    _, launched = work(a_plan)
    reported = [s for s in launched if s.seed != TUNING_SEED]
    assert {(s.task, s.rate, s.head_rate) for s in reported} == {("words", 3e-3, HEAD), ("posts", 3e-3, None)}
    assert len(reported) == 6
    assert {(s.task, s.rate) for s in launched if s.seed == TUNING_SEED} == {("words", 2e-3)}


def test_a_method_that_always_diverges_shows_it_at_the_lowest_rate(tmp_path):
    a_plan = plan(tmp_path, ("lora",), rates=(1e-3, 2e-3))
    for spec in (a_plan._head_try("words", rate) for rate in a_plan.rates):
        diverge(spec)
    for spec in a_plan._tries("posts", "lora", 4).values():
        diverge(spec)
    assert a_plan.head_rate("words") == 1e-3
    assert a_plan.chosen("posts", "lora", 4) == 1e-3 and a_plan.chosen("words", "lora", 4) is None


def test_runs_that_would_end_too_late_are_left(tmp_path):
    a_plan = plan(tmp_path, ("lora",), seeds=1, rate=1e-3)
    queue, launched = work(a_plan, time.monotonic() + 60)
    assert {spec.task for spec in launched} == {"words"} == {r["task"] for r in store(tmp_path).read_all()}
    assert queue.left == 3 and not queue.failed


def test_earlier_runs_tell_how_long_the_next_ones_take(tmp_path):
    queue = Queue(1, None, {"words": 50.0})
    (spec,) = plan(tmp_path, ("lora",), rates=(1e-3,)).ready()[:1]
    assert queue.expected(spec) == 50
    common = {"task": "words", "base_method": "lora", "device": "cpu"}
    queue.use_recorded_times(
        [{**common, "total_seconds": 7.0}, {**common, "device": "cuda", "total_seconds": 9.0}], "cpu"
    )
    queue.use_recorded_times([{**common, "base_method": "frozen", "total_seconds": 70.0}], "cpu")
    assert queue.expected(spec) == 7


def test_the_model_as_it_is_does_not_tell_how_long_others_take(tmp_path):
    queue, _ = work(plan(tmp_path, ("frozen",)))
    assert queue.expected(plan(tmp_path).spec("words", "lora", 2, 0, 1e-3, 1e-3)) == 1.0
