"""The one place where a kernel is launched: whoever wants to see, count or compile launches looks here."""

from __future__ import annotations

from typing import Any

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``, or nothing where the grid is empty."""
    if all(grid):
        kernel[grid](*args, **meta)
