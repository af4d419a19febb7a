"""Which implementation of an op runs, and the reason in words when it is not a fused one.

Everything outside this package calls the ops through here. At present every op has one implementation, the torch
reference; fused ones are added behind the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l1ra_kernels.reference import (
    adam_elastic_net_step,
    gated_lora,
    importance_step,
    move_rows,
    weighted_l1_step,
)
from l1ra_kernels.state_ops import (
    adam_gate_step,
    adaptive_gate_step,
    compact_rows_,
    move_rows_many,
    unless_not_finite,
)

__all__ = [
    "Path",
    "adam_elastic_net_step",
    "adam_gate_step",
    "adaptive_gate_step",
    "compact_rows_",
    "gated_lora",
    "importance_step",
    "move_rows",
    "move_rows_many",
    "path_for",
    "unless_not_finite",
    "weighted_l1_step",
]


@dataclass(frozen=True)
class Path:
    """An implementation, ``name``, and why it was chosen, ``reason``."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def path_for(device: torch.device) -> Path:
    """The implementation that the gated low-rank layer takes for tensors on ``device``."""
    if device.type == "cuda":
        return Path("torch", "this version has no fused CUDA kernels yet")
    return Path("torch", f"plain PyTorch is the path on {device.type}")
