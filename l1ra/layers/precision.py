"""What a device can compute in."""

from __future__ import annotations

import torch

__all__ = ["widest"]


def widest(device: torch.device) -> torch.dtype:
    """float64 on CPUs and on GPUs of NVIDIA and AMD; float32 elsewhere: Apple's (MPS) and some of Intel's lack it."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32
