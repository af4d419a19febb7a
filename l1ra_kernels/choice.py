"""The process-wide choice between Triton kernels and plain PyTorch, and whether Triton kernels can run on a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

__all__ = ["interpreting", "obstacle", "tf32_allowed", "triton_available", "using", "wanted"]

CHOICES = ("auto", "torch", "fused")
VARIABLE = "L1RA_KERNELS"

try:
    import triton
except ImportError:
    triton = None

# Read once at import, because Triton reads the variable when the kernels are decorated.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_wanted: str | None = None


def triton_available() -> bool:
    """Whether triton can be imported."""
    return triton is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1). It is slow, and supports CPU tensors."""
    return triton is not None and _INTERPRETING


def tf32_allowed() -> bool:
    """Whether torch's settings allow tf32 for float32 matrix products on a GPU."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def wanted() -> str:
    """The current choice, set by :func:`using` or by the environment variable ``L1RA_KERNELS``.

    Returns:
        ``"auto"`` (default): the fastest implementation that supports the tensors. ``"torch"``: plain PyTorch.
        ``"fused"``: Triton kernels, in the interpreter for CPU tensors.

    Raises:
        ValueError: the environment variable has another value.
    """
    name = _wanted or os.environ.get(VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, not {name!r}.")
    return name


def obstacle(device: torch.device) -> str:
    """The reason why plain PyTorch is used for tensors on ``device``; "" if Triton kernels are used.

    Raises:
        RuntimeError: the choice is ``"fused"`` and Triton kernels can't run on ``device``.
    """
    name = wanted()
    if name == "torch":
        return "plain PyTorch was asked for"
    kind = device.type
    if name == "fused":
        if triton_available() and (kind == "cuda" or (kind == "cpu" and interpreting())):
            return ""
        raise RuntimeError(
            f"fused kernels are wanted for tensors on {device}, which Triton can't serve: choose 'auto', install "
            "triton, or set TRITON_INTERPRET=1 before Python starts to try the kernels on a CPU."
        )
    if kind != "cuda":
        return f"plain PyTorch is the path on {kind}"
    if not triton_available():
        return "triton is not installed: pip install triton"
    return "" if _capable(device) else "the kernels need an NVIDIA GPU of compute capability 8.0 or later"


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def using(name: str) -> Iterator[None]:
    """A context manager that sets the choice to ``name``: ``"auto"``, ``"torch"`` or ``"fused"``.

    Raises:
        ValueError: ``name`` is another value.
    """
    global _wanted
    if name not in CHOICES:
        raise ValueError(f"the choice must be one of {', '.join(CHOICES)}, not {name!r}.")
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before
