"""Gate rules: how gates move at an optimizer step, and how much each rank matters.

A rule has two methods. ``step(bank, grad, at, seen)`` returns the new state of the bank, by name of its tensor; it
changes nothing. ``seen`` is the mask of the gates that had a gradient, or None: all of them. The bank keeps gates at
their old state that were not seen, and all of them at a step whose gradient is not finite, unless the rule returns
``age`` and ``skipped`` as well: then it has seen to that already, as the ops for gate steps do. ``importance(bank,
at)`` returns one number a rank (None in place of one that can't be judged yet), by which the allocation chooses the
ranks that shall go (``bank.weight``) and those who receive, or None if it shall go by the gates alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from l1ra.config import L1RAConfig
from l1ra.training.gate_bank import GateBank
from l1ra_kernels import dispatch

__all__ = ["AdaptiveL1", "Moment", "PaperL1", "Rule", "make_rule"]


@dataclass(frozen=True)
class Moment:
    """Where in the training a step lies.

    Attributes:
        interval: steps between two reallocations.
        progress: share, from 0 to 1, of the way to the last reallocation; 1 while the total is unknown.
        over: whether no reallocation will come any more.
        trial: steps for which a rank must have been trained to be judged.
    """

    interval: int
    progress: float
    over: bool
    trial: int


class Rule(Protocol):
    def step(self, bank: GateBank, grad: Tensor, at: Moment, seen: Tensor | None = None) -> dict[str, Tensor]: ...

    def importance(self, bank: GateBank, at: Moment) -> list[list[float | None]] | None: ...


class PaperL1:
    """The paper's rule: Adam with decoupled elastic net (AdamE), then the clamp to [0, 1]; receivers by their gates."""

    def __init__(self, config: L1RAConfig) -> None:
        self.lr = 2e-2 if config.gate_lr is None else config.gate_lr
        self.l1 = 1e-3 if config.l1_lambda is None else config.l1_lambda
        self.l2 = config.l2_lambda

    def step(self, bank: GateBank, grad: Tensor, at: Moment, seen: Tensor | None = None) -> dict[str, Tensor]:
        state = (bank.value, grad, bank.exp_avg, bank.exp_avg_sq, bank.age, bank.skipped, seen)
        new = dispatch.adam_gate_step(*state, lr=self.lr, l1=self.l1, l2=self.l2)
        return dict(zip(("value", "exp_avg", "exp_avg_sq", "age", "skipped"), new, strict=True))

    def importance(self, bank: GateBank, at: Moment) -> None:
        return None


class AdaptiveL1:
    """An L1 penalty on the ranks that ``allocation.plan.surplus`` has chosen, against a constant pull back to 1.

    A rank's importance is ``I = sqrt(EMA[(g * dL/dg)**2])``, the first-order change of the loss if it were removed: it
    is blind to how a rank's scale is split among A, g and B. In the middle of an interval ranks are chosen by it; their
    gates fade to exactly 0 until its end, all others stay at 1.
    """

    def __init__(self, config: L1RAConfig) -> None:
        self.lr = config.gate_lr
        self.l1 = 1.0 if config.l1_lambda is None else config.l1_lambda

    def step(self, bank: GateBank, grad: Tensor, at: Moment, seen: Tensor | None = None) -> dict[str, Tensor]:
        new = dispatch.adaptive_gate_step(
            *(bank.value, grad, bank.importance_sq, bank.age, bank.weight, bank.skipped, seen),
            lr=self._fading_lr(at) if self.lr is None else self.lr,
            l1=0.0 if at.over else self.l1,
            horizon=max(2.0, at.interval / 2),
        )
        return dict(zip(("value", "importance_sq", "age", "skipped"), new, strict=True))

    def importance(self, bank: GateBank, at: Moment) -> list[list[float | None]]:
        judged = bank.rows((bank.age >= at.trial) & (bank.value > 0))
        values = bank.rows(bank.importance_sq.sqrt())
        return [[v if ok else None for v, ok in zip(*row, strict=True)] for row in zip(values, judged, strict=True)]

    def _fading_lr(self, at: Moment) -> float:
        # From 1 to 0 within half an interval. Half a step less: a sum of fractions may fall short of 1.
        return 1 / (max(1, at.interval // 2) - 0.5) / max(self.l1 * GateBank.PRESSED - 1, 0.1)


def make_rule(config: L1RAConfig) -> Rule:
    """The rule that ``config.rule`` names."""
    return {"l1": PaperL1, "adaptive-l1": AdaptiveL1}[config.rule](config)
