"""When ranks move. Steps are those of the optimizer, counted from 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass

from l1ra.config import L1RAConfig

__all__ = ["Schedule", "Stage", "TrainedSteps"]


@dataclass(frozen=True)
class Stage:
    """How far the training is at one step.

    Attributes:
        interval: steps between two reallocations.
        progress: share of the way to the last reallocation, 0 to 1; 1 while the total is unknown.
        over: whether no further reallocation will come.
        min_age: steps for which a rank must have been trained to be judged.
    """

    interval: int
    progress: float
    over: bool
    min_age: int


@dataclass(frozen=True)
class Schedule:
    """The steps after which ranks are reallocated: each multiple of ``interval`` from ``first`` to ``last``.

    Probes observe the gradients in the first half of the interval before a reallocation. In its second half the gates
    of the ranks to be pruned fade.

    Attributes:
        interval: steps between two reallocations.
        first, last: the first and the last step after which there may be one; ``last`` is None if there is no last.
        judge_early: whether ranks are judged in the first interval already, see :meth:`min_age`.
    """

    interval: int
    first: int
    last: int | None
    judge_early: bool

    @classmethod
    def from_config(cls, config: L1RAConfig, total_steps: int | None, *, judge_early: bool) -> Schedule:
        """The schedule of a training of ``total_steps``.

        If the total is unknown (None), warm-up and cooldown are left out, and an interval given as a share of it
        becomes 100 steps.
        """
        interval = config.interval
        if total_steps is None:
            steps = 100 if isinstance(interval, float) else interval
            return cls(steps, steps, None, judge_early)

        def share(part: float) -> int:
            return int(part * total_steps + 1e-6)  # 0.29 * 100 is 28.999... in floats

        steps = max(config.min_interval, share(interval)) if isinstance(interval, float) else interval
        # Not after the very last step: new ranks would never be trained.
        last = min(total_steps - 1, share(1 - config.cooldown)) // steps * steps
        return cls(steps, max(1, share(config.warmup)), last, judge_early)

    def warn(self, config: L1RAConfig, total_steps: int | None, *, uses_importance: bool) -> None:
        """Warn if the schedule, made from ``config`` and ``total_steps``, does not do what a user may expect."""
        if total_steps is None:
            warnings.warn(
                f"L1RA does not know how long the training is: ranks move every {self.interval} steps until it ends. "
                "Pass total_steps=<number of optimizer steps> to l1ra.patch or RankController for a warm-up and a "
                "cooldown.",
                stacklevel=3,
            )
        elif self.empty or (uses_importance and not self.judges):
            warnings.warn(
                f"no rank will move: {total_steps} steps are too few at intervals of {self.interval}, "
                f"warmup {config.warmup} and cooldown {config.cooldown}. Train longer, or lower these.",
                stacklevel=3,
            )

    @property
    def empty(self) -> bool:
        """Whether there is no reallocation at all."""
        return self.last is not None and self.last < self.first

    @property
    def judges(self) -> bool:
        """Whether any rank is old enough to be judged before the last reallocation."""
        if self.last is None:
            return True
        middle = self.last - max(1, self.interval // 2)
        return not self.empty and middle >= self.min_age(middle)

    def reallocates_after(self, step: int) -> bool:
        """Whether ranks are reallocated after ``step``."""
        return step % self.interval == 0 and step >= self.first and not self.over(step)

    def in_first_half(self, step: int) -> bool:
        """Whether the step after ``step`` lies in the first half of an interval that ends with a reallocation."""
        return self.reallocates_after(self._next_end(step)) and not self.in_second_half(step)

    def in_second_half(self, step: int) -> bool:
        """Whether the step after ``step`` lies in the second half of an interval that ends with a reallocation."""
        end = self._next_end(step)
        return self.reallocates_after(end) and end - step <= max(1, self.interval // 2)

    def stage(self, step: int) -> Stage:
        """How far the training is at ``step``."""
        return Stage(self.interval, self.progress(step), self.over(step), self.min_age(step))

    def over(self, step: int) -> bool:
        """Whether ``step`` comes after the last possible reallocation."""
        return self.last is not None and step > self.last

    def progress(self, step: int) -> float:
        """The share of the way to the last possible reallocation, 0 to 1; 1 while the total is unknown."""
        return 1.0 if self.last is None else min(1.0, step / max(1, self.last))

    def min_age(self, step: int) -> int:
        """The steps for which a rank must have been trained to be judged at ``step``: an interval.

        With ``judge_early`` a quarter of one in the first interval: ranks are judged in its middle, and some steps may
        have been skipped.
        """
        return max(1, self.interval // 4) if self.judge_early and step <= self.interval else self.interval

    def _next_end(self, step: int) -> int:
        return (step // self.interval + 1) * self.interval


class TrainedSteps:
    """How many of the steps have trained each adapter: some losses reach only a part of them."""

    def __init__(self, adapters: int, since: int = 0) -> None:
        """Count from step ``since`` on."""
        self._since = since
        self._in_all = 0  # the steps that have trained all adapters
        self._in_parts = [0] * adapters

    def add(self, trained: Collection[int]) -> None:
        """A step has trained the adapters with these numbers."""
        if len(trained) == len(self._in_parts):
            self._in_all += 1
        else:
            for i in trained:
                self._in_parts[i] += 1

    def periods(self, step: int) -> list[int]:
        """In how many steps each adapter is trained once, rounded up; 1 for those that never are."""
        steps = step - self._since
        counts = [self._in_all + part for part in self._in_parts]
        return [max(1, math.ceil(steps / count - 0.02)) if count else 1 for count in counts]
