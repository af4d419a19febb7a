"""Joint computation of adapted layers that read the same input, such as q, k and v of an attention.

The input is read once for all of these layers, in the forward and in the backward. Results must not depend on whether
layers are computed jointly. Therefore the layers that are computed jointly with a graph change only after the
parameters have been written to, as by an optimizer step, and a recompute repeats what its forward did. With dropout
each layer is computed alone, because its mask is drawn when it is called, whichever other layers are called.
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

__all__ = ["SharedInput", "learned_groups", "load_groups", "share_inputs"]

MAX_UNUSED = 3  # times in a row; a layer with so many unused outputs is computed alone from the next step on


class SharingLayer(Protocol):
    """The part of ``L1RALinear`` that is used here."""

    in_features: int
    dropout_p: float
    parameter_version: int
    output_version: tuple
    counts_versions: bool
    sharing: SharedInput | None

    def call_path(self, x: Tensor) -> dispatch.Path | None: ...

    def kernel_inputs(self) -> dispatch.Layer: ...


class _InputIdentity:
    """Recognises an input: the same tensor object, not written to since, whose graph is saved by the same hooks."""

    def __init__(self, x: Tensor) -> None:
        hooks = active_saved_tensor_hooks()
        self._x = weakref.ref(x)
        self._hooks = None if hooks is None else _weak_reference(hooks)
        self._state = self._state_of(x)

    @staticmethod
    def _state_of(x: Tensor) -> tuple:
        return x._version, x.requires_grad, torch.is_grad_enabled()

    def matches(self, x: Tensor) -> bool:
        """Whether ``x`` is this input."""
        hooks = active_saved_tensor_hooks()
        same_hooks = self._hooks is None if hooks is None else self._hooks is not None and self._hooks() is hooks
        return same_hooks and self._x() is x and self._state == self._state_of(x)


def _weak_reference(hooks: Any) -> Callable[[], Any]:
    """A weak reference where possible: the hooks of a checkpointed region hold its inputs, which must be freed."""
    try:
        return weakref.ref(hooks)
    except TypeError:
        return lambda: hooks


class _Group:
    """The layers that follow a leading layer: its followers have been called with the same input after it.

    Attributes:
        learned: the followers observed in the calls so far; a dict used as an ordered set.
    """

    def __init__(self, leader: SharingLayer, followers: Sequence[SharingLayer] = ()) -> None:
        self.learned: dict[SharingLayer, None] = dict.fromkeys(followers)
        self._at_last_step = tuple(followers)  # a copy of learned at the last step of the parameters
        self._stepped_at = leader.parameter_version

    def learn(self, follower: SharingLayer, leader: SharingLayer) -> None:
        """Add a layer that has been called with the leader's input."""
        if not (self.learned or self._at_last_step):
            self._stepped_at = leader.parameter_version
        self.learned[follower] = None

    def followers(self, leader: SharingLayer) -> tuple[SharingLayer, ...]:
        """The layers to be computed jointly with ``leader`` now."""
        if not (self.learned or self._at_last_step):
            return ()
        if not torch.is_grad_enabled():
            return tuple(self.learned)
        # Some optimizers step within the backward. A recompute within that backward must not use the new followers,
        # unless it is reentrant: then it need not save as many tensors as its forward.
        if leader.parameter_version != self._stepped_at and not (
            in_backward() and active_saved_tensor_hooks() is not None
        ):
            self._at_last_step, self._stepped_at = tuple(self.learned), leader.parameter_version
        return self._at_last_step


class _Precomputed(NamedTuple):
    """The outputs that a leader has computed for its followers.

    Attributes:
        input: the input from which they were computed.
        outputs: for each follower its output, and its ``output_version`` at that time. An output is invalid if that
            version has changed.
    """

    input: _InputIdentity
    outputs: dict[SharingLayer, tuple[Tensor, tuple]]


class _ThreadState(threading.local):
    """State of one thread: the last leader, the input of its last call, and the precomputed outputs."""

    leader: SharingLayer | None = None
    input: _InputIdentity | None = None
    precomputed: _Precomputed | None = None


