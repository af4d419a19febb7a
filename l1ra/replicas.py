"""Data-parallel training: each process has a replica of the model, and all must take the same decisions.

What decides is the same everywhere to the last bit, gradients being averaged; the first process' word counts all the
same, for a single rank that differs would let the replicas drift apart for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

from l1ra.linear import L1RALinear

__all__ = ["add_up", "agreed", "count", "hindrance", "number"]

T = TypeVar("T")


def count() -> int:
    """Processes that train together; 1 outside of distributed training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def agreed(value: T) -> T:
    """The first process' ``value``. All processes must call it; what is passed must be picklable."""
    if count() == 1:
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes the sum over all processes, which must all call it with tensors of the same shapes."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def hindrance(layers: Iterable[L1RALinear]) -> str:
    """Why ranks can't move in this distributed training, as the end of a sentence; "" if they can.

    To be asked in an optimizer's step, when the gradients are there. Without ``reserve``, nothing is sent.
    """
    layers = list(layers)
    if any(layer.reserve is None for layer in layers):
        return (
            "DistributedDataParallel needs tensors that keep their shapes. Pass reserve=<rows> to l1ra.patch, two to "
            "four times the mean rank"
        )
    found: list = [None] * count()
    distributed.all_gather_object(found, _fingerprint(layers))
    if found[0] is None or any(other != found[0] for other in found):
        return (
            "the gradients of its processes are not the same, whole tensors: ranks move with DistributedDataParallel, "
            "not where adapters are sharded (FSDP, ZeRO) or each process trains for itself"
        )
    return ""


def _fingerprint(layers: Sequence[L1RALinear]) -> tuple | None:
    """Of the first gradient of a B that is not 0; the gates' and A's are 0 at first. None if there is none."""
    for place, layer in enumerate(layers):
        grad = layer.lora_B.grad
        if type(grad) is Tensor and grad.any():
            values = grad.detach().double()
            return place, *(repr(part.item()) for part in (values.sum(), values.abs().sum(), values.square().sum()))
    return None
