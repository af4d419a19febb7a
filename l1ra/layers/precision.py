"""The widest floating-point dtype of a device."""

from __future__ import annotations

import torch

__all__ = ["widest_float"]


def widest_float(device: torch.device) -> torch.dtype:
    """float64 on CPUs and on NVIDIA and AMD GPUs, float32 elsewhere: Apple's GPUs and some of Intel's lack float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32
