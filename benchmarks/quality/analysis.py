"""The records of all runs: which of them are reported, and paired differences between methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.common.records import Record
from benchmarks.common.statistics import Interval, t_interval
from benchmarks.quality import learning_rates
from benchmarks.quality.methods import METHODS
from benchmarks.quality.runs import TUNING_SEED

__all__ = [
    *("METRICS", "Difference", "Metric", "Results", "Tuned", "budget_for", "paired"),
]


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        sign: 1 if more is better, -1 if less is.
        factor: to the unit that is shown.
        title, difference: name and unit, of the metric and of a difference.
    """

    sign: int
    factor: int
    title: str
    difference: str

    @property
    def direction(self) -> str:
        return "more is better" if self.sign > 0 else "less is better"


METRICS = {
    "accuracy": Metric(1, 100, "accuracy, %", "accuracy, points"),
    "perplexity": Metric(-1, 1, "perplexity", "perplexity"),
    "agreement": Metric(1, 100, "agreement, %", "agreement, points"),
}


@dataclass(frozen=True)
class Difference:
    """Of two methods, seed by seed.

    Attributes:
        interval: of the differences.
        better, worse: seeds at which the first method is.
        sign: of a difference for the better: 1 for accuracy, -1 for a loss.
    """

    interval: Interval
    better: int
    worse: int
    sign: int

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"`` where the interval excludes 0, else ``""``."""
        mean, half = self.interval.mean, self.interval.half
        if half is None or abs(mean) <= half:
            return ""
        return "better" if mean * self.sign > 0 else "worse"


