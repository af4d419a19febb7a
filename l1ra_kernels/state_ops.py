"""The ops on what outlives a step, gates and optimizer state: each as a Triton kernel where there is one to run it,
else in plain torch. They are exported by ``dispatch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l1ra_kernels import choice, reference
from l1ra_kernels.launch import on_device

__all__ = ["adam_gate_step", "adaptive_gate_step", "compact_rows_", "move_rows_many", "unless_not_finite"]

unless_not_finite = reference.unless_not_finite


def move_rows_many(tensors: Sequence[Tensor], sources: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Tensor]:
    """New tensors, whose row i is row ``sources[i]`` of the old one, bit for bit, or ``fill`` where that is -1.

    One launch for all tensors of a device, whatever their dtypes and shapes; out of place, without a gradient.

    Args:
        tensors: each ``(r, ...)``, any dtype of up to 8 bytes, any strides.
        sources: for each the row numbers, below its r.
        fills: for each the value of its new rows.

    Returns:
        For each ``(len(sources), ...)``, in its own new memory, same dtype and device.

    Raises:
        ValueError: there is no such row.
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
    """Move the kept rows of each tensor to its front, in order and bit for bit; the rows behind them become zero.

    In place and in one launch for all tensors of a device: for tensors whose number of rows may not change. What the
    freed rows held is never looked at.

    Args:
        tensors: each ``(r, ...)``, any dtype, any strides; no two may share memory.
        keeps: for each the rising numbers of the rows that stay.

    Raises:
        ValueError: row numbers that don't rise, or no such row; nothing is changed then.
    """
    for r, keep in {(t.shape[0], tuple(keep)) for t, keep in zip(tensors, keeps, strict=True)}:
        if list(keep) != sorted(set(keep)) or any(not 0 <= row < r for row in keep):
            raise ValueError(f"keep must be rising row numbers below {r}, not {keep}.")
    for op, chosen in _by_device("compact_rows_", tensors):
        op([tensors[i] for i in chosen], [keeps[i] for i in chosen])


def adam_gate_step(gate: Tensor, *args: Tensor | None, **settings: float) -> tuple[Tensor, ...]:
    """One launch, or :func:`l1ra_kernels.reference.adam_gate_step`, which says what it does."""
    return _gate_op("adam_gate_step", gate.device)(gate, *args, **settings)


def adaptive_gate_step(gate: Tensor, *args: Tensor | None, **settings: float) -> tuple[Tensor, ...]:
    """One launch, or :func:`l1ra_kernels.reference.adaptive_gate_step`, which says what it does."""
    return _gate_op("adaptive_gate_step", gate.device)(gate, *args, **settings)


def _by_device(name: str, tensors: Sequence[Tensor]) -> list[tuple[Callable, list[int]]]:
    """For each device: the op that serves it, and the numbers of its tensors."""
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    return [(_row_op(name, device), chosen) for device, chosen in groups.items()]


# Triton is imported only where its kernels are going to run.


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
