"""Adapted layers that read the same input, computed together: x is read once for all of them, forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from l1ra_kernels import dispatch

__all__ = ["SharedInput", "share_inputs"]

MISSES = 3  # computed for nothing so many times in a row, a layer computes alone from then on


class Sharer(Protocol):
    """What is asked of a layer: ``L1RALinear`` has it."""

    in_features: int
    merged: bool
    dropout_now: float
    version: tuple
    weight: Tensor
    sharing: SharedInput | None

    def path_on(self, x: Tensor) -> dispatch.Path: ...

    def parts(self) -> dispatch.Layer: ...


class _Group:
    """A layer that leads, those that follow it, and what it has computed for them."""

    def __init__(self) -> None:
        self.followers: list[Sharer] = []
        self.seen: _Seen | None = None
        # Output and version of the layer; an output of parameters that have been stepped since is no good.
        self.ready: dict[Sharer, tuple[Tensor, tuple]] = {}


class _Seen:
    """An input, to be recognised: the same tensor, not written to since, and gradients wanted or not as before."""

    def __init__(self, x: Tensor) -> None:
        self._x = weakref.ref(x)
        self._state = x._version, torch.is_grad_enabled()

    def __call__(self, x: Tensor) -> bool:
        return self._x() is x and self._state == (x._version, torch.is_grad_enabled())


class SharedInput:
    """The adapted layers of one parent module, such as q, k, v and o of an attention.

    Who shares with whom is learned from the calls: a layer that gets the very tensor that another one got just before
    follows that one. From the next forward on, the leader computes the outputs of its followers along with its own,
    and they take them when they are called with the same tensor. A follower whose outputs go unused several times in a
    row computes alone again.
    """

    def __init__(self) -> None:
        self._groups: dict[Sharer, _Group] = {}
        self._misses: dict[Sharer, int] = {}
        self._last: Sharer | None = None

    def __reduce__(self) -> tuple:
        # What was learned names layers of one model; a copy learns anew.
        return (SharedInput, ())

    def take(self, layer: Sharer, x: Tensor) -> Tensor | None:
        """The output of ``layer``, or None if it has to compute alone. Called with a fused dense path only."""
        # Tensors of inference mode don't tell whether they were written to.
        if torch.compiler.is_compiling() or x.is_inference() or layer.weight.is_inference():
            return None
        for group in self._groups.values():
            if layer in group.ready and group.seen(x):
                output, version = group.ready.pop(layer)
                if version == layer.version:
                    self._misses[layer] = 0
                    return output
        last = self._groups.get(self._last)
        if last is not None and self._last is not layer and last.seen(x):
            if layer not in last.followers and not self.gave_up(layer):
                last.followers.append(layer)
            return None
        return self._lead(layer, x)

    def _lead(self, layer: Sharer, x: Tensor) -> Tensor | None:
        group = self._groups.setdefault(layer, _Group())
        for unused in group.ready:
            self._misses[unused] = self._misses.get(unused, 0) + 1
            if self.gave_up(unused):
                group.followers.remove(unused)
        group.ready, group.seen, self._last = {}, _Seen(x), layer
        fit = [layer, *(follower for follower in group.followers if self._fits(follower, layer, x))]
        if len(fit) == 1:
            return None
        outputs = dispatch.gated_linears(x, [m.parts() for m in fit], layer.dropout_now, dispatch.CHAIN)
        group.ready = {m: (y, m.version) for m, y in zip(fit[1:], outputs[1:], strict=True)}
        return outputs[0]

    def partners(self, layer: Sharer) -> list[Sharer]:
        """The layers that share an input with ``layer``, as far as the calls have shown."""
        for leader, group in self._groups.items():
            if group.followers and (layer is leader or layer in group.followers):
                return [other for other in (leader, *group.followers) if other is not layer]
        return []

    def gave_up(self, layer: Sharer) -> bool:
        """Whether ``layer`` was computed for nothing too often."""
        return self._misses.get(layer, 0) >= MISSES

    @staticmethod
    def _fits(layer: Sharer, leader: Sharer, x: Tensor) -> bool:
        path = layer.path_on(x)
        return (
            not layer.merged
            and layer.sharing is leader.sharing
            and layer.dropout_now == leader.dropout_now
            and path.fused
            and path.dense
        )


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
