"""Data-parallel training: each process has a replica of the model, and all must take the same decisions.

What decides is the same everywhere to the last bit, gradients being averaged; the first process' word counts all the
same, for a single rank that differs would let the replicas drift apart for good.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from l1ra.layers.linear import L1RALinear

__all__ = ["NotReplicas", "Replicas", "join", "processes", "sharded"]

T = TypeVar("T")


class NotReplicas(Exception):
    """Why ranks can't move in this distributed training, as the end of a sentence."""


class Replicas:
    """The processes that train replicas of one model together; one process alone, without a ``group``.

    All of them must make the same calls in the same order.

    Attributes:
        number: which of them this one is, from 0.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device
        self.number = 0 if group is None else distributed.get_rank(group)

    def agreed(self, value: T) -> T:
        """The first process' ``value``, which must be picklable."""
        if self._group is None:
            return value
        held = [value]
        with self._on_device():
            distributed.broadcast_object_list(held, distributed.get_global_rank(self._group, 0), self._group)
        return held[0]

    def all(self, value: T) -> list[T]:
        """The ``value`` of each process, in order; it must be picklable."""
        if self._group is None:
            return [value]
        found: list = [None] * distributed.get_world_size(self._group)
        with self._on_device():
            distributed.all_gather_object(found, value, self._group)
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum over all processes."""
        if self._group is None or not tensors:
            return
        flat = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
        distributed.all_reduce(flat, group=self._group)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def _on_device(self) -> AbstractContextManager:
        # NCCL sends objects from the current device, which is the first one in every process unless someone sets it.
        cuda = self._device is not None and self._device.type == "cuda"
        return torch.cuda.device(self._device) if cuda else nullcontext()


def processes() -> int:
    """How many train at the same time, together or not; 1 outside of distributed training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sharded(layers: Iterable[L1RALinear]) -> bool:
    """Whether a process holds only a part of some adapter (FSDP 2)."""
    return processes() > 1 and any(
        type(param) is not nn.Parameter  # but a DTensor
        for layer in layers
        for param in (layer.lora_A, layer.gate, layer.lora_B)
    )


def join(layers: Sequence[L1RALinear], optimizer: Optimizer, same: Mapping[str, Any]) -> Replicas:
    """The replicas among which these adapters are trained.

    Nothing is sent before it is clear that there are replicas.

    Args:
        optimizer: that steps.
        same: what must be the same in all processes, by name.

    Raises:
        NotReplicas: there are none, or ranks can't move in them; then it is raised in each of them.
    """
    wrapper = _wrapper(layers)
    if wrapper is None:
        raise NotReplicas(
            "ranks move with DistributedDataParallel, not where adapters are sharded (FSDP, DeepSpeed) or each process "
            "trains for itself"
        )
    if any(layer.reserve is None for layer in layers):
        raise NotReplicas(
            "DistributedDataParallel needs tensors that keep their shapes. Pass reserve=<rows> to l1ra.patch, to begin "
            "with four times the mean rank"
        )
    if _zero(optimizer):
        raise NotReplicas("ZeroRedundancyOptimizer gives each process a part of the adapters. Take a plain optimizer")
    if wrapper._join_config.enable:
        raise NotReplicas("under Join processes stop at different steps. Give all of them as many batches")
    replicas = Replicas(wrapper.process_group, layers[0].lora_A.device)
    found = replicas.all(dict(same))
    for name in same:
        values = [part[name] for part in found]
        if any(value != values[0] for value in values):
            told = " and ".join(dict.fromkeys(str(value) for value in values))
            raise NotReplicas(f"its processes differ in {name}: {told}. Give all of them the same")
    return replicas


def _wrapper(layers: Sequence[L1RALinear]) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around all of these layers: nothing in the model itself points to it."""
    mine = {id(layer) for layer in layers}
    found = (o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel))
    return next((o for o in found if mine <= {id(module) for module in o.modules()}), None)


def _zero(optimizer: Optimizer) -> bool:
    """Whether it is the part of a ZeroRedundancyOptimizer that belongs to this process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return any(issubclass(type(o), ZeroRedundancyOptimizer) and o.optim is optimizer for o in gc.get_objects())
