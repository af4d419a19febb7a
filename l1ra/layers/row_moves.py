"""Moves of rows, collected from whoever holds tensors with a row a rank, and done all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from l1ra.allocation.plan import LayerPlan
from l1ra_kernels import dispatch

__all__ = ["RowMoves", "row_sources"]


def row_sources(plan: LayerPlan) -> tuple[int, ...]:
    """For each row after the plan the row it was before, -1 for a new one."""
    return (*plan.keep, *[-1] * plan.grow)


class RowMoves:
    """What shall move. Nothing is touched before :meth:`run`, which moves the rows of all tensors by one op."""

    def __init__(self) -> None:
        self._moves: list[tuple[Tensor, Sequence[int], float]] = []
        self._takers: list[Callable[[Tensor], object]] = []
        self._after: list[Callable[[], object]] = []

    def add(self, rows: Tensor, sources: Sequence[int], fill: float, take: Callable[[Tensor], object]) -> None:
        """``rows`` will move to ``sources`` (-1: a new row of ``fill``), and ``take`` get the moved tensor."""
        self._moves.append((rows.detach(), sources, fill))
        self._takers.append(take)

    def add_parameter(
        self, param: nn.Parameter, sources: Sequence[int], new: slice = slice(0), new_rows: Tensor | None = None
    ) -> None:
        """``param`` will move, its gradient too, and stay the same object, in the same memory if it keeps its shape.

        Args:
            new: the rows that will be ``new_rows`` then; all others that are new will be 0.
        """

        def take(moved: Tensor) -> None:
            if new_rows is not None:
                moved[new] = new_rows.to(moved)
            if moved.shape == param.shape:
                param.copy_(moved)
            else:
                param.grad = None
                param.set_(moved)

        def take_grad(moved: Tensor) -> None:
            if param.grad is None:
                param.grad = moved
            else:
                param.grad.copy_(moved)

        self.add(param, sources, 0.0, take)
        if param.grad is not None:
            self.add(param.grad, sources, 0.0, take_grad)

    def afterwards(self, action: Callable[[], object]) -> None:
        """``action`` will be called when all rows have moved."""
        self._after.append(action)

    @torch.no_grad()
    def run(self) -> None:
        """Move everything, in the order in which it was added."""
        if self._moves:
            for take, moved in zip(self._takers, dispatch.move_rows_many(*zip(*self._moves, strict=True)), strict=True):
                take(moved)
        for action in self._after:
            action()
