"""When ranks are moved: steps of the optimizer, counted from 1."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from l1ra.config import L1RAConfig

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Reallocations come after every ``interval``-th step within ``first`` ... ``last``.

    Attributes:
        interval: steps between two reallocations.
        first, last: the first and last step after which there may be one; ``last`` None means for ever.
        early: whether ranks are judged in the first interval already, see :meth:`trial`.
    """

    interval: int
    first: int
    last: int | None
    early: bool

    @classmethod
    def from_config(cls, config: L1RAConfig, total_steps: int | None, *, early: bool) -> Schedule:
        """The schedule of a training of ``total_steps``; None, unknown: shares of the total then fall away.

        An interval given as a share of an unknown total becomes 100 steps.
        """
        interval = config.interval
        if total_steps is None:
            steps = 100 if isinstance(interval, float) else interval
            return cls(steps, steps, None, early)

        def share(part: float) -> int:
            return int(part * total_steps + 1e-6)  # 0.29 * 100 is 28.999... in floats

        steps = max(config.min_interval, share(interval)) if isinstance(interval, float) else interval
        # Not after the very last step: ranks that are dealt then would never be trained.
        last = min(total_steps - 1, share(1 - config.cooldown)) // steps * steps
        return cls(steps, max(1, share(config.warmup)), last, early)

    def warn(self, config: L1RAConfig, total_steps: int | None) -> None:
        """Say what a user may not expect of the schedule that was made from ``config`` and ``total_steps``."""
        if total_steps is None:
            warnings.warn(
                f"L1RA does not know how long the training is: ranks move every {self.interval} steps until it ends. "
                "Pass total_steps=<number of optimizer steps> to l1ra.patch or RankController for a warm-up and a "
                "cooldown.",
                stacklevel=3,
            )
        elif self.empty or (config.rule == "adaptive-l1" and not self.judges):
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
        """Whether before some reallocation, when its interval closes, the first ranks can be judged."""
        if self.last is None:
            return True
        closes = self.last - max(1, self.interval // 2)
        return not self.empty and closes >= self.trial(closes)

    def trial(self, step: int) -> int:
        """For how many steps a rank must have been trained to be judged at ``step``: an interval.

        If ``early``, a quarter of one is enough in the first interval: it closes after half of one, and a step or
        another may have been skipped.
        """
        return max(1, self.interval // 4) if self.early and step <= self.interval else self.interval

    def reallocates(self, step: int) -> bool:
        """Whether there is a reallocation after ``step``."""
        return step % self.interval == 0 and step >= self.first and not self.over(step)

    def over(self, step: int) -> bool:
        """Whether ``step`` lies behind the last possible reallocation."""
        return self.last is not None and step > self.last

    def progress(self, step: int) -> float:
        """The share, from 0 to 1, of the way to the last possible reallocation; 1 while the total is unknown."""
        return 1.0 if self.last is None else min(1.0, step / max(1, self.last))

    def looks(self, step: int) -> bool:
        """Whether the steps after ``step`` are the first half of an interval before a reallocation."""
        return self.reallocates(self._coming(step)) and not self.closes(step)

    def closes(self, step: int) -> bool:
        """Whether the steps after ``step`` are the last half interval before a reallocation."""
        coming = self._coming(step)
        return self.reallocates(coming) and coming - step <= max(1, self.interval // 2)

    def _coming(self, step: int) -> int:
        return (step // self.interval + 1) * self.interval
