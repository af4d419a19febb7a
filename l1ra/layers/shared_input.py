"""Adapted layers that read the same input, computed together: x is read once for all of them, forward and backward.

Nothing but the time may tell. So who is computed together with a graph changes only once the parameters have been
stepped, and a recompute repeats its forward. With dropout each layer computes alone: its mask is drawn when it is
called, whoever is called besides.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from l1ra.layers.recompute import active_saved_tensor_hooks, in_backward, repeat_decision
from l1ra_kernels import dispatch

__all__ = ["SharedInput", "learn_groups", "learned_groups", "share_inputs"]

MISSES = 3  # computed for nothing so many times in a row, a layer computes alone after the next step


class Sharer(Protocol):
    """What is asked of a layer: ``L1RALinear`` has it."""

    in_features: int
    dropout_now: float
    parameter_version: int
    output_version: tuple
    lora_A: Tensor
    weight: Tensor
    sharing: SharedInput | None

    def call_path(self, x: Tensor) -> dispatch.Path | None: ...

    def kernel_inputs(self) -> dispatch.Layer: ...


class _Seen:
    """An input, to be recognised: the same tensor, not written to since, and with the graph kept by the same one."""

    def __init__(self, x: Tensor) -> None:
        hooks = active_saved_tensor_hooks()
        self._x = weakref.ref(x)
        self._hooks = None if hooks is None else _weakly(hooks)
        self._state = self._state_of(x)

    @staticmethod
    def _state_of(x: Tensor) -> tuple:
        return x._version, x.requires_grad, torch.is_grad_enabled()

    def __call__(self, x: Tensor) -> bool:
        hooks = active_saved_tensor_hooks()
        kept_alike = self._hooks is None if hooks is None else self._hooks is not None and self._hooks() is hooks
        return kept_alike and self._x() is x and self._state == self._state_of(x)


def _weakly(hooks: Any) -> Callable[[], Any]:
    """Those of a checkpointed region hold its inputs: they must not be kept."""
    try:
        return weakref.ref(hooks)
    except TypeError:
        return lambda: hooks


class _Group:
    """A layer that leads, and those that follow it."""

    def __init__(self, leader: Sharer, followers: Sequence[Sharer] = ()) -> None:
        self.learned: dict[Sharer, None] = dict.fromkeys(followers)  # as far as the calls have shown
        self._settled = tuple(followers)  # what was learned when the parameters were stepped the last time
        self._stepped_at = leader.parameter_version

    def followers(self, leader: Sharer) -> tuple[Sharer, ...]:
        """Who is computed together with ``leader`` now."""
        if not torch.is_grad_enabled():
            return tuple(self.learned)
        # Within a backward a step may be that of an optimizer which steps there; a reentrant recompute is free to go by
        # it, for it is held to no number of tensors.
        if leader.parameter_version != self._stepped_at and not (
            in_backward() and active_saved_tensor_hooks() is not None
        ):
            self._settled, self._stepped_at = tuple(self.learned), leader.parameter_version
        return self._settled


class _Offer(NamedTuple):
    """What a leader has computed for its followers: of each the output, and the version of the layer. An output of
    parameters that have been written to since is no good."""

    seen: _Seen
    outputs: dict[Sharer, tuple[Tensor, tuple]]


class _Now(threading.local):
    """What a thread is at: the layer that led last, its input, and what is on offer."""

    leader: Sharer | None = None
    seen: _Seen | None = None
    offer: _Offer | None = None


class SharedInput:
    """The adapted layers of one parent module, such as q, k, v and o of an attention.

    Who shares with whom is learned from the calls: a layer that gets the very tensor that another one got just before
    follows that one. Once the parameters have been stepped, or at once where no graph is kept, the leader computes the
    outputs of its followers along with its own, and they take them when they are called with the same tensor. A
    follower whose outputs go unused several times in a row computes alone again.
    """

    def __init__(self) -> None:
        self._groups: dict[Sharer, _Group] = {}
        self._misses: dict[Sharer, int] = {}
        self._now = _Now()

    def __reduce__(self) -> tuple:
        # What was learned names layers of one model; a copy learns anew.
        return (SharedInput, ())

    def take(self, layer: Sharer, x: Tensor) -> Tensor | None:
        """The output of ``layer``, or None if it has to compute alone. Called with a fused dense path only."""
        if torch.compiler.is_compiling() or layer.dropout_now:
            return None
        # Tensors of inference mode don't tell whether they were written to.
        if x.is_inference() or layer.weight.is_inference() or layer.lora_A.is_inference():
            return None
        now = self._now
        if now.offer is not None and layer in now.offer.outputs and now.offer.seen(x):
            output, version = now.offer.outputs.pop(layer)
            if version == layer.output_version:
                self._misses[layer] = 0
                return output
        if now.leader is None or now.leader is layer or not now.seen(x):
            return self._lead(layer, x)
        learned = self._groups[now.leader].learned
        if not (layer in learned or self.gave_up(layer) or in_backward()):
            learned[layer] = None
        return None

    def _lead(self, layer: Sharer, x: Tensor) -> Tensor | None:
        now = self._now
        group = self._groups.get(layer)
        if group is None:
            group = self._groups.setdefault(layer, _Group(layer))
        now.leader, now.seen = layer, _Seen(x)
        followers = repeat_decision((self, layer), lambda: group.followers(layer), otherwise=tuple)
        fit = [layer, *(follower for follower in followers if self._fits(follower, layer, x))]
        if len(fit) == 1:
            return None
        _withdraw_last()
        outputs = dispatch.gated_linears(x, [m.kernel_inputs() for m in fit], 0.0, dispatch.CHAIN)
        now.offer = _Offer(now.seen, {m: (y, m.output_version) for m, y in zip(fit[1:], outputs[1:], strict=True)})
        _offering.last = weakref.ref(self)
        return outputs[0]

    def withdraw(self) -> None:
        """Drop the outputs that nobody in this thread has taken."""
        unused, self._now.offer = () if self._now.offer is None else self._now.offer.outputs, None
        if in_backward():
            return
        for layer in unused:
            self._misses[layer] = self._misses.get(layer, 0) + 1
            if self.gave_up(layer):
                for group in tuple(self._groups.values()):
                    group.learned.pop(layer, None)

    def learned(self) -> dict[Sharer, list[Sharer]]:
        """Leaders and who follows them, as far as the calls have shown."""
        return {leader: list(group.learned) for leader, group in tuple(self._groups.items()) if group.learned}

    def learn(self, groups: Mapping[Sharer, Sequence[Sharer]]) -> None:
        """Go on from what was :meth:`learned` elsewhere, from the next forward on."""
        self._groups = {leader: _Group(leader, followers) for leader, followers in groups.items()}

    def partners(self, layer: Sharer) -> list[Sharer]:
        """The layers that share an input with ``layer``, as far as the calls have shown."""
        for leader, followers in self.learned().items():
            if layer is leader or layer in followers:
                return [other for other in (leader, *followers) if other is not layer]
        return []

    def gave_up(self, layer: Sharer) -> bool:
        """Whether ``layer`` was computed for nothing too often."""
        return self._misses.get(layer, 0) >= MISSES

    @staticmethod
    def _fits(layer: Sharer, leader: Sharer, x: Tensor) -> bool:
        path = layer.call_path(x)
        dense = path is not None and path.fused and path.dense
        return dense and not layer.dropout_now and layer.sharing is leader.sharing


# An output that nobody takes holds the graph of its forward. There is one offer at a time, so that a forward which was
# broken off, by an out-of-memory error say, takes no memory any more when the batch is tried again.
_offering = threading.local()


def _withdraw_last() -> None:
    last = getattr(_offering, "last", lambda: None)()
    if last is not None:
        last.withdraw()


def learned_groups(adapters: Mapping[str, Sharer]) -> dict[str, list[str]]:
    """What all layers have learned, by name: it decides in which order gradients are summed, to the last bit."""
    names = {layer: name for name, layer in adapters.items()}
    return {
        names[leader]: [names[layer] for layer in followers]
        for sharing in _sharings(adapters)
        for leader, followers in sharing.learned().items()
    }


def learn_groups(adapters: Mapping[str, Sharer], groups: Mapping[str, Sequence[str]]) -> None:
    """Go on from :func:`learned_groups` of a model like this one; layers that are no siblings here stay apart."""
    for sharing in _sharings(adapters):
        mine = {name: layer for name, layer in adapters.items() if layer.sharing is sharing}
        sharing.learn(
            {mine[n]: [mine[f] for f in followers if f in mine] for n, followers in groups.items() if n in mine}
        )


def _sharings(adapters: Mapping[str, Sharer]) -> list[SharedInput]:
    return list(dict.fromkeys(layer.sharing for layer in adapters.values() if layer.sharing is not None))


def share_inputs(model: nn.Module, adapters: Iterable[Sharer]) -> None:
    """Give the adapted children of one parent that take inputs of one size a :class:`SharedInput`."""
    chosen = set(adapters)
    for parent in model.modules():
        children: dict[int, list[Sharer]] = {}
        for child in parent.children():
            if child in chosen:
                children.setdefault(child.in_features, []).append(child)
        for siblings in children.values():
            if len(siblings) > 1:
                sharing = SharedInput()
                for layer in siblings:
                    layer.sharing = sharing
