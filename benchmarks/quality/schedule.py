"""Which runs there are to do, and doing them: several processes side by side, in a given time, none of them twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.runs import TUNING_SEED, Spec

__all__ = ["RATES", "Plan", "Queue", "best_rate", "read", "start"]

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# At which share of LoRA's budget L1RA is tried besides, and of which budgets.
SHARE, SHARED = 0.7, (2, 4)
SPEED_OF_GPU = 5.0  # a cautious guess, until a run has been timed
POLL = 0.2


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        tasks: name -> ``(steps, middle multiplier, multipliers)``.
        methods: names; of an experiment its label.
        base: method behind a label.
        settings: of the experiment.
        rate: instead of the grid.
    """

    tasks: dict[str, tuple[int, float, tuple[float, ...]]]
    methods: tuple[str, ...]
    seeds: int
    out: str
    device: str = "cpu"
    label: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    rate: float | None = None
    rates: tuple[float, ...] = RATES
    share: bool = True

    def spec(self, task: str, method: str, multiplier: float, seed: int, rate: float) -> Spec:
        return Spec(
            task, method, multiplier, seed, rate, self.tasks[task][0], self.out, self.device, self.label, self.settings
        )

    def tuning(self) -> list[Spec]:
        """Tries of learning rates: at the middle budget, with a seed of their own."""
        if self.rate is not None:
            return []
        return [
            self.spec(task, method, middle, TUNING_SEED, rate)
            for task, (_, middle, _) in self.tasks.items()
            for method in self.methods
            if method != "frozen"
            for rate in self.rates
        ]

    def final(self) -> tuple[list[Spec], list[str]]:
        """The runs that are reported, seed by seed, so that whatever is cut off is cut off for all methods alike.

        Returns:
            The runs, and in words what has to wait for learning rates.
        """
        specs, waiting = [], []
        rates = {}
        for task in self.tasks:
            for method in self.methods:
                tries = [spec for spec in self.tuning() if (spec.task, spec.method) == (task, method)]
                done = [json.loads(s.file.read_text(encoding="utf-8")) for s in tries if s.file.exists()]
                rate = 0.0 if method == "frozen" else self.rate or best_rate(done, self.rates)
                if rate is None:
                    waiting.append(f"{task}/{self.label or method}")
                else:
                    rates[task, method] = rate
        for seed in range(self.seeds):
            for (task, method), rate in rates.items():
                specs += [self.spec(task, method, m, seed, rate) for m in self._multipliers(task, method)]
        return specs, waiting

    def _multipliers(self, task: str, method: str) -> list[float]:
        if method == "frozen":
            return [0]
        multipliers = self.tasks[task][2]
        more = [round(SHARE * m, 6) for m in multipliers if m in SHARED and method == "l1ra" and self.share]
        return [*multipliers, *more]


def read(folder: Path) -> list[dict[str, Any]]:
    """All records in an output folder, by task, method and name. Those of another number of steps lie deeper."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*/*.json"))]


def best_rate(records: Iterable[dict[str, Any]], rates: Iterable[float] = RATES) -> float | None:
    """The learning rate with the least validation loss among the tries; None before all have been made."""
    losses = {
        r["rate"]: float("inf") if r["diverged"] or r["validation_loss"] is None else r["validation_loss"]
        for r in records
        if r["seed"] == TUNING_SEED
    }
    if not losses or not set(rates) <= set(losses):
        return None
    return min(losses, key=lambda rate: (losses[rate], rate))


def start(spec: Spec) -> subprocess.Popen:
    """A run in a process of its own. On a CPU with one thread: more would wait for one another."""
    environment = dict(os.environ, GOMP_SPINCOUNT="0", TOKENIZERS_PARALLELISM="false")
    if spec.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "benchmarks.quality.runs", spec.text()]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@dataclass
class Queue:
    """Does runs, ``jobs`` side by side, until the time is up.

    Attributes:
        deadline: of ``time.monotonic()``; no run begins that would probably end later. None: no limit.
        guess: seconds of a run of a task on a CPU core, until one has been timed.
        launch: starts a run; what it returns has ``poll`` and ``communicate`` as a ``subprocess.Popen``.
        failed: names of the runs that did.
        left: runs for which no time was left.
    """

    jobs: int
    deadline: float | None
    guess: dict[str, float]
    launch: Callable[[Spec], Any] = start
    failed: list[str] = field(default_factory=list)
    left: int = 0
    _timed: dict[str, float] = field(default_factory=dict)

    def work(self, specs: list[Spec]) -> None:
        """Do the runs that have no record yet."""
        todo = [spec for spec in specs if not spec.file.exists()]
        total, done, running = len(todo), 0, {}
        if todo:
            print(f"{total} runs to do, {len(specs) - total} are there", flush=True)
            self._look_back(specs)
        while todo or running:
            while todo and len(running) < self.jobs:
                if self.deadline is not None and time.monotonic() + self.expected(todo[0]) >= self.deadline:
                    # Another task's runs may be short enough; this one's are not any more.
                    name = todo[0].task
                    self.left += sum(spec.task == name for spec in todo)
                    todo = [spec for spec in todo if spec.task != name]
                    continue
                spec = todo.pop(0)
                running[spec] = (self.launch(spec), time.monotonic())
            for spec in [spec for spec, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(spec)
                done += 1
                self._finish(spec, process, time.monotonic() - began, f"{done}/{total}")
            if running:
                time.sleep(POLL)

    def expected(self, spec: Spec) -> float:
        """Seconds that a run will take: as long as the longest of its task, else a guess."""
        if spec.task in self._timed:
            return self._timed[spec.task]
        return self.guess.get(spec.task, 0.0) / (1.0 if spec.device == "cpu" else SPEED_OF_GPU)

    def _look_back(self, specs: list[Spec]) -> None:
        for spec in specs:
            if spec.method != "frozen" and spec.file.exists():
                record = json.loads(spec.file.read_text(encoding="utf-8"))
                if record["device"] == spec.device:
                    self._took(spec, record["total_seconds"])

    def _took(self, spec: Spec, seconds: float) -> None:
        self._timed[spec.task] = max(seconds, self._timed.get(spec.task, 0.0))

    def _finish(self, spec: Spec, process: Any, seconds: float, count: str) -> None:
        output, _ = process.communicate()
        name = f"{spec.task}/{spec.name}/{spec.file.stem}"
        if process.returncode or not spec.file.exists():
            self.failed.append(name)
            print(f"[{count}] {name} FAILED\n{output}", flush=True)
            return
        if spec.method != "frozen":
            self._took(spec, seconds)
        record = json.loads(spec.file.read_text(encoding="utf-8"))
        value = record["test_metric"] if record["test_metric"] is not None else record["validation_metric"]
        shown = "none" if value is None else f"{value:.4f}"
        part = "validation" if spec.seed == TUNING_SEED else "test"
        print(f"[{count}] {name}: {part} {record['metric']} {shown}, {seconds:.0f} s", flush=True)
