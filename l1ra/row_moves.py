"""Moves of rows, collected from whoever holds tensors with a row a rank, and done all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from l1ra.allocation import LayerPlan
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
        self, param: nn.Parameter, plan: LayerPlan, fill: float = 0.0, new_rows: Tensor | None = None
    ) -> None:
        """``param`` will move, its gradient too, and stay the same object; new rows are ``new_rows`` or ``fill``."""

        def take(moved: Tensor) -> None:
            if new_rows is not None:
                moved[len(plan.keep) :] = new_rows.to(moved)
            param.grad = None
            param.set_(moved)

        self.add(param, row_sources(plan), fill, take)
        if param.grad is not None:
            self.add(param.grad, row_sources(plan), 0.0, lambda grad: setattr(param, "grad", grad))

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
