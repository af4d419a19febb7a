"""Graphs whose backward has yet to run, and needs the tensors of an adapter as they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PendingGraphs"]


class PendingGraphs:
    """The calls of adapters whose outputs may still be differentiated.

    A call is forgotten when a backward reaches it that frees its graph, or when the graph is gone. It also no longer
    counts once a parameter of its adapter was written, as by an optimizer: torch then refuses to run its backward. So
    where each step trains all adapters, no call counts after it, and calls are not recorded.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        """Record calls of ``layers``, of type ``L1RALinear``, from now on."""
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._layers = layers
        self._trained_parts = False
        self._record(True)

    def after_step(self, *, trains_all: bool) -> None:
        """An optimizer has stepped, and has trained all adapters or some of them."""
        self._trained_parts |= not trains_all
        self._record(self._trained_parts)

    def stop(self) -> None:
        """Record no calls any more."""
        self._record(False)

    def _record(self, on: bool) -> None:
        if on != (self._layers[0].pending_graphs is self):
            for layer in self._layers:
                layer.pending_graphs = self if on else None

    def add(self, layer: Any, output: Tensor) -> None:
        """Record a call of an adapter that has returned ``output``."""
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(_Call(layer, self._calls))

    def __bool__(self) -> bool:
        """Whether a backward may still need the parameters of an adapter."""
        return any(call.is_valid for call in list(self._calls))


class _Call:
    """A hook of the graph, by which alone it is kept alive."""

    __slots__ = ("__weakref__", "_calls", "_layer", "_version")

    def __init__(self, layer: Any, calls: weakref.WeakSet) -> None:
        # Weak: a layer may keep its output, and with a cycle through the graph neither would ever be freed.
        self._layer = weakref.ref(layer)
        self._version, self._calls = layer.parameter_version, calls
        calls.add(self)

    def __call__(self, _: Any) -> None:
        # A graph that is retained may be differentiated again.
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._calls.discard(self)

    @property
    def is_valid(self) -> bool:
        layer = self._layer()
        return layer is not None and layer.parameter_version == self._version
