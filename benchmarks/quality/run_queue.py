"""Which runs there are to do, and doing them: several processes side by side, in a given time, none of them twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.common.files import ROOT
from benchmarks.quality import learning_rates
from benchmarks.quality.methods import FROZEN
from benchmarks.quality.runs import TUNING_SEED, Spec

__all__ = ["Plan", "PlannedTask", "Queue", "start"]

# At which share of LoRA's budget L1RA is tried besides, and of which budgets.
SHARE, SHARED = 0.7, (4, 8)
SPEED_OF_GPU = 5.0  # a cautious guess, until a run has been timed
POLL = 0.2


class PlannedTask(NamedTuple):
    """Of a task: the optimizer steps, the middle budget, all budgets, whether it has a fresh head, and whether rates
    are tried at each budget instead of the middle one alone."""

    steps: int
    middle: float
    multipliers: tuple[float, ...]
    has_head: bool
    climbs_each: bool = False


@dataclass(frozen=True)
class Plan:
    """The runs that a command line asks for.

    A task's head has the same learning rate for all methods: with one rate for both, the adapters
    that bear the head's would be ahead. It is climbed to first, beside LoRA at the rate at which all climbs begin.

    Attributes:
        tasks: by name.
        methods: names.
        label, settings: of an experiment, whose only method is l1ra.
        rate: of the adapters, instead of a climb.
        rates: the grid of the climbs.
        share: whether L1RA is tried at a share of the budgets, too.
    """

    tasks: dict[str, PlannedTask]
    methods: tuple[str, ...]
    seeds: int
    out: str
    device: str = "cpu"
    label: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    rate: float | None = None
    rates: tuple[float, ...] = learning_rates.RATES
    share: bool = True

    def spec(self, task: str, method: str, multiplier: float, seed: int, rate: float, head_rate: float | None) -> Spec:
        steps = self.tasks[task].steps
        return Spec(
            task, method, multiplier, seed, rate, steps, self.out, self.device, self.label, self.settings, head_rate
        )

    def ready(self) -> list[Spec]:
        """The runs without a record that can begin now; with each new record there may be others.

        Tries of learning rates first, then the runs that are reported of all methods whose rate is known. Seeds are the
        outermost loop of these, so that a call that is broken off has the same seeds of all methods.
        """
        pairs = [(task, method) for task in self.tasks for method in self.methods]
        found = [spec for task in self.tasks for spec in self.head_tries(task)]
        found += [spec for pair in pairs for spec in self.tries(*pair)]
        wanted = [(*pair, m) for pair in pairs for m in self._multipliers(*pair)]
        rates = {run: rate for run in wanted if (rate := self.chosen(*run)) is not None}
        heads = {task: self.head_rate(task) for task in self.tasks}
        for seed in range(self.seeds):
            for (task, method, m), rate in rates.items():
                found.append(self.spec(task, method, m, seed, rate, None if method == FROZEN else heads[task]))
        return [spec for spec in dict.fromkeys(found) if spec.record() is None]

    def head_tries(self, task: str) -> list[Spec]:
        """The tries that come next in the climb to the head's rate."""
        if not self.tasks[task].has_head or set(self.methods) <= {FROZEN}:
            return []
        losses = self._losses({rate: self._head_try(task, rate) for rate in self.rates})
        return [self._head_try(task, rate) for rate in learning_rates.next_rates(losses, self.rates)]

    def head_rate(self, task: str) -> float | None:
        """The learning rate of the head; None while it is being looked for, and where there is no fresh head."""
        if not self.tasks[task].has_head or self.head_tries(task):
            return None
        return self._best({rate: self._head_try(task, rate) for rate in self.rates})

    def tries(self, task: str, method: str) -> list[Spec]:
        """The tries that come next in the climbs, with a seed of their own."""
        if method == FROZEN or self.rate is not None or self._waits(task):
            return []
        return [spec for m in self._climbs(task) for spec in self._next(self._tries(task, method, m))]

    def chosen(self, task: str, method: str, multiplier: float) -> float | None:
        """The learning rate of the runs that are reported at a budget; None while it is being looked for."""
        if method == FROZEN:
            return 0.0
        if self._waits(task):
            return None
        if self.rate is not None:
            return self.rate
        tries = self._tries(task, method, learning_rates.nearest(multiplier, self._climbs(task)))
        return None if self._next(tries) else self._best(tries)

    def unsettled(self) -> list[str]:
        """In words, what has no learning rate yet."""
        pairs = ((task, method) for task in self.tasks for method in self.methods)
        return [f"{task}/{self.label or method}" for task, method in pairs if self._unsettled(task, method)]

    def _unsettled(self, task: str, method: str) -> bool:
        return any(self.chosen(task, method, m) is None for m in self._multipliers(task, method))

    def _climbs(self, task: str) -> tuple[float, ...]:
        """The budgets at which rates are tried."""
        planned = self.tasks[task]
        return planned.multipliers if planned.climbs_each else (planned.middle,)

    def _next(self, tries: dict[float, Spec]) -> list[Spec]:
        return [tries[rate] for rate in learning_rates.next_rates(self._losses(tries), self.rates)]

    def _waits(self, task: str) -> bool:
        return bool(self.head_tries(task))

    def _head_try(self, task: str, rate: float) -> Spec:
        planned, begin = self.tasks[task], learning_rates.start(self.rates)
        terms = (planned.middle, TUNING_SEED, begin, planned.steps, self.out, self.device)
        return Spec(task, "lora", *terms, head_rate=rate)

    def _tries(self, task: str, method: str, multiplier: float) -> dict[float, Spec]:
        head_rate = self.head_rate(task)
        return {rate: self.spec(task, method, multiplier, TUNING_SEED, rate, head_rate) for rate in self.rates}

    def _losses(self, tries: dict[float, Spec]) -> dict[float, float]:
        return {
            rate: learning_rates.validation_loss_of(record)
            for rate, spec in tries.items()
            if (record := spec.record()) is not None
        }

    def _best(self, tries: dict[float, Spec]) -> float:
        # If every rate diverges, the lowest one shows it.
        return learning_rates.best(self._losses(tries)) or min(self.rates)

    def _multipliers(self, task: str, method: str) -> list[float]:
        if method == FROZEN:
            return [0]
        multipliers = self.tasks[task].multipliers
        more = [round(SHARE * m, 6) for m in multipliers if m in SHARED and method == "l1ra" and self.share]
        return [*multipliers, *more]


