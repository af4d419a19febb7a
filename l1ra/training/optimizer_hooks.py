"""Hears the steps of whichever torch optimizer holds a controller's parameters."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from l1ra.training.optimizer_state import holds

__all__ = ["BackwardCounter", "OptimizerListener"]


class OptimizerListener:
    """Calls ``before(optimizer)`` and ``after(optimizer)`` around the steps of optimizers that hold some parameters.

    Built on torch's global step hooks. ``params()`` returns the parameters' ids. It holds the three, bound methods,
    weakly, and is deaf once their object is gone.

    Attributes:
        optimizers: the optimizers that have been heard.
    """

    def __init__(self, params: Callable[[], set[int]], before: Callable, after: Callable) -> None:
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._params = weakref.WeakMethod(params)
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()
        self._before, self._after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self._number = next(_numbers)
        _listeners.add(self)
        _hook_into_torch()

    def before(self, optimizer: Optimizer) -> None:
        self._pass_on(self._before, optimizer)

    def after(self, optimizer: Optimizer) -> None:
        self._pass_on(self._after, optimizer)

    def _pass_on(self, callback: weakref.WeakMethod, optimizer: Optimizer) -> None:
        call = callback()
        if call is not None and self.hears(optimizer):
            call(optimizer)

    def hears(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds any of the parameters; one that does is remembered."""
        size = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._known.get(optimizer)
        if known is None or known[0] != size:
            params = self._params()
            known = self._known[optimizer] = (size, params is not None and holds(optimizer, params()))
            if known[1]:
                self.optimizers.add(optimizer)
        return known[1]

    def close(self) -> None:
        _listeners.discard(self)


# One pair of hooks for all listeners, registered once and left in place: torch iterates over its hooks as they are,
# so that one which goes away during a step, by close() or by garbage collection, makes that step fail.
_listeners: weakref.WeakSet[OptimizerListener] = weakref.WeakSet()
_handles: list = []
_numbers = itertools.count()


def _hook_into_torch() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _tell("before", optimizer)))
        _handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: _tell("after", optimizer)))


def _tell(when: str, optimizer: Optimizer) -> None:
    # In the order of their making: replicas must hear the same ones in the same order.
    for listener in sorted(_listeners, key=lambda listener: listener._number):
        getattr(listener, when)(optimizer)


class BackwardCounter:
    """Warns once when many backward passes go by without an optimizer step."""

    LIMIT = 256

    def __init__(self, param: torch.nn.Parameter) -> None:
        self.count = 0
        self.warned = False
        counter = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            if (me := counter()) is not None:
                me.passed()

        self._handle = param.register_post_accumulate_grad_hook(hook)

    def passed(self) -> None:
        self.count += 1
        if self.count >= self.LIMIT and not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.LIMIT} backward passes have gone by and the L1RA controller has seen no optimizer step: no "
                "rank will move. Give the model's trainable parameters to a torch.optim optimizer; if yours is none, "
                "or auto=False, call controller.step(optimizer) after each of its steps.",
                stacklevel=2,
            )

    def stepped(self) -> None:
        self.count = 0

    def close(self) -> None:
        self._handle.remove()
