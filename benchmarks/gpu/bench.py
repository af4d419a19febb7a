"""What every section is given, and the two ways in which it can end early."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.sizes import FULL, TINY, Sizes
from benchmarks.gpu.timing import Budget, Clock

__all__ = ["ROOT", "Bench", "LeftOut", "Wrong"]

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = 0


class Wrong(Exception):
    """A result is wrong: the program stops, and nothing more is timed."""


class LeftOut(Exception):
    """A competitor can't take part; the message says why, and the tables name it."""


@dataclass
class Bench:
    """The run at hand.

    Attributes:
        results: section -> what it found; sections read what earlier ones left here.
        failed: what broke without being wrong; the program goes on, and its exit code tells.
        tests: the folder or file that the correctness section runs.
    """

    device: torch.device
    tiny: bool
    tests: Path
    seed: int = SEED
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(0))

    def __post_init__(self) -> None:
        self.clock = Clock(self.device, self.sizes.flush_bytes)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def randn(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers on the device: products of zeros take less power and run faster than real ones."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).mul_(std)