def start(spec: Spec) -> subprocess.Popen:
    """A run in a process of its own. On a CPU with one thread: more would wait for one another."""
    environment = dict(os.environ, GOMP_SPINCOUNT="0", TOKENIZERS_PARALLELISM="false")
    if spec.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "benchmarks.quality.runs", spec.text()]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@dataclass
class Queue:
    """Does runs, ``jobs`` side by side, until the time is up.

    Attributes:
        deadline: of ``time.monotonic()``; no run begins that would probably end later. None: no limit.
        guess: seconds of a run of a task on a CPU core, until one has been timed.
        launch: starts a run; returns an object with ``poll`` and ``communicate``, as a ``subprocess.Popen`` has.
        failed: names of the runs that did.
        left: runs that could have begun, had there been time.
    """

    jobs: int
    deadline: float | None
    guess: dict[str, float]
    launch: Callable[[Spec], Any] = start
    failed: list[str] = field(default_factory=list)
    left: int = 0
    _timed: dict[str, float] = field(default_factory=dict)

    def work(self, ready: Callable[[], list[Spec]]) -> None:
        """Do the runs that ``ready`` names, in its order; it is asked anew whenever one has ended."""
        launched: set[Spec] = set()
        running: dict[Spec, tuple[Any, float]] = {}
        todo = ready()
        if todo:
            print(f"{len(todo)} runs can begin; others may follow from them", flush=True)
        while True:
            while len(running) < self.jobs and (spec := next(filter(self._in_time, todo), None)):
                todo.remove(spec)
                launched.add(spec)
                running[spec] = (self.launch(spec), time.monotonic())
            ended = [spec for spec, (process, _) in running.items() if process.poll() is not None]
            for spec in ended:
                process, began = running.pop(spec)
                self._finish(spec, process, time.monotonic() - began, f"[{len(launched) - len(running)}]")
            if ended:
                # A failed run is not repeated.
                todo = [spec for spec in ready() if spec not in launched]
            elif running:
                time.sleep(POLL)
            else:
                break
        self.left = len(todo)

    def _in_time(self, spec: Spec) -> bool:
        return self.deadline is None or time.monotonic() + self.expected(spec) < self.deadline

    def expected(self, spec: Spec) -> float:
        """Seconds that a run will take: as long as the longest of its task, else a guess."""
        if spec.task in self._timed:
            return self._timed[spec.task]
        return self.guess.get(spec.task, 0.0) / (1.0 if spec.device == "cpu" else SPEED_OF_GPU)

    def use_recorded_times(self, records: Iterable[dict[str, Any]], device: str) -> None:
        """Take the times of earlier runs instead of expected_seconds."""
        for record in records:
            if record["base_method"] != FROZEN and record["device"] == device:
                self._took(record["task"], record["total_seconds"])

    def _took(self, task: str, seconds: float) -> None:
        self._timed[task] = max(seconds, self._timed.get(task, 0.0))

    def _finish(self, spec: Spec, process: Any, seconds: float, count: str) -> None:
        output, _ = process.communicate()
        record = spec.record()
        if process.returncode or record is None:
            self.failed.append(spec.title)
            print(f"{count} {spec.title} FAILED\n{output}", flush=True)
            return
        if spec.method != FROZEN:
            self._took(spec.task, seconds)
        value = record["test_metric"] if record["test_metric"] is not None else record["validation_metric"]
        shown = "none" if value is None else f"{value:.4f}"
        part = "validation" if spec.seed == TUNING_SEED else "test"
        print(f"{count} {spec.title}: {part} {record['metric']} {shown}, {seconds:.0f} s", flush=True)
