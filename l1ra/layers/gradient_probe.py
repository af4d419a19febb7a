"""A sketch of a layer's weight gradient, collected by ranks that ride along for a while and change no output.

It says where a new rank should look, and whether one would have anything to learn: see :attr:`Probe.coherence`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["Probe", "least_coherence", "take_step"]

SHORTEST = 1e-18  # squares of shorter gradients vanish in float32
# All gradients agree the less the further the training is, the higher its rate and the smaller its batches. Who has
# something to learn stands out against the others: half of the greatest coherence, not a number for all trainings.
STANDS_OUT = 0.5


def least_coherence(found: Collection[float], floor: float) -> float:
    """What the coherence of an adapter must be at least for it to be needy, where those of all are ``found``.

    Args:
        floor: ``L1RAConfig.min_coherence``; -1 lets all of them be needy.
    """
    return floor if floor <= -1 else max(floor, STANDS_OUT * max(found, default=floor))


class Probe:
    """Ranks with A = 0 and a random B: the gradient of their A is ``mix @ dL/dW``, up to the layer's scaling.

    They leave the output as it is, up to the rounding of a sum.

    Attributes:
        mix: ``(count, out_features)``, their B.
        sketch: ``(count, in_features)`` float32, the sum of the gradients of all steps taken, each brought to length 1.
        seen: float32 scalar, the number of these steps that had a usable gradient.
    """

    def __init__(self, mix: Tensor, sketch: Tensor, seen: Tensor) -> None:
        self.mix = mix
        self.sketch = sketch
        self.seen = seen
        self._zeros = mix.new_zeros(sketch.shape, requires_grad=True)
        self._zeros.grad = torch.zeros_like(self._zeros)

    @classmethod
    def start(cls, count: int, a: Tensor, b: Tensor, generator: torch.Generator) -> Probe:
        """A new one of ``count`` ranks beside an adapter's A and B; ``generator`` is of the CPU."""
        mix = torch.randn(count, b.shape[1], generator=generator, device="cpu").to(a) / math.sqrt(count)
        sketch = torch.zeros(count, a.shape[1], dtype=torch.float32, device=a.device)
        return cls(mix, sketch, sketch.new_zeros(()))

    def to_like(self, like: Tensor) -> None:
        """Take the device and the dtype of the adapter that it rides beside, which has been moved."""
        self.__init__(self.mix.to(like), self.sketch.to(like.device), self.seen.to(like.device))

    @property
    def coherence(self) -> Tensor:
        """How much the gradients of the n steps agree, a float32 scalar on the probe's device.

        The mean cosine c between any two of them, told as the cosine to be expected between the sums over one half and
        over the other half of the steps: ``m c / (1 + (m - 1) c)`` with m = n / 2. Where a layer still has something to
        learn it comes near 1; where gradients are noise it is 0, but for luck; where the training overshoots, so that
        they point to and fro, it is below. 0 where there was no gradient at all, not finite after a single one.
        """
        half = self.seen / 2
        cosine = (self.sketch.square().sum() - self.seen) / (self.seen * (self.seen - 1))
        agreement = half * cosine / (1 + (half - 1) * cosine)
        return torch.where(self.seen > 0, agreement.clamp(min=-1.0), 0.0)

    @property
    def gradient(self) -> Tensor:
        """``(count, in_features)``, the sum over the backward passes since the last step, in the adapter's dtype."""
        return self._zeros.grad

    def append_to(self, a: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An adapter's A, gate and B with these ranks appended, their gates 1.

        The adapter may be a replica of nn.DataParallel's on another device: what it learns comes back to this one.
        """
        ones = gate.new_ones(self.mix.shape[0])
        return torch.cat([a, self._zeros.to(a.device)]), torch.cat([gate, ones]), torch.cat([b, self.mix.to(b.device)])

    def state(self) -> dict[str, Tensor]:
        """Copies of ``"mix"``, ``"sketch"`` and ``"seen"``."""
        return {name: getattr(self, name).clone() for name in ("mix", "sketch", "seen")}


@torch.no_grad()
def take_step(probes: Sequence[Probe]) -> None:
    """An optimizer step is over: what its backward passes have brought goes into the sketches.

    Gradients come in with equal lengths, so that neither one odd batch nor the scale of a GradScaler decides; one that
    is not finite, or hardly differs from 0, is left out. No value is brought to the host.
    """
    pending = [probe.gradient for probe in probes]
    gradients = [gradient.float() for gradient in pending]
    for probe, gradient, length in zip(probes, gradients, torch._foreach_norm(gradients), strict=True):
        usable = (length > SHORTEST) & (length < torch.inf)
        probe.sketch += torch.where(usable, gradient / length, 0.0)
        probe.seen += usable
    for gradient in pending:
        gradient.detach_()  # from the graph that create_graph=True leaves
    torch._foreach_zero_(pending)
