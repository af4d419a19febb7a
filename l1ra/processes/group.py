"""The processes that train one model together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from l1ra.layers.linear import L1RALinear
from l1ra.layers.tensor_lists import copy_all_, grouped, transferred, views
from l1ra.processes.digests import check_alike, digests, fingerprint

__all__ = ["ReplicaGroup", "launched_processes", "world_size"]

T = TypeVar("T")


class ReplicaGroup:
    """The processes that train replicas of one model; without a ``group``, this process alone.

    All processes must make the same calls in the same order.

    Attributes:
        group: of torch.distributed, or None.
        number: the rank of this process in the group.
        size: the number of processes.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group = group
        self._device = device
        self.number = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    def broadcast(self, value: T) -> T:
        """The picklable ``value`` of the first process."""
        if self.group is None:
            return value
        held = [value]
        with self._on_device():
            distributed.broadcast_object_list(held, distributed.get_global_rank(self.group, 0), self.group)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The picklable ``value`` of each process, in order."""
        if self.group is None:
            return [value]
        found: list = [None] * self.size
        with self._on_device():
            distributed.all_gather_object(found, value, self.group)
        return found

    def sum_over_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.group is None or not tensors:
            return
        first = tensors[0]
        flat = torch.cat([part.reshape(-1) for part in transferred(tensors, first.device, first.dtype)])
        distributed.all_reduce(flat, group=self.group)
        copy_all_(tensors, views(flat, [tensor.shape for tensor in tensors]))

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first process, in place."""
        for alike in grouped(tensors, lambda tensor: (tensor.device, tensor.dtype)).values():
            some = [tensors[i] for i in alike]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            distributed.broadcast(flat, distributed.get_global_rank(self.group, 0), self.group)
            copy_all_(some, views(flat, [tensor.shape for tensor in some]))

    def check_alike(self, adapters: Mapping[str, L1RALinear], gates: Tensor) -> None:
        """Check that all processes hold the same adapters, bit for bit.

        Args:
            adapters: by name.
            gates: the master gates of all ranks, ``(R,)``.

        Raises:
            ReplicasDiffer: they do not. All processes raise it.
        """
        if self.group is not None:
            own = digests(adapters, gates)
            # The digests of a thousand processes are too many to be sent and compared each time.
            if len(set(self.gather(fingerprint(own)))) > 1:
                check_alike(adapters.keys(), self.gather(own))

    def _on_device(self) -> AbstractContextManager:
        # NCCL sends objects from the current device, which is the first one in every process unless someone sets it.
        cuda = self._device is not None and self._device.type == "cuda"
        return torch.cuda.device(self._device) if cuda else nullcontext()


def world_size() -> int:
    """The number of processes of torch.distributed; 1 without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def launched_processes() -> int:
    """:func:`world_size`, or before torch.distributed is initialised the number that torchrun has launched."""
    return max(world_size(), int(os.environ.get("WORLD_SIZE") or 1))
