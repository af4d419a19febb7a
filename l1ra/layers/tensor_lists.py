"""Operations on many tensors at once: an op or a transfer for each device and dtype, not for each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["add_all_", "batches", "copy_all_", "divide_all_", "grouped", "multiply_all_", "transferred", "views"]

T = TypeVar("T")

ELEMENTS = 1 << 24  # of tensors that are copied into one, about: what a temporary copy of all adapters would cost


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[int]]:
    """The indices of the items with each key, in order."""
    groups: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(key(item), []).append(i)
    return groups


def batches(indices: Sequence[int], elements: int) -> Iterator[Sequence[int]]:
    """Parts of ``indices``: of so many tensors that temporary copies take little memory, if each has ``elements``."""
    count = max(1, ELEMENTS // max(1, elements))
    for start in range(0, len(indices), count):
        yield indices[start : start + count]


def transferred(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The tensors on ``device`` in ``dtype`` (None: each in its own), without a graph.

    All tensors of another device or dtype are copied together, so that the host waits once for all of them. The copies
    share one storage. A tensor that needs no copy is returned itself.
    """
    found = [tensor.detach() for tensor in tensors]
    for own, chosen in grouped(found, _kind).items():
        wanted = device, own[1] if dtype is None else dtype
        if own != wanted:
            for i, copy in zip(chosen, _copies([found[i] for i in chosen], *wanted), strict=True):
                found[i] = copy
    return found


def _copies(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = [tensor.shape for tensor in tensors]
    # Some GPUs lack float64: dtypes change on the CPU.
    if tensors[0].device.type != "cpu":
        return views(torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device).to(dtype), shapes)
    flat = torch.empty(sum(map(math.prod, shapes)), dtype=dtype, device="cpu")
    torch._foreach_copy_(views(flat, shapes), tensors)
    return views(flat.to(device), shapes)


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of parts of ``flat``, of these shapes, in order."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.no_grad()
def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source, of any device and dtype, to its target of the same shape."""
    for (device, _), chosen in grouped(targets, _kind).items():
        parts = [sources[i] for i in chosen]
        if any(part.device != device for part in parts):
            parts = transferred(parts, device, targets[chosen[0]].dtype)
        torch._foreach_copy_([targets[i] for i in chosen], parts)


@torch.no_grad()
def add_all_(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Add a number to each tensor, in place."""
    for some, summands in _alike(tensors, numbers):
        torch._foreach_add_(some, summands)


@torch.no_grad()
def multiply_all_(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply each tensor by its factor, in place."""
    for some, numbers in _alike(tensors, factors):
        if some[0].element_size() < 4:  # CPUs would round the factors to 16 bits
            wide = transferred(some, some[0].device, torch.float32)
            torch._foreach_mul_(wide, numbers)
            torch._foreach_copy_(some, wide)
        else:
            torch._foreach_mul_(some, numbers)


@torch.no_grad()
def divide_all_(tensors: Sequence[Tensor], divisors: Sequence[float]) -> None:
    """Divide each tensor by its divisor, in place."""
    for some, numbers in _alike(tensors, divisors):
        torch._foreach_div_(some, numbers)


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _alike(tensors: Sequence[Tensor], numbers: Sequence[float]) -> Iterator[tuple[list[Tensor], list[float]]]:
    for chosen in grouped(tensors, _kind).values():
        yield [tensors[i] for i in chosen], [float(numbers[i]) for i in chosen]
