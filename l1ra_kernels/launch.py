"""Kernel launches. All launches go through :func:`launch`, so that they can be intercepted, e.g. to count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["launch", "on_device", "redirected"]

_instead: Callable[..., None] | None = None


def on_device(device: torch.device) -> AbstractContextManager:
    """A context manager in which kernels are launched on ``device``.

    Triton launches on the current device, whatever the devices of the arguments are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)``; do nothing if the grid is empty."""
    if all(grid):
        if _instead is None:
            kernel[grid](*args, **meta)
        else:
            _instead(kernel, grid, *args, **meta)


@contextmanager
def redirected(instead: Callable[..., None]) -> Iterator[None]:
    """A context manager in which :func:`launch` calls ``instead(kernel, grid, *args, **meta)`` and launches nothing."""
    global _instead
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before
