"""Hooks around the steps of every torch optimizer that holds a controller's parameters."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l1ra.integrations.distributed_checkpoint import initialises_state
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.recompute import in_backward

__all__ = ["BackwardCounter", "EndOfBackward", "HeldAdapters", "LoadedStates", "OptimizerHooks", "OtherOptimizers"]


class HeldAdapters:
    """The adapters of which an optimizer holds a parameter."""

    def __init__(self, layers: Sequence[L1RALinear]) -> None:
        self._layers = layers
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()

    def by(self, optimizer: Optimizer) -> Sequence[int]:
        """The numbers of the adapters, ascending."""
        size = tuple(len(group["params"]) for group in optimizer.param_groups)
        known = self._known.get(optimizer)
        if known is None or known[0] != size:
            held = {id(param) for group in optimizer.param_groups for param in group["params"]}
            owned = [{id(getattr(layer, name)) for name in ADAPTER_PARAMETERS} for layer in self._layers]
            known = self._known[optimizer] = (size, [i for i, ids in enumerate(owned) if not ids.isdisjoint(held)])
        return known[1]


class LoadedStates:
    """Drops loaded state of an optimizer that was saved with other ranks than the model has now.

    Some optimizers would step with it outside of their tensors' memory.
    """

    def __init__(self) -> None:
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def check(self, optimizer: Optimizer, layers: Sequence[L1RALinear]) -> None:
        """Before a step: check the state of ``layers``, if ``optimizer`` has loaded one since its last step."""
        if optimizer in self._checked:
            return
        if optimizer not in _watched:
            optimizer.register_load_state_dict_post_hook(_forget_checks)
            _watched.add(optimizer)
        _checks.setdefault(optimizer, weakref.WeakSet()).add(self)
        self._checked.add(optimizer)
        wrong = [
            param
            for layer in layers
            for param in (layer.lora_A, layer.gate, layer.lora_B)
            if _is_of_other_rows(optimizer.state.get(param, {}), param)
        ]
        for param in wrong:
            optimizer.state[param].clear()
        if wrong:
            warnings.warn(
                f"the state that {type(optimizer).__name__} has loaded is of other ranks than those of the model, for "
                f"{len(wrong)} parameters of adapters: it starts anew there. Load the model, the controller and the "
                "optimizer from one checkpoint.",
                stacklevel=2,
            )

    def forget(self, optimizer: Optimizer) -> None:
        """``optimizer`` has loaded a state."""
        self._checked.discard(optimizer)


_watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_checks: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[LoadedStates]] = weakref.WeakKeyDictionary()


def _forget_checks(optimizer: Optimizer) -> None:
    for states in _checks.get(optimizer, ()):
        states.forget(optimizer)


def _is_of_other_rows(state: Mapping[str, object], param: torch.nn.Parameter) -> bool:
    """Whether ``state`` has a tensor like ``param``, but with another number of rows."""
    if any(not isinstance(value, torch.Tensor | int | float | str | None) for value in state.values()):
        return False  # of objects such as GaLore's projector nobody knows what is right
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() == param.dim()]
    return any(t.shape[1:] == param.shape[1:] and t.shape != param.shape and t.numel() > 1 for t in tensors)


class OptimizerHooks:
    """Calls ``before(optimizer)`` and ``after(optimizer)`` around the steps of optimizers that hold adapters, and
    ``other(optimizer)`` after the steps of all others.

    Built on torch's global step hooks. The three callables must be bound methods: they are referenced weakly, so that
    the hooks do not keep their object alive and stop when it is gone.

    Attributes:
        optimizers: the optimizers with adapters that have stepped, as keys, in the order of their first steps:
            processes that gather their states must do it in the same order.
    """

    def __init__(self, held: HeldAdapters, before: Callable, after: Callable, other: Callable) -> None:
        """
        Args:
            held: tells which optimizers hold adapters.
            before: called before each step.
            after: called after each step.
            other: called after each step of an optimizer that holds none.
        """
        self.optimizers: weakref.WeakKeyDictionary[Optimizer, None] = weakref.WeakKeyDictionary()
        self._held = held
        callbacks = {"before": before, "after": after, "other": other}
        self._callbacks = {when: weakref.WeakMethod(callback) for when, callback in callbacks.items()}
        self._number = next(_numbers)
        _active.add(self)
        _hook_into_torch()

    def call(self, when: str, optimizer: Optimizer) -> None:
        """Call what is due ``"before"`` or ``"after"`` the step."""
        if initialises_state(optimizer):
            return
        if self._held.by(optimizer):
            self.optimizers.setdefault(optimizer)
        elif when == "after":
            when = "other"
        else:
            return
        callback = self._callbacks[when]()
        if callback is not None:
            callback(optimizer)

    def close(self) -> None:
        """Stop calling."""
        _active.discard(self)


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


class EndOfBackward:
    """Calls ``callback(optimizers)`` with those that have stepped: at once, or at the end of the backward in which they
    step.

    Optimizers of single parameters, in gradient hooks, step while the backward still needs the parameters of other
    layers, and of their own.
    """

    def __init__(self, callback: Callable[[list[Optimizer]], None]) -> None:
        """``callback`` must be a bound method, and is referenced weakly."""
        self._callback = weakref.WeakMethod(callback)
        self._stepped: list[Optimizer] = []
        self._backward = -1  # in which the call is registered

    def step(self, optimizer: Optimizer) -> None:
        """``optimizer`` has stepped."""
        self._stepped.append(optimizer)
        if not in_backward():
            self._call()
        elif self._backward != (current := torch._C._current_graph_task_id()):
            self._backward = current
            torch.autograd.Variable._execution_engine.queue_callback(self._call)

    def _call(self) -> None:
        stepped, self._stepped = self._stepped, []
        if stepped and (callback := self._callback()) is not None:
            callback(stepped)


class OtherOptimizers:
    """Warns of an optimizer that holds frozen weights of a model and no adapter, if none trains the adapters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._waits: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # steps until it is told

    def step(self, optimizer: Optimizer) -> None:
        """``optimizer`` has stepped, and none that holds adapters has."""
        if optimizer not in self._waits:
            frozen = {id(param) for param in self._model.parameters() if not param.requires_grad}
            held = [param for group in optimizer.param_groups for param in group["params"]]
            if frozen.isdisjoint(map(id, held)):
                self._waits[optimizer] = -1
            else:
                # With a head among them, it may be the first of two optimizers, and the other one has the adapters.
                self._waits[optimizer] = 2 if any(param.requires_grad for param in held) else 1
        self._waits[optimizer] -= 1
        if self._waits[optimizer] == 0:
            warnings.warn(
                f"L1RA: {type(optimizer).__name__} holds weights that l1ra.patch has frozen and no adapter, so that no "
                "adapter learns anything. Make the optimizer after l1ra.patch: "
                "torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).",
                stacklevel=2,
            )


class BackwardCounter:
    """Warns once when many backward passes have gone by without an optimizer step."""

    LIMIT = 256

    def __init__(self, param: torch.nn.Parameter, first: Callable[[], object]) -> None:
        """Count the backward passes that reach ``param``.

        Args:
            first: called in the first one after each step. It must be a bound method, and is referenced weakly.
        """
        self.count = 0
        self.warned = False
        self._first = weakref.WeakMethod(first)
        counter = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            if (me := counter()) is not None:
                me.count_backward()

        self._handle = param.register_post_accumulate_grad_hook(hook)

    def count_backward(self) -> None:
        self.count += 1
        if self.count == 1 and (first := self._first()) is not None:
            first()
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
