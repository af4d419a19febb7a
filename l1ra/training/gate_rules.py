"""Gate rules: how gates move at an optimizer step, and how important each rank is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from l1ra.config import L1RAConfig
from l1ra.training.gate_bank import GateBank
from l1ra.training.schedule import Stage
from l1ra_kernels import dispatch

__all__ = ["AdaptiveL1", "PaperL1", "Rule", "make_rule"]


class Rule(Protocol):
    """What a gate rule provides. ``R`` is the sum of all ranks.

    Attributes:
        uses_importance: whether ranks are chosen and allocated by :meth:`importance`. Only then do probes observe the
            gradients, and are ranks rotated to principal axes.
    """

    uses_importance: bool

    def step(self, bank: GateBank, grad: Tensor, stage: Stage, seen: Tensor | None = None) -> dict[str, Tensor]:
        """The new state of the gates after an optimizer step. ``bank`` is not changed.

        Args:
            grad: ``(R,)``, the gradient of the master gates.
            seen: ``(R,)`` bool, the gates that had a gradient; None means all.

        Returns:
            New tensors by their names in ``bank``. The bank keeps the old values of gates that were not seen, and all
            old values if ``grad`` is not finite. A rule that returns ``age`` and ``skipped`` has handled both itself,
            as the fused gate steps do.
        """
        ...

    def importance(self, bank: GateBank, stage: Stage) -> list[list[float | None]] | None:
        """The importance of each rank of each adapter, by which ranks are chosen and allocated.

        None in place of a number: the rank is too young to be judged. None in place of the list: ranks are allocated by
        their gates alone.
        """
        ...


class PaperL1:
    """The rule of the paper: Adam with a decoupled elastic net (AdamE), then a clamp to [0, 1].

    Source: L1RA, arXiv:2509.04884.
    """

    uses_importance = False

    def __init__(self, config: L1RAConfig) -> None:
        self.lr = 2e-2 if config.gate_lr is None else config.gate_lr
        self.l1 = 1e-3 if config.l1_lambda is None else config.l1_lambda
        self.l2 = config.l2_lambda

    def step(self, bank: GateBank, grad: Tensor, stage: Stage, seen: Tensor | None = None) -> dict[str, Tensor]:
        state = (bank.value, grad, bank.exp_avg, bank.exp_avg_sq, bank.age, bank.skipped, seen)
        new = dispatch.adam_gate_step(*state, lr=self.lr, l1=self.l1, l2=self.l2)
        return dict(zip(("value", "exp_avg", "exp_avg_sq", "age", "skipped"), new, strict=True))

    def importance(self, bank: GateBank, stage: Stage) -> None:
        return None


class AdaptiveL1:
    """An L1 penalty on chosen ranks, against a constant pull of all gates back to 1.

    The importance of a rank is ``I = sqrt(EMA[(g * dL/dg)**2])``, to first order the change of the loss if the rank
    were removed. It does not depend on how the scale of a rank is split among A, g and B. In the middle of an interval
    ``allocation.plan.ranks_to_prune`` chooses ranks by it. Their gates fade to exactly 0 by the end of the interval;
    all other gates stay at 1.
    """

    uses_importance = True

    def __init__(self, config: L1RAConfig) -> None:
        self.lr = config.gate_lr
        self.l1 = 1.0 if config.l1_lambda is None else config.l1_lambda

    def step(self, bank: GateBank, grad: Tensor, stage: Stage, seen: Tensor | None = None) -> dict[str, Tensor]:
        new = dispatch.adaptive_gate_step(
            *(bank.value, grad, bank.importance_sq, bank.age, bank.weight, bank.skipped, seen),
            lr=self._fading_lr(stage) if self.lr is None else self.lr,
            l1=0.0 if stage.over else self.l1,
            horizon=max(2.0, stage.interval / 2),
        )
        return dict(zip(("value", "importance_sq", "age", "skipped"), new, strict=True))

    def importance(self, bank: GateBank, stage: Stage) -> list[list[float | None]]:
        judged = (bank.age >= stage.min_age) & (bank.value > 0)
        values = bank.by_adapter(torch.where(judged, bank.importance_sq.sqrt(), -1.0))
        return [[None if value == -1 else value for value in row] for row in values]

    def _fading_lr(self, stage: Stage) -> float:
        # From 1 to 0 within half an interval. Half a step less, since a sum of fractions may fall short of 1.
        return 1 / (max(1, stage.interval // 2) - 0.5) / max(self.l1 * GateBank.PENALTY_WEIGHT - 1, 0.1)


def make_rule(config: L1RAConfig) -> Rule:
    """The rule that ``config.rule`` names."""
    return {"l1": PaperL1, "adaptive-l1": AdaptiveL1}[config.rule](config)
