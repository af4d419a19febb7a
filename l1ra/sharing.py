"""Adapted layers that read the same input, computed together: x is read once for all of them, forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l1ra_kernels import dispatch

if TYPE_CHECKING:
    from l1ra.linear import L1RALinear

__all__ = ["SharedInput", "share_inputs"]

MISSES = 3  # computed for nothing so many times in a row, a layer computes alone from then on


class SharedInput:
    """The adapted layers of one parent module, such as q, k, v and o of an attention.

    Who shares with whom is learned from the calls: the layers that get the very tensor that another one got just
    before follow that one. From the next forward on, the leader computes their outputs along with its own, and they
    take them when they are called, with the same tensor. A layer whose outputs go unused computes alone again.
    """

    def __init__(self) -> None:
        self._followers: dict[L1RALinear, list[L1RALinear]] = {}
        self._misses: dict[L1RALinear, int] = {}
        self._leader: L1RALinear | None = None
        self._seen: tuple = ()
        self._ready: dict[L1RALinear, Tensor] = {}

    def __reduce__(self) -> tuple:
        # What was learned names layers of one model; a copy learns anew.
        return (SharedInput, ())

    def take(self, layer: L1RALinear, x: Tensor) -> Tensor | None:
        """The output of ``layer``, or None if it has to compute alone. Called with the path ``"chain"`` only."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        if self._is_seen(x):
            if layer in self._ready:
                self._misses[layer] = 0
                return self._ready.pop(layer)
            leader = self._leader
            if leader is not layer and self._misses.get(layer, 0) < MISSES and layer not in self._followers[leader]:
                self._followers[leader].append(layer)
            return None
        self._give_up_unused()
        self._leader, self._seen = layer, (weakref.ref(x), x._version, torch.is_grad_enabled())
        members = [layer, *self._followers.setdefault(layer, [])]
        fit = [m for m in members if m is layer or self._fits(m, layer, x)]
        if len(fit) == 1:
            return None
        outputs = dispatch.gated_linears(x, [m.parts() for m in fit], layer.dropout_now, dispatch.CHAIN)
        self._ready = dict(zip(fit[1:], outputs[1:], strict=True))
        return outputs[0]

    def partners(self, layer: L1RALinear) -> list[L1RALinear]:
        """The layers that share an input with ``layer``, as far as the calls have shown."""
        for leader, followers in self._followers.items():
            if followers and (layer is leader or layer in followers):
                return [other for other in (leader, *followers) if other is not layer]
        return []

    def gave_up(self, layer: L1RALinear) -> bool:
        """Whether ``layer`` was computed for nothing too often."""
        return self._misses.get(layer, 0) >= MISSES

    def _is_seen(self, x: Tensor) -> bool:
        return bool(self._seen) and (self._seen[0]() is x) and self._seen[1:] == (x._version, torch.is_grad_enabled())

    def _give_up_unused(self) -> None:
        for layer in self._ready:
            self._misses[layer] = self._misses.get(layer, 0) + 1
            if self.gave_up(layer):
                self._followers[self._leader].remove(layer)
        self._ready = {}

    @staticmethod
    def _fits(layer: L1RALinear, leader: L1RALinear, x: Tensor) -> bool:
        return (
            not layer.merged
            and layer.dropout_now == leader.dropout_now
            and layer.path_on(x).name == "chain"
            and layer.sharing is leader.sharing
        )


def share_inputs(model: nn.Module, adapters: Iterable[L1RALinear]) -> None:
    """Give the adapted children of one parent that take inputs of one size a :class:`SharedInput`."""
    chosen = set(adapters)
    for parent in model.modules():
        children: dict[int, list[L1RALinear]] = {}
        for child in parent.children():
            if child in chosen:
                children.setdefault(child.in_features, []).append(child)
        for siblings in children.values():
            if len(siblings) > 1:
                sharing = SharedInput()
                for layer in siblings:
                    layer.sharing = sharing
