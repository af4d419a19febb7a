"""The one place where a kernel is launched: whoever wants to see, count or compile launches looks here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["launch", "on_device", "redirected"]

_instead: Callable[..., None] | None = None


def on_device(device: torch.device) -> AbstractContextManager:
    """Within the block, kernels are launched on ``device``: Triton takes the current one, whatever its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``, or nothing where the grid is empty."""
    if all(grid):
        if _instead is None:
            kernel[grid](*args, **meta)
        else:
            _instead(kernel, grid, *args, **meta)


@contextmanager
def redirected(instead: Callable[..., None]) -> Iterator[None]:
    """Within the block, launches are handed to ``instead(kernel, grid, *args, **meta)`` and nothing is launched."""
    global _instead
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before
