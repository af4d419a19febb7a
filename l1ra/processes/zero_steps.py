"""The steps of DeepSpeed's optimizer, which holds copies of the adapters in flat parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.integrations.call_stack import calls
from l1ra.layers.linear import L1RALinear
from l1ra.layers.zero import ZeroOptimizer, find_zero_optimizer

__all__ = ["Callbacks", "ZeroSteps"]


class Callbacks(NamedTuple):
    """What a training does at the steps of DeepSpeed's optimizer.

    Attributes:
        found: called with each optimizer that is found.
        write_gates: writes the gates anew.
        check: called before each step; may raise.
        register: called with the torch optimizer within its first step. Returns whether ranks move.
        rest: called with a reason why no rank moves after all, the end of a sentence.
        end: called after each step with the torch optimizer, and the gradients of the gates by layer; None if no gate
            moves.
    """

    found: Callable[[ZeroOptimizer], object]
    write_gates: Callable[[], object]
    check: Callable[[], object]
    register: Callable[[Optimizer], bool]
    rest: Callable[[str], object]
    end: Callable[[Optimizer, Mapping[int, Tensor] | None], object]


class ZeroSteps:
    """Finds DeepSpeed's optimizer, and lets its steps be those of the training.

    Attributes:
        zero: the optimizer; None until it is found.
    """

    def __init__(self, layers: Sequence[L1RALinear], callbacks: Callbacks, *, auto: bool) -> None:
        """``auto``: whether steps are to be noticed."""
        self.zero: ZeroOptimizer | None = None
        self._layers = layers
        self._training = callbacks
        self._auto = auto
        self._has_looked = self._registered = self._is_first = self._heard_late = self._moves = False

    def in_first_backward(self) -> None:
        """In the first backward after a step: look for the optimizer."""
        gone = self.zero is not None and not self.zero.is_alive
        if gone or not self._has_looked:
            self._has_looked = True
            self.find()

    def find(self, among: Iterable[object] | None = None) -> bool:
        """Whether there is another optimizer than before; from now on its steps are noticed.

        Args:
            among: the objects to look at. None: all.
        """
        found = find_zero_optimizer(self._layers, among) if self._auto else None
        if found is None or (self.zero is not None and self.zero.is_same(found)):
            return False
        self.close()
        self.zero, self._registered = found, False
        self._training.found(found)
        found.watch(self._before_step, self._in_step, self._after_step)
        return True

    def heard(self, optimizer: Optimizer) -> None:
        """An optimizer that holds no adapter has stepped: it may be that within DeepSpeed's, which is stepping."""
        is_known = self.zero is not None and self.zero.optimizer is optimizer
        if not is_known and self.find(among=[frame.f_locals.get("self") for frame in calls("step")]):
            self._training.write_gates()  # it has trained them
            self._in_step()

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which the adapters are whole, see ``ZeroOptimizer.gathered``."""
        return nullcontext() if self.zero is None else self.zero.gathered()

    def close(self) -> None:
        """Notice no steps any more."""
        if self.zero is not None:
            self.zero.close()

    def _before_step(self) -> None:
        self.zero.check()
        self._training.check()

    def _in_step(self) -> None:
        """The optimizer lets its torch optimizer step a group of flattened parameters."""
        zero = self.zero
        if not self._registered:
            self._registered = self._is_first = True
            self._moves = self._training.register(zero.optimizer)
            # A process whose first backward has not reached the first adapter has not looked for the optimizer before.
            self._heard_late = not (zero.is_heard_by_all() if self._moves else zero.heard)
            if not zero.heard:
                self._after_step()

    @torch.no_grad()
    def _after_step(self) -> None:
        """All processes call this together."""
        zero, training = self.zero, self._training
        first, self._is_first = self._is_first, False
        if first and self._moves and (why := zero.why_fixed()):  # its state has been made in this step
            training.rest(why)
            self._moves = False
        moves = self._moves and not (first and self._heard_late)
        training.end(zero.optimizer, zero.gate_gradients() if moves else None)
