"""What a device can compute in."""

from __future__ import annotations

import torch

__all__ = ["widest"]


def widest(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple's GPUs (MPS), which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
