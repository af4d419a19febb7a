"""A sketch of a layer's weight gradient, collected by ranks that ride along for a while and change no output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Probe"]


class Probe:
    """Ranks with A = 0 and a random B: the gradient of their A is ``mix @ dL/dW``, up to the layer's scaling.

    They leave the output as it is, up to the rounding of a sum.

    Attributes:
        mix: ``(count, out_features)``, their B.
    """

    def __init__(self, mix: Tensor, sketch: Tensor) -> None:
        """Go on from a ``sketch`` ``(count, in_features)``, zeros at first, of the same dtype and device as ``mix``."""
        self.mix = mix
        self._zeros = torch.zeros_like(sketch, requires_grad=True)
        self._zeros.grad = sketch

    @classmethod
    def start(cls, count: int, a: Tensor, b: Tensor, generator: torch.Generator) -> Probe:
        """A new one of ``count`` ranks beside an adapter's A and B; ``generator`` is of the CPU."""
        mix = torch.randn(count, b.shape[1], generator=generator).to(a) / math.sqrt(count)
        return cls(mix, a.new_zeros(count, a.shape[1]))

    @property
    def sketch(self) -> Tensor:
        """``(count, in_features)``, the sum over all backward passes since the start."""
        return self._zeros.grad

    def beside(self, a: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An adapter's A, gate and B with these ranks appended, their gates 1."""
        ones = gate.new_ones(self.mix.shape[0])
        return torch.cat([a, self._zeros]), torch.cat([gate, ones]), torch.cat([b, self.mix])

    def state(self) -> dict[str, Tensor]:
        """Copies of ``"mix"`` and ``"sketch"``."""
        return {"mix": self.mix.clone(), "sketch": self.sketch.clone()}
