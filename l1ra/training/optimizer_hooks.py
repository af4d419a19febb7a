"""Hooks around the steps of every torch optimizer that holds a controller's parameters."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["BackwardCounter", "OptimizerHooks"]


class OptimizerHooks:
    """Calls ``before(optimizer)`` and ``after(optimizer)`` around the steps of optimizers that hold some parameters.

    Built on torch's global step hooks. The three callables must be bound methods: they are referenced weakly, so that
    the hooks do not keep their object alive and stop when it is gone.

    Attributes:
        optimizers: the optimizers with these parameters that have stepped.
    """

    def __init__(self, param_ids: Callable[[], set[int]], before: Callable, after: Callable) -> None:
        """
        Args:
            param_ids: returns the ids of the parameters.
            before: called before each step.
            after: called after each step.
        """
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._param_ids = weakref.WeakMethod(param_ids)
        self._callbacks = {"before": weakref.WeakMethod(before), "after": weakref.WeakMethod(after)}
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()
        self._number = next(_numbers)
        _active.add(self)
        _hook_into_torch()

    def call(self, when: str, optimizer: Optimizer) -> None:
        """Call ``"before"`` or ``"after"`` if ``optimizer`` holds any of the parameters."""
        callback = self._callbacks[when]()
        if callback is not None and self._holds_params(optimizer):
            callback(optimizer)

    def close(self) -> None:
        """Stop calling."""
        _active.discard(self)

    def _holds_params(self, optimizer: Optimizer) -> bool:
        size = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._known.get(optimizer)
        if known is None or known[0] != size:
            param_ids = self._param_ids()
            held = (id(param) for group in optimizer.param_groups for param in group["params"])
            known = self._known[optimizer] = (size, param_ids is not None and not param_ids().isdisjoint(held))
            if known[1]:
                self.optimizers.add(optimizer)
        return known[1]


# torch calls its hooks while it iterates over them, so a hook that is removed within a step, by close() or by garbage
# collection, makes that step fail. One pair of hooks therefore serves all instances and is never removed.
_active: weakref.WeakSet[OptimizerHooks] = weakref.WeakSet()
_handles: list = []
_numbers = itertools.count()


def _hook_into_torch() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _call_all("before", optimizer)))
        _handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: _call_all("after", optimizer)))


def _call_all(when: str, optimizer: Optimizer) -> None:
    # In the order of construction: data-parallel processes must call theirs in the same order.
    for hooks in sorted(_active, key=lambda hooks: hooks._number):
        hooks.call(when, optimizer)


class BackwardCounter:
    """Warns once when many backward passes have gone by without an optimizer step."""

    LIMIT = 256

    def __init__(self, param: torch.nn.Parameter) -> None:
        """Count the backward passes that reach ``param``."""
        self.count = 0
        self.warned = False
        counter = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            if (me := counter()) is not None:
                me.count_backward()

        self._handle = param.register_post_accumulate_grad_hook(hook)

    def count_backward(self) -> None:
        self.count += 1
        if self.count >= self.LIMIT and not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.LIMIT} backward passes have gone by and the L1RA controller has seen no optimizer step: no "
                "rank will move. Give the model's trainable parameters to a torch.optim optimizer; if yours is none, "
                "or auto=False, call controller.step(optimizer) after each of its steps.",
                stacklevel=2,
            )

    def reset(self) -> None:
        """An optimizer has stepped."""
        self.count = 0

    def close(self) -> None:
        """Stop counting."""
        self._handle.remove()
