"""Adapters whose parameters an optimizer of DeepSpeed holds (ZeRO stages 1, 2 and 3).

DeepSpeed flattens the parameters into groups. Each process holds a part of every flat group in float32, with its
gradient and its optimizer state, and a plain torch optimizer steps these parts. The model's own parameters are copies:
whole ones (stages 1 and 2), or partitioned and empty outside of the forward (stage 3). DeepSpeed is not imported here
before somebody else has imported it: until then it holds nothing.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.low_rank import ADAPTER_PARAMETERS, GatedLowRank
from l1ra.layers.tensor_lists import copy_all_, views

__all__ = ["ZeroOptimizer", "find_zero_optimizer", "is_engine", "whole_parameters"]

# Attributes of DeepSpeed's optimizers: the flat parts of this process, and the model's parameters, both by group.
LAYOUTS = (
    ("fp32_partitioned_groups_flat", "fp16_groups"),  # stage 3
    ("single_partition_of_fp32_groups", "bit16_groups"),  # stages 1 and 2
    ("fp32_groups_flat_partition", "bf16_groups"),  # stage 1 in bfloat16 that accumulates gradients in float32
)
# Attributes that say that DeepSpeed steps parameters, or keeps them, elsewhere; and the settings that ask for it.
STEPS_ELSEWHERE = {"superoffload_cpu_optimizer": "super_offload", "zenflow": "zenflow"}
KEEPS_ELSEWHERE = {
    "swap_optimizer": "offload to NVMe",
    "params_in_nvme_and_cpu": "offload to NVMe",
    "backup_optimizer": "a ratio in offload_optimizer",
    "use_muon": "Muon",
    "_uses_muon": "Muon",
    "zero_quantized_weights": "zero_quantized_weights",
    "model_parallel_group": "tensor parallelism",
    "has_moe_layers": "DeepSpeed's own mixtures of experts",
}


def is_engine(module: nn.Module) -> bool:
    """Whether ``module`` is DeepSpeed's wrapper of a model."""
    engines = sys.modules.get("deepspeed.runtime.engine")
    return engines is not None and isinstance(module, engines.DeepSpeedEngine)


@contextmanager
def whole_parameters(params: Iterable[Tensor]) -> Iterator[None]:
    """A context in which these parameters are whole, to be read.

    If ZeRO stage 3 has partitioned them, all processes must enter the context together: each of them sends its parts.
    """
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def find_zero_optimizer(layers: Sequence[GatedLowRank], among: Iterable[object] | None = None) -> ZeroOptimizer | None:
    """DeepSpeed's optimizer that holds copies of parameters of ``layers``, None if there is none.

    Args:
        among: the objects to look at. None: all, since neither parameters nor models refer to it.
    """
    module = sys.modules.get("deepspeed.runtime.base_optimizer")
    if module is None:
        return None
    for found in gc.get_objects() if among is None else among:
        if issubclass(type(found), module.DeepSpeedOptimizer):
            own = {id(param) for layer in layers for param in _parameters(layer)}
            held = (p for _, groups in LAYOUTS for group in getattr(found, groups, ()) for p in group)
            if any(id(param) in own for param in held):
                return ZeroOptimizer(found, layers)
    return None