class SharedInput:
    """The adapted layers of one parent module, such as q, k, v and o of an attention, and which of them share inputs.

    Groups are learned from the calls. The first layer that is called with a tensor is the leader; the layers that are
    called next with the same tensor are its followers. From the next step of the parameters on (without a graph:
    immediately) the leader computes the outputs of its followers together with its own. A follower returns that output
    when it is called with the same tensor. A follower whose outputs remain unused several times in a row is computed
    alone again.
    """

    def __init__(self) -> None:
        self._groups: dict[SharingLayer, _Group] = {}
        self._unused: dict[SharingLayer, int] = {}
        self._thread = _ThreadState()

    def __reduce__(self) -> tuple:
        # The groups refer to the layers of one model. A copy learns its own.
        return (SharedInput, ())

    def output_for(self, layer: SharingLayer, x: Tensor) -> Tensor | None:
        """The output of ``layer`` for ``x``, or None if it has to be computed alone.

        Only called if the path of ``layer`` is fused and dense.
        """
        if torch.compiler.is_compiling() or layer.dropout_p:
            return None
        if x.is_inference() or not layer.counts_versions:
            return None
        state = self._thread
        if state.precomputed is not None and layer in state.precomputed.outputs and state.precomputed.input.matches(x):
            output, version = state.precomputed.outputs.pop(layer)
            if version == layer.output_version:
                self._unused[layer] = 0
                return output
        if state.leader is None or state.leader is layer or not state.input.matches(x):
            return self._lead(layer, x)
        group = self._groups[state.leader]
        if not (layer in group.learned or self.computes_alone(layer) or in_backward()):
            group.learn(layer, state.leader)
        return None

    def _lead(self, layer: SharingLayer, x: Tensor) -> Tensor | None:
        """Make ``layer`` the leader, and compute its output and those of its followers; None if it has none."""
        state = self._thread
        group = self._groups.get(layer)
        if group is None:
            group = self._groups.setdefault(layer, _Group(layer))
        state.leader, state.input = layer, _InputIdentity(x)
        followers = repeat_decision((self, layer), lambda: group.followers(layer), default=tuple)
        joint = [layer, *(follower for follower in followers if self._can_join(follower, layer, x))]
        if len(joint) == 1:
            return None
        _discard_last_precomputed()
        outputs = dispatch.gated_linears(x, [m.kernel_inputs() for m in joint], 0.0, dispatch.CHAIN)
        state.precomputed = _Precomputed(
            state.input, {m: (y, m.output_version) for m, y in zip(joint[1:], outputs[1:], strict=True)}
        )
        _last.sharing = weakref.ref(self)
        return outputs[0]

    def discard_precomputed(self) -> None:
        """Drop the precomputed outputs that have not been used in this thread."""
        unused = () if self._thread.precomputed is None else self._thread.precomputed.outputs
        self._thread.precomputed = None
        if in_backward():
            return
        for layer in unused:
            self._unused[layer] = self._unused.get(layer, 0) + 1
            if self.computes_alone(layer):
                for group in tuple(self._groups.values()):
                    group.learned.pop(layer, None)

    def learned(self) -> dict[SharingLayer, list[SharingLayer]]:
        """Leader -> its followers, as observed in the calls so far."""
        return {leader: list(group.learned) for leader, group in tuple(self._groups.items()) if group.learned}

    def load(self, groups: Mapping[SharingLayer, Sequence[SharingLayer]]) -> None:
        """Replace the groups by a result of :meth:`learned`, from the next forward on."""
        self._groups = {leader: _Group(leader, followers) for leader, followers in groups.items()}

    def partners(self, layer: SharingLayer) -> list[SharingLayer]:
        """The layers that share an input with ``layer``, as observed in the calls so far."""
        for leader, followers in self.learned().items():
            if layer is leader or layer in followers:
                return [other for other in (leader, *followers) if other is not layer]
        return []

    def computes_alone(self, layer: SharingLayer) -> bool:
        """Whether ``layer`` is computed alone because its precomputed outputs remained unused too often."""
        return self._unused.get(layer, 0) >= MAX_UNUSED

    @staticmethod
    def _can_join(layer: SharingLayer, leader: SharingLayer, x: Tensor) -> bool:
        path = layer.call_path(x)
        dense = path is not None and path.fused and path.dense
        return dense and not layer.dropout_p and layer.sharing is leader.sharing


# The SharedInput of this thread that has precomputed outputs. An unused output holds the graph of its forward. Only one
# SharedInput has any at a time. So a forward that was interrupted, e.g. by an out-of-memory error, occupies no memory
# any more when the batch is tried again.
_last = threading.local()


def _discard_last_precomputed() -> None:
    last = getattr(_last, "sharing", lambda: None)()
    if last is not None:
        last.discard_precomputed()


def learned_groups(adapters: Mapping[str, SharingLayer]) -> dict[str, list[str]]:
    """Name of each leader -> names of its followers.

    The groups determine the order in which gradients are summed, and so their last bits. They are part of a checkpoint
    for that reason.
    """
    names = {layer: name for name, layer in adapters.items()}
    return {
        names[leader]: [names[layer] for layer in followers]
        for sharing in _sharings(adapters)
        for leader, followers in sharing.learned().items()
    }


def load_groups(adapters: Mapping[str, SharingLayer], groups: Mapping[str, Sequence[str]]) -> None:
    """Replace the groups by a result of :func:`learned_groups`, which may be of another model of the same structure.

    Layers that do not belong to one :class:`SharedInput` are not put into one group.
    """
    for sharing in _sharings(adapters):
        members = {name: layer for name, layer in adapters.items() if layer.sharing is sharing}
        sharing.load(
            {
                members[leader]: [members[f] for f in followers if f in members]
                for leader, followers in groups.items()
                if leader in members
            }
        )


def _sharings(adapters: Mapping[str, SharingLayer]) -> list[SharedInput]:
    return list(dict.fromkeys(layer.sharing for layer in adapters.values() if layer.sharing is not None))


def share_inputs(model: nn.Module, adapters: Iterable[SharingLayer]) -> None:
    """Set ``sharing`` of the adapted layers of ``model``.

    Adapted layers with the same parent module and the same ``in_features`` get a common :class:`SharedInput`.
    """
    chosen = set(adapters)
    for parent in model.modules():
        children: dict[int, list[SharingLayer]] = {}
        for child in parent.children():
            if child in chosen:
                children.setdefault(child.in_features, []).append(child)
        for siblings in children.values():
            if len(siblings) > 1:
                sharing = SharedInput()
                for layer in siblings:
                    layer.sharing = sharing
