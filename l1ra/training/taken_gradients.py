"""The gradients of the gates, taken from the layers before an optimizer steps: it neither moves nor decays a gate."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.layers.recompute import in_backward
from l1ra.training.gate_bank import GateBank, GateGradients

__all__ = ["TakenGradients"]


class TakenGradients:
    """The gradients of one training step."""

    def __init__(self, bank: GateBank) -> None:
        self._bank = bank
        self._flat: GateGradients | None = None
        self._parts: dict[int, Tensor] = {}  # in a backward in which optimizers step

    def take(self, optimizer: Optimizer, held: Collection[int]) -> None:
        """Before a step of ``optimizer``, which holds adapters with these numbers."""
        if in_backward():
            for i, grad in self._bank.take_gradients(held).items():
                grad = _unscaled(grad, optimizer)
                self._parts[i] = self._parts[i] + grad if i in self._parts else grad
            return
        self._bank.refresh()
        found = self._bank.flatten(self._bank.take_gradients(held))
        if found is not None:
            self._flat = found._replace(flat=_unscaled(found.flat, optimizer))

    def collect(self, held: Collection[int]) -> GateGradients | None:
        """After the step: the gradients of the gates of these adapters; None if there were none."""
        found, self._flat = self._flat, None
        if found is None:
            # They were computed within the step, by its closure or by a backward that has ended now.
            self._bank.refresh()
            found = self._bank.flatten(self._parts | self._bank.take_gradients(held))
            self._parts = {}
        return found


def _unscaled(grad: Tensor, optimizer: Optimizer) -> Tensor:
    """The gradient without the loss scale of a GradScaler; NaN if the scaler has found that it is not finite.

    A fused optimizer unscales within its step. GradScaler then leaves scale and verdict in its attributes.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        grad = grad / scale.to(grad)
    if found_inf is not None:
        grad = torch.where(found_inf.to(grad.device) > 0, torch.nan, grad)
    return grad
