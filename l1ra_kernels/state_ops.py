"""Ops on gates and on row-wise state (parameters, optimizer state): a Triton kernel if it can run, else plain PyTorch.

``dispatch`` exports these ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l1ra_kernels import choice, reference
from l1ra_kernels.launch import on_device

__all__ = ["adam_gate_step", "adaptive_gate_step", "compact_rows_", "move_rows_many", "unless_not_finite"]

unless_not_finite = reference.unless_not_finite


def move_rows_many(tensors: Sequence[Tensor], sources: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Tensor]:
    """New tensors whose row i is row ``sources[i]`` of the old tensor, bit for bit, or ``fill`` if that is -1.

    Tensors of different dtypes and shapes are processed together, in one launch per device. Not differentiable.

    Args:
        tensors: each ``(r, ...)``, with any strides, of any dtype of up to 8 bytes per element.
        sources: for each tensor, the old row index of each new row, or -1.
        fills: for each tensor, the value of its new rows.

    Returns:
        For each tensor a new one ``(len(sources), ...)`` of the same dtype and device, which shares no memory.

    Raises:
        ValueError: a row index is out of range; or an element of a tensor is larger than 8 bytes (Triton only).
    """
    for r, rows in {(t.shape[0], tuple(source)) for t, source in zip(tensors, sources, strict=True)}:
        if any(not -1 <= row < r for row in rows):
            raise ValueError(f"sources must be row numbers below {r}, or -1 for a new row, not {rows}.")
    moved: list[Tensor | None] = [None] * len(tensors)
    for op, chosen in _by_device("move_rows_many", tensors):
        parts = op(*([values[i] for i in chosen] for values in (tensors, sources, fills)))
        for i, part in zip(chosen, parts, strict=True):
            moved[i] = part
    return moved


def compact_rows_(tensors: Sequence[Tensor], keeps: Sequence[Sequence[int]]) -> None:
    """Move the kept rows of each tensor to the front, in order and bit for bit, and set the rows behind them to 0.

    The tensors are changed in place, in one launch per device. This op is for tensors whose number of rows must not
    change. The rows that are not kept are not read.

    Args:
        tensors: each ``(r, ...)``, of any dtype and strides. No two tensors may share memory.
        keeps: for each tensor, the indices of the kept rows, in ascending order.

    Raises:
        ValueError: row indices are not ascending or out of range. Nothing is changed.
    """
    for r, keep in {(t.shape[0], tuple(keep)) for t, keep in zip(tensors, keeps, strict=True)}:
        if list(keep) != sorted(set(keep)) or any(not 0 <= row < r for row in keep):
            raise ValueError(f"keep must be rising row numbers below {r}, not {keep}.")
    for op, chosen in _by_device("compact_rows_", tensors):
        op([tensors[i] for i in chosen], [keeps[i] for i in chosen])


def adam_gate_step(gate: Tensor, *args: Tensor | None, **settings: float) -> tuple[Tensor, ...]:
    """:func:`l1ra_kernels.reference.adam_gate_step`, by one launch if Triton kernels are used for the device."""
    return _gate_op("adam_gate_step", gate.device)(gate, *args, **settings)


def adaptive_gate_step(gate: Tensor, *args: Tensor | None, **settings: float) -> tuple[Tensor, ...]:
    """:func:`l1ra_kernels.reference.adaptive_gate_step`, by one launch if Triton kernels are used for the device."""
    return _gate_op("adaptive_gate_step", gate.device)(gate, *args, **settings)


def _by_device(name: str, tensors: Sequence[Tensor]) -> list[tuple[Callable, list[int]]]:
    """For each device: the implementation of the op ``name``, and the indices of the tensors on the device."""
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    return [(_row_op(name, device), chosen) for device, chosen in groups.items()]


# Triton is imported only if its kernels are going to run.


def _row_op(name: str, device: torch.device) -> Callable:
    if choice.obstacle(device):
        return getattr(reference, name)
    from l1ra_kernels import rank_compaction

    return _on(device, getattr(rank_compaction, name))


def _gate_op(name: str, device: torch.device) -> Callable:
    if choice.obstacle(device):
        return getattr(reference, name)
    from l1ra_kernels import gate_step

    return _on(device, getattr(gate_step, name))


def _on(device: torch.device, op: Callable) -> Callable:
    def run(*args, **kwargs):
        with on_device(device):
            return op(*args, **kwargs)

    return run
