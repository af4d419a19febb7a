"""Row moves of tensors with one row per rank: collected first, then performed by one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from l1ra.allocation.plan import LayerPlan
from l1ra.layers.tensor_lists import add_all_, copy_all_, divide_all_, multiply_all_
from l1ra_kernels import dispatch

__all__ = ["COLUMNS", "RowMoves", "row_runs", "row_sources"]


# The attribute of a parameter that tells which columns it holds, where it is a part of a sharded one.
COLUMNS = "_l1ra_columns"


def row_sources(plan: LayerPlan) -> tuple[int, ...]:
    """For each row after the plan its index before the plan, -1 for a new row."""
    return (*plan.keep, *[-1] * plan.grow)


def row_runs(rows: Sequence[int]) -> list[slice]:
    """Ascending row numbers as slices, one for each run of consecutive numbers."""
    runs: list[slice] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs


class _Move(NamedTuple):
    tensor: Tensor
    sources: tuple[int, ...]
    fill: float
    store: Callable[[Tensor], object]
    in_place: bool
    new: slice
    new_rows: Tensor | float | None


class RowMoves:
    """Row moves of any number of tensors. No tensor changes before :meth:`run` performs all moves in one op."""

    def __init__(self) -> None:
        self._moves: list[_Move] = []
        self._rescaled: list[tuple[nn.Parameter, nn.Parameter, float]] = []
        self._callbacks: list[Callable[[], object]] = []

    def add(
        self,
        tensor: Tensor,
        sources: Sequence[int],
        fill: float,
        store: Callable[[Tensor], object],
        *,
        in_place: bool = False,
        new: slice = slice(0),
        new_rows: Tensor | float | None = None,
    ) -> None:
        """Add a move of the rows of ``tensor``.

        Args:
            tensor: ``(rows, ...)``.
            sources: for each row of the result its index in ``tensor``, or -1 for a new row.
            fill: the value of new rows.
            store: called with the result, ``(len(sources), ...)``.
            in_place: if the result has the shape of ``tensor``, copy it into ``tensor`` instead of calling ``store``.
            new: the rows of the result that are set to ``new_rows``, a tensor of any device and dtype or a number.
        """
        self._moves.append(_Move(tensor.detach(), tuple(sources), fill, store, in_place, new, new_rows))

    def add_parameter(
        self, param: nn.Parameter, sources: Sequence[int], new: slice = slice(0), new_rows: Tensor | float | None = None
    ) -> None:
        """Add a move of the rows of ``param`` and of its gradient.

        The Parameter remains the same object. If its shape does not change, its memory remains the same, too.

        Args:
            sources: as in :meth:`add`.
            new: the rows of the result that are set to ``new_rows``. All other new rows are 0.
            new_rows: if the parameter holds some columns only (:data:`COLUMNS`), all columns nevertheless.
        """
        columns = getattr(param, COLUMNS, None)
        if columns is not None and isinstance(new_rows, Tensor):
            new_rows = new_rows[:, columns.at]

        def store(moved: Tensor) -> None:
            param.grad = None
            param.set_(moved)

        def store_grad(moved: Tensor) -> None:
            param.grad = moved

        self.add(param, sources, 0.0, store, in_place=True, new=new, new_rows=new_rows)
        if param.grad is not None:
            self.add(param.grad, sources, 0.0, store_grad, in_place=True)

    def rescale(self, multiplied: nn.Parameter, divided: nn.Parameter, factor: float) -> None:
        """Multiply one parameter by ``factor`` after the moves, and divide another one by it.

        Their gradients change by the inverse.
        """
        self._rescaled.append((multiplied, divided, factor))

    def afterwards(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once all rows have been moved and rescaled."""
        self._callbacks.append(callback)

    @torch.no_grad()
    def run(self) -> None:
        """Perform all moves, then the callbacks, in the order in which they were added."""
        if self._moves:
            columns = zip(*((move.tensor, move.sources, move.fill) for move in self._moves), strict=True)
            self._store(list(zip(self._moves, dispatch.move_rows_many(*columns), strict=True)))
        self._rescale()
        for callback in self._callbacks:
            callback()

    def _store(self, results: list[tuple[_Move, Tensor]]) -> None:
        new = [(moved[move.new], move.new_rows) for move, moved in results if move.new_rows is not None]
        copy_all_(*_columns([(rows, values) for rows, values in new if isinstance(values, Tensor)]))
        add_all_(*_columns([(rows, value) for rows, value in new if not isinstance(value, Tensor)]))  # to rows of 0
        stays = [move.in_place and moved.shape == move.tensor.shape for move, moved in results]
        kept = [(move.tensor, moved) for (move, moved), same in zip(results, stays, strict=True) if same]
        copy_all_(*_columns(kept))
        for (move, moved), same in zip(results, stays, strict=True):
            if not same:
                move.store(moved)

    def _rescale(self) -> None:
        up = [(t, factor) for m, d, factor in self._rescaled for t in (m, d.grad) if t is not None]
        down = [(t, factor) for m, d, factor in self._rescaled for t in (d, m.grad) if t is not None]
        multiply_all_(*_columns(up))
        divide_all_(*_columns(down))


def _columns(pairs: list[tuple]) -> tuple[tuple, tuple]:
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return first, second