class _Part(NamedTuple):
    """The part of a parameter that is in a flat part of this process.

    Attributes:
        group: the number of the flat part.
        start: its first element there.
        offset: its first element in the flattened parameter.
        size: the number of its elements, perhaps 0.
    """

    group: int
    start: int
    offset: int
    size: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of the whole."""
        return whole.detach().reshape(-1).narrow(0, self.offset, self.size)

    def within(self, flat: Tensor) -> Tensor:
        """This part of the flat part."""
        return flat.detach().narrow(0, self.start, self.size)


class ZeroOptimizer:
    """What a controller needs of an optimizer of DeepSpeed that holds adapters.

    Attributes:
        optimizer: the torch optimizer that steps the flat parts, in turn, in each step of DeepSpeed's optimizer.
        group: the processes among which the parameters are divided.
        heard: whether the callbacks were there before the running step of DeepSpeed's optimizer began.
    """

    def __init__(self, theirs: Any, layers: Sequence[GatedLowRank]) -> None:
        """``theirs``: DeepSpeed's optimizer, which is referenced weakly."""
        self.optimizer: Optimizer = theirs.optimizer
        self.group = getattr(theirs, "dp_process_group", None)
        self.heard = False
        self._theirs = weakref.ref(theirs)
        self._layers = list(layers)
        self._flats, self._groups = next(((f, g) for f, g in LAYOUTS if hasattr(theirs, f)), ("", ""))
        self._parts = self._find_parts()
        self._stepped = False
        self._gradients: list[tuple[int, _Part, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], object]] = []

    @property
    def is_alive(self) -> bool:
        """Whether DeepSpeed's optimizer still exists."""
        return self._theirs() is not None

    def is_same(self, other: ZeroOptimizer) -> bool:
        """Whether ``other`` is for the same optimizer of DeepSpeed."""
        return self._theirs() is other._theirs()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: DeepSpeed trains the gates where nobody can keep it from doing so.
        """
        theirs = self._theirs()
        for attribute, setting in STEPS_ELSEWHERE.items():
            if getattr(theirs, attribute, None):
                raise RuntimeError(
                    f"with {setting} DeepSpeed itself would train the gates of the adapters: leave it out of "
                    "DeepSpeed's configuration."
                )

    def why_fixed(self) -> str:
        """Why rows of the adapters can't move, as the end of a sentence; empty if they can."""
        theirs = self._theirs()
        if not self._flats:
            return f"{type(theirs).__name__} of DeepSpeed keeps a second copy of adapters. Take ZeRO stage 1, 2 or 3"
        for attribute, setting in KEEPS_ELSEWHERE.items():
            if getattr(theirs, attribute, None):
                return f"with {setting} DeepSpeed keeps parts of the adapters where they can't be moved. Leave it out"
        if getattr(theirs, "zero_hpz_partition_size", 1) > 1:
            return "with zero_hpz_partition_size DeepSpeed keeps a second copy of adapters. Leave it out"
        if any(id(param) not in self._parts for layer in self._layers for param in _parameters(layer)):
            return "DeepSpeed's optimizer does not hold all parameters of the adapters. Give it all of them"
        for flat in getattr(theirs, self._flats):
            for name, value in self.optimizer.state.get(flat, {}).items():
                if not (_is_shared(value) or _has_elements(value, flat)):
                    kind = type(self.optimizer).__name__
                    return f"{kind} keeps {name!r} for flattened parameters, which has no rows. Take torch's AdamW"
        return ""

    # --- the steps

    def watch(self, before: Callable[[], object], in_step: Callable[[], object], after: Callable[[], object]) -> None:
        """Call back at each step of DeepSpeed's optimizer, and let no step move a gate.

        Args:
            before: called before the step.
            in_step: called within the step, before :attr:`optimizer` steps a group. A step that is skipped, because a
                gradient is not finite, makes no such call.
            after: called after a step that was not skipped.

        The three must be bound methods, and are referenced weakly.
        """
        theirs, mine = self._theirs(), weakref.ref(self)
        callbacks = [weakref.WeakMethod(callback) for callback in (before, in_step, after)]
        step = theirs.step

        def call(number: int) -> None:
            if (callback := callbacks[number]()) is not None:
                callback()

        def watched(*args: Any, **kwargs: Any) -> Any:
            me = mine()
            if me is None:
                return step(*args, **kwargs)
            call(0)
            me.heard, me._stepped, me._gradients = True, False, []
            kept = [] if me._flats else [layer._parameters["gate"].detach().clone() for layer in me._layers]
            try:
                result = step(*args, **kwargs)
            finally:
                me.heard = False
            if not me._flats:
                copy_all_([layer._parameters["gate"].data for layer in me._layers], kept)
            if me._stepped:
                call(2)
            return result

        def before_group(optimizer: Optimizer, *_: Any) -> None:
            if (me := mine()) is not None:
                me._stepped = True
                me._enter_group(optimizer)
                call(1)

        def after_group(*_: Any) -> None:
            if (me := mine()) is not None:
                me.restore_gates()

        theirs.step = watched
        optimizers = [o for o in (self.optimizer, getattr(theirs, "backup_optimizer", None)) if o is not None]
        handles = [o.register_step_pre_hook(before_group) for o in optimizers]
        handles += [o.register_step_post_hook(after_group) for o in optimizers]
        self._undo = [handle.remove for handle in handles]

        def restore_step() -> None:
            if (owner := mine() and mine()._theirs()) is not None and vars(owner).get("step") is watched:
                del owner.step

        self._undo.append(restore_step)

    def close(self) -> None:
        """Stop calling back."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _enter_group(self, optimizer: Optimizer) -> None:
        """Before ``optimizer`` steps flat parts: take the gradients of their gates, and remember the gates."""
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        flats = getattr(self._theirs(), self._flats) if self._flats else ()
        self._kept = []
        for i, layer in enumerate(self._layers):
            part = self._parts.get(id(layer._parameters["gate"]))
            flat = None if part is None or not part.size else flats[part.group]
            if id(flat) in stepped:
                self._kept.append((part.within(flat), part.within(flat).clone()))
                if flat.grad is not None:
                    self._gradients.append((i, part, part.within(flat.grad).clone()))

    def restore_gates(self) -> None:
        """Undo what a step of :attr:`optimizer` has done to gates. DeepSpeed copies them to the model after it."""
        copy_all_([gate for gate, _ in self._kept], [kept for _, kept in self._kept])
        self._kept = []

    def is_heard_by_all(self) -> bool:
        """Whether :attr:`heard` is true in all processes, which must call this together."""
        heard = torch.tensor(float(self.heard), device=self._layers[0]._parameters["gate"].device)
        distributed.all_reduce(heard, distributed.ReduceOp.MIN, self.group)
        return bool(heard)

    @torch.no_grad()
    def gate_gradients(self) -> dict[int, Tensor]:
        """The gradients of the gates in the last step: layer number -> ``(rows,)``.

        They are those that :attr:`optimizer` got: averaged, unscaled and clipped. All processes must call this
        together.
        """
        shapes = [self._shape(layer._parameters["gate"]) for layer in self._layers]
        flat = self._zeros(sum(shape.numel() for shape in shapes))
        found = views(flat, shapes)
        copy_all_([part.of(found[i]) for i, part, _ in self._gradients], [grad for *_, grad in self._gradients])
        self._gradients = []
        self._sum(flat)
        return dict(enumerate(found))

    # --- reading and writing

    def gates(self) -> list[Tensor]:
        """The gates of each layer, ``(rows,)`` float32. All processes must call this together."""
        return self._whole([layer._parameters["gate"] for layer in self._layers])

    def write_gates(self, values: Sequence[Tensor]) -> None:
        """Set the gates of the ranks of each layer. The gates of other rows become 0."""
        gates = [layer._parameters["gate"] for layer in self._layers]
        shapes = [self._shape(gate) for gate in gates]
        whole = views(values[0].new_zeros(sum(shape.numel() for shape in shapes)), shapes)
        copy_all_([row[: len(value)] for row, value in zip(whole, values, strict=True)], values)
        self._write(gates, whole)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block the adapters' parameters and their state in :attr:`optimizer` are whole plain tensors.

        Shapes must stay. All that was changed is written back at the end, also into the model's own copies. All
        processes must enter the block together.
        """
        owners = [(layer, name) for layer in self._layers for name in ADAPTER_PARAMETERS]
        params = [layer._parameters[name] for layer, name in owners]
        plain = [nn.Parameter(whole) for whole in self._whole(params)]
        states = self._gather_states(params)
        groups = self.optimizer.param_groups
        held = [group["params"] for group in groups]
        try:
            for (layer, name), param, state in zip(owners, plain, states, strict=True):
                layer._parameters[name] = param
                if state:
                    self.optimizer.state[param] = state
            for number, group in enumerate(groups):
                mine = [new for old, new in zip(params, plain, strict=True) if self._group_number(old) == number]
                group["params"] = [*held[number], *mine]
            yield
        finally:
            for group, before in zip(groups, held, strict=True):
                group["params"] = before
            for (layer, name), old, new in zip(owners, params, plain, strict=True):
                layer._parameters[name] = old
                self.optimizer.state.pop(new, None)
        self._write(params, plain)
        self._write_states(params, states)

    def _find_parts(self) -> dict[int, _Part]:
        """``id`` of each parameter of the adapters that DeepSpeed's optimizer holds -> its part in this process."""
        theirs, parts = self._theirs(), {}
        own = {id(param) for layer in self._layers for param in _parameters(layer)}
        for number, group in enumerate(getattr(theirs, self._groups, ())):
            for param in group:
                if id(param) not in own:
                    continue
                if is_partitioned(param):
                    sub_group, start, size = theirs.grad_position[theirs.get_param_id(param)]
                    offset = min(size * distributed.get_rank(self.group), param.ds_numel)
                    parts[id(param)] = _Part(sub_group, start, offset, min(size, param.ds_numel - offset))
                elif param._hp_mapping is None:
                    parts[id(param)] = _Part(number, 0, 0, 0)
                else:
                    here, there = param._hp_mapping.hp_fragment_address, param._hp_mapping.lp_fragment_address
                    parts[id(param)] = _Part(number, here.start, there.start, here.numel)
        return parts

    def _group_number(self, param: Tensor) -> int:
        """The number of the parameter group of :attr:`optimizer` that has the settings for ``param``."""
        number = self._parts[id(param)].group
        return getattr(self._theirs(), "sub_group_to_group_id", {}).get(number, number)

    @staticmethod
    def _shape(param: Tensor) -> torch.Size:
        return param.ds_shape if is_partitioned(param) else param.shape

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float32, device=self._layers[0]._parameters["gate"].device)

    def _sum(self, flat: Tensor) -> None:
        distributed.all_reduce(flat, group=self.group)

    def _flat_of(self, param: Tensor) -> Tensor:
        return getattr(self._theirs(), self._flats)[self._parts[id(param)].group]

    def _whole(self, params: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Tensor]:
        """The master copy of each parameter, or its state of these names, as a plain float32 tensor.

        One reduction gathers all: each process adds its parts to zeros.
        """
        shapes = [self._shape(param) for param in params]
        flat = self._zeros(sum(shape.numel() for shape in shapes))
        whole = views(flat, shapes)
        sources = [self._flat_of(param) for param in params]
        if names is not None:
            sources = [self.optimizer.state[source][name] for source, name in zip(sources, names, strict=True)]
        parts = [self._parts[id(param)] for param in params]
        pairs = [(p.of(w), p.within(s)) for p, w, s in zip(parts, whole, sources, strict=True) if p.size]
        copy_all_([target for target, _ in pairs], [source for _, source in pairs])
        self._sum(flat)
        return whole

    @torch.no_grad()
    def _write(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set parameters: the part of the master copy that is here, and the model's own copies."""
        targets, sources = [], []
        for param, value in zip(params, values, strict=True):
            part = self._parts.get(id(param))
            if part is not None and part.size:
                targets.append(part.within(self._flat_of(param)))
                sources.append(part.of(value))
            if not is_partitioned(param) or param.numel() == value.numel():
                targets.append(param.data)
                sources.append(value.detach())
            if is_partitioned(param) and part is not None and part.size:
                targets.append(param.ds_tensor.data.narrow(0, 0, part.size))
                sources.append(part.of(value))
        copy_all_(targets, sources)

    def _gather_states(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """For each parameter its state in :attr:`optimizer`, of whole tensors."""
        found: list[dict[str, Any]] = [{} for _ in params]
        wanted = []
        for i, param in enumerate(params):
            flat = self._flat_of(param)
            for name, value in self.optimizer.state.get(flat, {}).items():
                if _is_shared(value):
                    found[i][name] = value
                else:
                    wanted.append((i, name))
        whole = self._whole([params[i] for i, _ in wanted], [name for _, name in wanted]) if wanted else []
        for (i, name), value in zip(wanted, whole, strict=True):
            found[i][name] = value
        return found

    def _write_states(self, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
        targets, sources = [], []
        for param, state in zip(params, states, strict=True):
            flat, part = self._flat_of(param), self._parts[id(param)]
            for name, value in state.items():
                if part.size and not _is_shared(value):
                    targets.append(part.within(self.optimizer.state[flat][name]))
                    sources.append(part.of(value))
        copy_all_(targets, sources)


def _parameters(layer: GatedLowRank) -> list[nn.Parameter]:
    return [layer._parameters[name] for name in ADAPTER_PARAMETERS]


def _is_shared(value: Any) -> bool:
    """Whether a state belongs to all elements of a flat part, such as the number of steps."""
    return value is None or isinstance(value, int | float | str) or (isinstance(value, Tensor) and value.dim() == 0)


def _has_elements(value: Any, flat: Tensor) -> bool:
    """Whether a state has a number for each element of ``flat``."""
    return isinstance(value, Tensor) and value.shape == flat.shape and value.is_floating_point()
