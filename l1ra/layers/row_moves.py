"""Row moves of tensors with one row per rank: collected first, then performed by one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from l1ra.allocation.plan import LayerPlan
from l1ra_kernels import dispatch

__all__ = ["RowMoves", "row_sources"]


def row_sources(plan: LayerPlan) -> tuple[int, ...]:
    """For each row after the plan its index before the plan, -1 for a new row."""
    return (*plan.keep, *[-1] * plan.grow)


class RowMoves:
    """Row moves of any number of tensors. No tensor changes before :meth:`run` performs all moves in one op."""

    def __init__(self) -> None:
        self._moves: list[tuple[Tensor, Sequence[int], float]] = []
        self._stores: list[Callable[[Tensor], object]] = []
        self._callbacks: list[Callable[[], object]] = []

    def add(self, tensor: Tensor, sources: Sequence[int], fill: float, store: Callable[[Tensor], object]) -> None:
        """Add a move of the rows of ``tensor``.

        Args:
            tensor: ``(rows, ...)``.
            sources: for each row of the result its index in ``tensor``, or -1 for a new row.
            fill: the value of new rows.
            store: called with the result, ``(len(sources), ...)``.
        """
        self._moves.append((tensor.detach(), sources, fill))
        self._stores.append(store)

    def add_parameter(
        self, param: nn.Parameter, sources: Sequence[int], new: slice = slice(0), new_rows: Tensor | None = None
    ) -> None:
        """Add a move of the rows of ``param`` and of its gradient.

        The Parameter remains the same object. If its shape does not change, its memory remains the same, too.

        Args:
            sources: as in :meth:`add`.
            new: the rows of the result that are set to ``new_rows``. All other new rows are 0.
        """

        def store(moved: Tensor) -> None:
            if new_rows is not None:
                moved[new] = new_rows.to(moved)
            if moved.shape == param.shape:
                param.copy_(moved)
            else:
                param.grad = None
                param.set_(moved)

        def store_grad(moved: Tensor) -> None:
            if param.grad is None:
                param.grad = moved
            else:
                param.grad.copy_(moved)

        self.add(param, sources, 0.0, store)
        if param.grad is not None:
            self.add(param.grad, sources, 0.0, store_grad)

    def afterwards(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` once all rows have been moved."""
        self._callbacks.append(callback)

    @torch.no_grad()
    def run(self) -> None:
        """Perform all moves, then the callbacks, in the order in which they were added."""
        if self._moves:
            results = dispatch.move_rows_many(*zip(*self._moves, strict=True))
            for store, moved in zip(self._stores, results, strict=True):
                store(moved)
        for callback in self._callbacks:
            callback()
