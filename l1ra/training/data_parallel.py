"""Data-parallel training: every process holds a replica of the model and must move the same ranks.

Gradients are averaged, so all processes compute the same decisions. The decision of the first process is broadcast all
the same: a single rank that differs would let the replicas diverge.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.tensor_lists import copy_all_, transferred, views
from l1ra.layers.zero import ZeroOptimizer

__all__ = ["CannotMoveRanks", "ReplicaGroup", "adapters_are_sharded", "join_replicas", "join_zero", "world_size"]

T = TypeVar("T")


class CannotMoveRanks(Exception):
    """Ranks can't move in this distributed training. The message is the end of a sentence."""


class ReplicaGroup:
    """The processes that train replicas of one model; without a ``group``, this process alone.

    All processes must make the same calls in the same order.

    Attributes:
        number: the rank of this process in the group.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device
        self.number = 0 if group is None else distributed.get_rank(group)

    def broadcast(self, value: T) -> T:
        """The picklable ``value`` of the first process."""
        if self._group is None:
            return value
        held = [value]
        with self._on_device():
            distributed.broadcast_object_list(held, distributed.get_global_rank(self._group, 0), self._group)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The picklable ``value`` of each process, in order."""
        if self._group is None:
            return [value]
        found: list = [None] * distributed.get_world_size(self._group)
        with self._on_device():
            distributed.all_gather_object(found, value, self._group)
        return found

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self._group is None or not tensors:
            return
        first = tensors[0]
        flat = torch.cat([part.reshape(-1) for part in transferred(tensors, first.device, first.dtype)])
        distributed.all_reduce(flat, group=self._group)
        copy_all_(tensors, views(flat, [tensor.shape for tensor in tensors]))

    def _on_device(self) -> AbstractContextManager:
        # NCCL sends objects from the current device, which is the first one in every process unless someone sets it.
        cuda = self._device is not None and self._device.type == "cuda"
        return torch.cuda.device(self._device) if cuda else nullcontext()


def world_size() -> int:
    """The number of processes of torch.distributed; 1 without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def adapters_are_sharded(layers: Iterable[L1RALinear]) -> bool:
    """Whether this process holds only a part of some adapter, as under FSDP 2."""
    return world_size() > 1 and any(
        type(param) is not nn.Parameter  # but a DTensor
        for layer in layers
        for param in (layer.lora_A, layer.gate, layer.lora_B)
    )


def join_replicas(
    adapters: Mapping[str, L1RALinear], optimizers: Sequence[Optimizer], same: Mapping[str, Any]
) -> ReplicaGroup:
    """The group of processes that train these adapters with DistributedDataParallel.

    Nothing is sent before this process knows that it is in such a group.

    Args:
        optimizers: those that have stepped the adapters.
        same: the values that must be equal in all processes, by name.

    Raises:
        CannotMoveRanks: there is no such group, or ranks can't move in it. The processes of a group all raise it.
    """
    layers = list(adapters.values())
    wrapper = _wrapper_of(layers)
    if any(layer.reserve is None for layer in layers):
        raise CannotMoveRanks(
            "DistributedDataParallel needs tensors that keep their shapes. Pass reserve=<rows> to l1ra.patch, to begin "
            "with four times the mean rank"
        )
    if _any_is_zero(optimizers):
        raise CannotMoveRanks(
            "ZeroRedundancyOptimizer gives each process a part of the adapters. Take a plain optimizer"
        )
    if wrapper._join_config.enable:
        raise CannotMoveRanks("under Join processes stop at different steps. Give all of them as many batches")
    replicas = ReplicaGroup(wrapper.process_group, layers[0].lora_A.device)
    _compare(
        replicas, {**same, "the adapters' parameters that optimizers hold": _held_parameters(adapters, optimizers)}
    )
    return replicas


def join_zero(layers: Sequence[L1RALinear], zero: ZeroOptimizer, same: Mapping[str, Any]) -> ReplicaGroup:
    """The group of processes that train these adapters with DeepSpeed's ZeRO. All processes must call this together.

    Args:
        zero: DeepSpeed's optimizer, within its step.
        same: as in :func:`join_replicas`.

    Raises:
        CannotMoveRanks: ranks can't move there. All processes raise it.
    """
    if any(layer.reserve is None for layer in layers):
        raise CannotMoveRanks(
            "DeepSpeed needs tensors that keep their shapes. Pass reserve=<rows> to l1ra.patch, to begin with four "
            "times the mean rank"
        )
    if why := zero.why_fixed():
        raise CannotMoveRanks(why)
    replicas = ReplicaGroup(zero.group, layers[0].lora_A.device)
    _compare(replicas, same)
    return replicas


def _compare(replicas: ReplicaGroup, same: Mapping[str, Any]) -> None:
    """
    Raises:
        CannotMoveRanks: a value differs between the processes. All of them raise it.
    """
    found = replicas.gather(dict(same))
    for name in same:
        values = [part[name] for part in found]
        if any(value != values[0] for value in values):
            told = " and ".join(dict.fromkeys(str(value) for value in values))
            raise CannotMoveRanks(f"its processes differ in {name}: {told}. Give all of them the same")


# A wrapped model has no reference to its wrapper. torch reports each module that is put into another one, so wrappers
# are recorded when they are constructed, with the ids of the parameters that they contained, and whether they required
# a gradient: only such gradients are averaged.
_wrapped: WeakKeyDictionary[DistributedDataParallel, dict[int, bool]] = WeakKeyDictionary()


def _record_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and name == "module" and submodule is not None:
        _wrapped[module] = {id(param): param.requires_grad for param in submodule.parameters()}


register_module_module_registration_hook(_record_wrapper)


def _wrapper_of(layers: Sequence[L1RALinear]) -> DistributedDataParallel:
    mine = {id(layer) for layer in layers}
    wrappers = [w for w in _wrapped if mine <= {id(module) for module in w.modules()}]
    if not wrappers:
        raise CannotMoveRanks(
            "ranks move with DistributedDataParallel, not where adapters are sharded (FSDP, DeepSpeed) or each process "
            "trains for itself. Wrap the model anew if its wrapper is a copy or was unpickled"
        )
    params = [param for layer in layers for param in (layer.lora_A, layer.gate, layer.lora_B)]
    there = [w for w in wrappers if all(id(param) in _wrapped[w] for param in params)]
    if not there:
        raise CannotMoveRanks(
            "DistributedDataParallel was constructed before the adapters, so that it does not average their gradients. "
            "Call l1ra.patch first"
        )
    for wrapper in there:
        if all(_wrapped[wrapper][id(param)] for param in params if param.requires_grad):
            return wrapper
    raise CannotMoveRanks(
        "some adapters were frozen when DistributedDataParallel was constructed, so that it does not average their "
        "gradients. Construct it when all parameters to be trained require a gradient"
    )


def _held_parameters(adapters: Mapping[str, L1RALinear], optimizers: Sequence[Optimizer]) -> str:
    """The parameters of the adapters that the optimizers of this process hold, as a number and a checksum."""
    held = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    names = [f"{n}.{part}" for n, a in adapters.items() for part in ADAPTER_PARAMETERS if id(getattr(a, part)) in held]
    return f"{len(names)} (checksum {zlib.crc32(' '.join(names).encode()):08x})"


def _any_is_zero(optimizers: Iterable[Optimizer]) -> bool:
    """Whether a ZeroRedundancyOptimizer is among them. It steps the optimizer of its own part within its step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in optimizers)
