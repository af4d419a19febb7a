"""Timing: cold caches, competitors in turn, medians and spread.

On a GPU a measurement starts with reads of a large buffer. They push the inputs out of the L2 cache, and they keep the
GPU busy while the host queues what is to be timed: the events then see the device's own time, and the time that the
host needs is reported beside it. Reads, because lines that were written would go back to memory at the expense of what
is timed. Without a GPU, ``perf_counter`` takes their place.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Budget", "Clock", "Failed", "Sample", "Work", "interleave"]

MIN_ROUNDS = 3
WARM_UPS = 3
MOST_FLUSHES = 400
COLUMNS = 4096  # of the buffer: rows enough that each is summed within a block, and nothing is allocated for it


class Failed(Exception):
    """A work raised, as its cause says; ``name`` is its name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Budget:
    """Seconds that a section may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


@dataclass
class Work:
    """Something to time: ``before`` is not timed, then come ``parts``, name -> call, each timed by itself."""

    parts: Mapping[str, Callable[[], Any]]
    before: Callable[[], Any] = lambda: None


@dataclass
class Sample:
    """Milliseconds of each part on the device, and of all of them on the host until everything was queued."""

    parts: dict[str, float]
    host: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class Clock:
    """Measures on ``device``; ``flush_bytes`` are read before each measurement."""

    device: torch.device
    flush_bytes: int
    _flush: torch.Tensor | None = None
    _sums: torch.Tensor | None = None
    _flush_ms: float = 0.1

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def _prepare(self) -> None:
        if self._flush is not None:
            return
        rows = max(1, self.flush_bytes // (4 * COLUMNS))
        self._flush = torch.zeros(rows, COLUMNS, device=self.device)
        self._sums = torch.empty(rows, device=self.device)
        for _ in range(3):
            self._read()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            self._read()
        end.record()
        end.synchronize()
        self._flush_ms = max(1e-3, start.elapsed_time(end) / 10)

    def _read(self) -> None:
        torch.sum(self._flush, 1, out=self._sums)

    def release(self) -> None:
        """Give the flush buffer and other unused memory back to the device."""
        self._flush = self._sums = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def measure(self, work: Work, host_ms: float = 0.0) -> Sample:
        """One measurement; ``host_ms`` is how long the host is expected to take for it."""
        work.before()
        names = list(work.parts)
        if not self.cuda:
            times = [time.perf_counter()]
            for name in names:
                work.parts[name]()
                times.append(time.perf_counter())
            parts = {name: 1e3 * (b - a) for name, a, b in zip(names, times, times[1:], strict=False)}
            return Sample(parts, sum(parts.values()))
        self._prepare()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(names) + 1)]
        torch.cuda.synchronize()
        for _ in range(min(MOST_FLUSHES, 1 + math.ceil(1.2 * host_ms / self._flush_ms))):
            self._read()
        events[0].record()
        start = time.perf_counter()
        for name, event in zip(names, events[1:], strict=True):
            work.parts[name]()
            event.record()
        host = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        parts = {name: a.elapsed_time(b) for name, a, b in zip(names, events, events[1:], strict=False)}
        return Sample(parts, host)

    def peak_bytes(self, work: Work) -> int | None:
        """The most memory that one run takes beyond what was allocated before it; None without a GPU."""
        work.before()
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for part in work.parts.values():
            part()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def interleave(clock: Clock, works: Mapping[str, Work], rounds: int, budget: Budget) -> dict[str, list[Sample]]:
    """Each round measures each work once, a different one first in every round; at least three rounds.

    Afterwards no round begins that would outlast the budget.

    Raises:
        Failed: one of them can't be measured.
    """
    host = {}
    for name in works:
        for _ in range(WARM_UPS):
            host[name] = measured(clock, works, name).host
    names = list(works)
    if not names:
        return {}
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    longest = 0.0
    for turn in range(rounds):
        start = time.monotonic()
        if turn >= MIN_ROUNDS and longest > budget.left:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(measured(clock, works, name, host[name]))
        longest = max(longest, time.monotonic() - start)
    return samples


def measured(clock: Clock, works: Mapping[str, Work], name: str, host_ms: float = 0.0) -> Sample:
    try:
        return clock.measure(works[name], host_ms)
    except Exception as error:
        raise Failed(name) from error
