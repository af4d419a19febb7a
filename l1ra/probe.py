"""A sketch of a layer's weight gradient, collected by ranks that ride along for a while and change no output.

It says where a new rank should look, and whether one would have anything to learn: see :attr:`Probe.coherence`.
"""

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
        early: what the sketch was at half time, None before.
    """

    def __init__(self, mix: Tensor, sketch: Tensor, early: Tensor | None = None) -> None:
        """Go on from a ``sketch`` ``(count, in_features)``, zeros at first, of the same dtype and device as ``mix``."""
        self.mix = mix
        self.early = early
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

    def follow(self, like: Tensor) -> None:
        """Take the device and the dtype of the adapter that it rides beside, which has been moved."""
        early = None if self.early is None else self.early.to(like)
        self.__init__(self.mix.to(like), self.sketch.to(like), early)

    def halve(self) -> None:
        """This is half time."""
        self.early = self.sketch.clone()

    @property
    def coherence(self) -> Tensor | None:
        """The cosine between the sketches of the first and of the second half, a float32 scalar; None before both.

        Where a layer still has something to learn, the gradients of different batches agree, and it comes near 1. Where
        they are noise, it is 0, but for luck: about one over the root of the directions in which the noise lies.
        """
        if self.early is None:
            return None
        early, late = self.early.float(), self.sketch.float() - self.early.float()
        return torch.nn.functional.cosine_similarity(early.flatten(), late.flatten(), dim=0, eps=1e-30)

    def beside(self, a: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An adapter's A, gate and B with these ranks appended, their gates 1."""
        ones = gate.new_ones(self.mix.shape[0])
        return torch.cat([a, self._zeros]), torch.cat([gate, ones]), torch.cat([b, self.mix])

    def state(self) -> dict[str, Tensor]:
        """Copies of ``"mix"``, ``"sketch"`` and, after half time, ``"early"``."""
        tensors = {"mix": self.mix, "sketch": self.sketch, "early": self.early}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