def paired(first: Mapping[int, float], second: Mapping[int, float], sign: int) -> Difference | None:
    """``first - second`` over the seeds that both have; None if there are none.

    Args:
        first, second: seed -> value.
        sign: 1 if more is better, -1 if less is.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    better = sum(d * sign > 0 for d in differences)
    worse = sum(d * sign < 0 for d in differences)
    return Difference(t_interval(differences), better, worse, sign)


def budget_for(losses: Mapping[float, float], wanted: float) -> float | None:
    """The smallest budget at which a method has a loss of ``wanted``; None where it has not within what was measured.

    Args:
        losses: budget -> loss; between two budgets it is taken to be linear in the budget's logarithm.
    """
    for (low, more), (high, less) in itertools.pairwise(sorted(losses.items())):
        if more >= wanted >= less:
            return low * (high / low) ** ((more - wanted) / (more - less) if more > less else 0.0)
    return None


@dataclass(frozen=True)
class Tuned:
    """The learning rate of a method on a task.

    Attributes:
        rate: that its runs have.
        tried: validation loss of each rate that the climb has come by, infinite where the training diverged; empty if
            the rate was given.
    """

    rate: float
    tried: dict[float, float]

    @property
    def remark(self) -> str:
        if not self.tried:
            return "given, not chosen"
        if self.rate == min(self.tried):
            return "lowest of the grid: a lower one may be better"
        if self.rate == max(self.tried):
            return "highest of the grid: a higher one may be better"
        return ""


class Results:
    """The records of all runs, and what to ask of them."""

    def __init__(self, records: Iterable[Record], order: Iterable[str]) -> None:
        """Args: records, and the methods in the order of the tables; experiments come after them."""
        self.records = list(records)
        known = list(order)
        found = {r["method"] for r in self.records}
        self.methods = [m for m in known if m in found] + sorted(found - set(known))
        # By task: the runs that may be reported, and the tries of learning rates.
        self._finals: dict[str, list[Record]] = {r["task"]: [] for r in self.records}
        self._tuning: dict[str, list[Record]] = {task: [] for task in self._finals}
        for r in self.records:
            (self._tuning if r["seed"] == TUNING_SEED else self._finals)[r["task"]].append(r)
        self._head_rates = {task: self._head_rate(task) for task in self._finals}
        runs = {(task, r["method"], r["multiplier"]) for task, finals in self._finals.items() for r in finals}
        self._rates = {run: self._rate(*run) for run in runs}

    def metric(self, task: str) -> str:
        """The name of what the task's runs report, a key of ``METRICS``."""
        return next(r["metric"] for r in self.records if r["task"] == task)

    def tasks(self) -> list[str]:
        """Tasks with anything to report, in order of appearance."""
        return [task for task, finals in self._finals.items() if finals]

    def multipliers(self, task: str) -> list[float]:
        """Budgets at which anything was trained, in order."""
        return sorted({r["multiplier"] for r in self._final(task) if r["multiplier"]})

    def tuned(self, task: str, method: str) -> dict[float | None, Tuned]:
        """Budget -> the rate of a method that has runs to report there; one for all budgets, None, as a rule."""
        found = {m: rate for (t, n, m), rate in self._rates.items() if (t, n) == (task, method) and rate is not None}
        tuned = {m: Tuned(rate, self._tried(task, method, m)) for m, rate in sorted(found.items())}
        one = len(self._climbs(task, method)) < 2 and len(set(found.values())) == 1
        return {None: next(iter(tuned.values()))} if one else tuned

    def head(self, task: str) -> Tuned | None:
        """The head's rate, the same for all methods; None if no run to report trains a head."""
        rate = self._head_rates.get(task)
        return None if rate is None else Tuned(rate, self._head_tried(task))

    def runs(self, task: str, method: str, multiplier: float) -> list[Record]:
        """The runs to report, at the rates of the method and the head, by seed: of the seeds that all methods have at
        the budget.

        Experiments are judged by the seeds they have, and no method loses seeds through them.
        """
        found = self._all_runs(task, method, multiplier)
        if method not in METHODS:
            return found
        seeds = [{r["seed"] for r in self._all_runs(task, m, multiplier)} for m in self.methods if m in METHODS]
        shared = set.intersection(*filter(None, seeds)) if found else set()
        return [r for r in found if r["seed"] in shared]

    def left_out(self, task: str) -> int:
        """Number of runs with seeds that not all methods have."""
        return sum(
            len(self._all_runs(task, method, m)) - len(self.runs(task, method, m))
            for method in self.methods
            for m in [0, *self.multipliers(task)]
        )

    def values(self, task: str, method: str, multiplier: float, name: str) -> dict[int, float]:
        """Seed -> the value of the field ``name``, without records in which it is None."""
        return {r["seed"]: r[name] for r in self.runs(task, method, multiplier) if r.get(name) is not None}

    def _all_runs(self, task: str, method: str, multiplier: float) -> list[Record]:
        wanted = (method, multiplier, self._rates.get((task, method, multiplier)))
        found = [r for r in self._final(task) if (r["method"], r["multiplier"], r["rate"]) == wanted]
        return sorted(found, key=lambda r: r["seed"])

    def _climbs(self, task: str, method: str) -> set[float]:
        """The budgets at which rates were tried."""
        return {r["multiplier"] for r in self._tries(task, method)}

    def _tries(self, task: str, method: str) -> list[Record]:
        return [r for r in self._tuning[task] if r["method"] == method and self._counts(r)]

    def _tried(self, task: str, method: str, multiplier: float) -> dict[float, float]:
        """Of the climb at the budget nearest to this one."""
        climbs = self._climbs(task, method)
        at = learning_rates.nearest(multiplier, climbs) if climbs else None
        return {
            r["rate"]: learning_rates.validation_loss_of(r) for r in self._tries(task, method) if r["multiplier"] == at
        }

    def _final(self, task: str) -> list[Record]:
        return [r for r in self._finals[task] if self._counts(r)]

    def _counts(self, record: Record) -> bool:
        return record["head_rate"] in (None, self._head_rates[record["task"]])

    def _head_tried(self, task: str) -> dict[float, float]:
        tried: dict[float, dict[float, float]] = {}  # LoRA's rate -> the head's -> loss
        for record in self._tuning[task]:
            if record["method"] == "lora":
                tried.setdefault(record["rate"], {})[record["head_rate"]] = learning_rates.validation_loss_of(record)
        return max(tried.values(), key=len, default={})

    def _head_rate(self, task: str) -> float | None:
        rates = [r["head_rate"] for r in self._finals[task] if r["head_rate"] is not None]
        return _reported(rates, self._head_tried(task))

    def _rate(self, task: str, method: str, multiplier: float) -> float | None:
        runs = [r for r in self._final(task) if (r["method"], r["multiplier"]) == (method, multiplier)]
        tried = self._tried(task, method, multiplier) if multiplier else {}
        return _reported([r["rate"] for r in runs], tried)


def _reported(rates: list[float], tried: dict[float, float]) -> float | None:
    # Runs with other rates may lie there from earlier calls: the rate that the climb has chosen, else the one with the
    # most runs.
    best = learning_rates.best(tried)
    return best if best in rates else max(sorted(set(rates)), key=rates.count, default=None)
