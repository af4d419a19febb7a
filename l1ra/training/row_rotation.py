"""Rotation of rows of many tensors, in one matrix product for all that are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l1ra.layers.precision import widest_float
from l1ra.layers.row_moves import row_runs
from l1ra.layers.tensor_lists import batches, copy_all_, grouped, transferred

__all__ = ["RowRotation", "grams", "rotate_rows"]


class RowRotation(NamedTuple):
    """A rotation of rows of one tensor.

    Attributes:
        tensor: ``(r, ...)``, of a floating dtype; changed in place.
        rows: the n rows that are rotated, ascending.
        matrix: ``(n, n)``, of any device and dtype.
        squared: multiply by the squares of ``matrix`` instead.
    """

    tensor: Tensor
    rows: Sequence[int]
    matrix: Tensor
    squared: bool = False


@torch.no_grad()
def rotate_rows(rotations: Sequence[RowRotation]) -> None:
    """Carry out all rotations, each product in the widest dtype of its device."""
    matrices = _on_devices(rotations)
    kinds = grouped(rotations, lambda rotation: (rotation.tensor.device, rotation.tensor.dtype, rotation.squared))
    for (device, dtype, squared), alike in kinds.items():
        some = [rotations[i] for i in alike]
        for chosen, slices, rows in _stacked([(rotation.tensor, rotation.rows) for rotation in some]):
            matrix = torch.stack([matrices[id(some[i].matrix), device] for i in chosen])
            rotated = torch.bmm(matrix.square() if squared else matrix, rows).to(dtype).view(-1, *slices[0].shape[1:])
            copy_all_(slices, rotated.split([len(part) for part in slices]))


@torch.no_grad()
def grams(tensors: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
    """For each tensor ``(r, ...)`` and n of its rows the products of all pairs of these rows.

    Returns:
        For each tensor ``(n, n)`` on the CPU, in the widest dtype of the tensor's device.
    """
    found: dict[int, Tensor] = {}
    for chosen, _, rows in _stacked(tensors):
        found |= zip(chosen, torch.bmm(rows, rows.mT), strict=True)
    return transferred([found[i] for i in range(len(tensors))], torch.device("cpu"))


def _stacked(tensors: Sequence[tuple[Tensor, Sequence[int]]]) -> Iterator[tuple[Sequence[int], list[Tensor], Tensor]]:
    """The rows of tensors that are alike: the indices of k tensors, views of the rows, and a copy ``(k, n, width)`` of
    them in the widest dtype of the device."""
    kinds = grouped(tensors, lambda pair: (pair[0].device, pair[0].dtype, pair[0].shape[1:], len(pair[1])))
    for (device, _, shape, count), alike in kinds.items():
        width = shape.numel()
        for chosen in batches(alike, count * width):
            slices = [tensors[i][0].detach()[run] for i in chosen for run in row_runs(tensors[i][1])]
            yield chosen, slices, torch.cat(slices).view(len(chosen), count, width).to(widest_float(device))


def _on_devices(rotations: Sequence[RowRotation]) -> dict[tuple[int, torch.device], Tensor]:
    """The matrices on the devices on which they are needed."""
    found = {}
    for device, chosen in grouped(rotations, lambda rotation: rotation.tensor.device).items():
        matrices = list({id(rotations[i].matrix): rotations[i].matrix for i in chosen}.values())
        there = transferred(matrices, device, widest_float(device))
        found |= {(id(matrix), device): moved for matrix, moved in zip(matrices, there, strict=True)}
    return found
