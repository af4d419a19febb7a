"""Gradient probe: auxiliary ranks beside an adapter that collect a random sketch of the layer's weight gradient.

The sketch provides directions for new ranks, and an estimate of whether a new rank would learn anything, see
:attr:`Probe.coherence`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["Probe", "least_coherence", "update_sketches"]

MIN_NORM = 1e-18  # the square of a smaller norm vanishes in float32
# The coherence of all adapters falls as the training proceeds, with a higher learning rate, and with smaller batches.
# The threshold is therefore relative to the largest coherence, not one number for all trainings.
SHARE_OF_LARGEST = 0.5


def least_coherence(coherences: Collection[float], floor: float) -> float:
    """The smallest coherence at which an adapter may receive ranks.

    Args:
        coherences: :attr:`Probe.coherence` of all adapters.
        floor: ``L1RAConfig.min_coherence``. The result is at least this; -1 allows all adapters.
    """
    return floor if floor <= -1 else max(floor, SHARE_OF_LARGEST * max(coherences, default=floor))


class Probe:
    """Auxiliary ranks with A = 0, gate 1 and a random B, appended to those of an adapter in its forward.

    The gradient of their A is ``mix @ dL/dW``, up to the layer's scaling. They don't change the layer's output, up to
    the rounding of a sum. ``mix``, ``sketch`` and ``seen`` are saved in checkpoints under these names.

    Attributes:
        mix: ``(count, out_features)``, B of the probe.
        sketch: ``(count, in_features)`` float32, the sum over the optimizer steps of the gradient of A, normalised to
            length 1 at each step.
        seen: float32 scalar, the number of steps in ``sketch``.
    """

    def __init__(self, mix: Tensor, sketch: Tensor, seen: Tensor) -> None:
        self.mix = mix
        self.sketch = sketch
        self.seen = seen
        self._reset_a()

    def _reset_a(self) -> None:
        self._a = self.mix.new_zeros(self.sketch.shape, requires_grad=True)
        self._a.grad = torch.zeros_like(self._a)

    @classmethod
    def start(cls, count: int, a: Tensor, b: Tensor, generator: torch.Generator) -> Probe:
        """A new probe, with an empty sketch.

        Args:
            count: number of ranks.
            a, b: A ``(r, in_features)`` and B ``(r, out_features)`` of the adapter, which determine shapes, dtype and
                device.
            generator: a CPU generator, for ``mix``.
        """
        mix = torch.randn(count, b.shape[1], generator=generator, device="cpu").to(a) / math.sqrt(count)
        sketch = torch.zeros(count, a.shape[1], dtype=torch.float32, device=a.device)
        return cls(mix, sketch, sketch.new_zeros(()))

    def move_to(self, a: Tensor) -> None:
        """Adopt the device and the dtype of ``a``, A of the adapter. A gradient not yet in the sketch is dropped."""
        self.mix, self.sketch, self.seen = self.mix.to(a), self.sketch.to(a.device), self.seen.to(a.device)
        self._reset_a()

    @property
    def coherence(self) -> Tensor:
        """How much the gradients of the n observed steps agree, a float32 scalar on the probe's device.

        Let c be the mean cosine between the gradients of two steps. The coherence is the cosine to be expected between
        the sum over one half of the steps and the sum over the other half, ``m c / (1 + (m - 1) c)`` with m = n / 2.

        It is near 1 where the layer still has something to learn, near 0 where the gradients are noise, and negative
        where the training overshoots, so that successive gradients have opposite directions. It is 0 without any
        gradient, and not finite after a single one.
        """
        half = self.seen / 2
        cosine = (self.sketch.square().sum() - self.seen) / (self.seen * (self.seen - 1))
        agreement = half * cosine / (1 + (half - 1) * cosine)
        return torch.where(self.seen > 0, agreement.clamp(min=-1.0), 0.0)

    @property
    def gradient(self) -> Tensor:
        """``(count, in_features)``, the sum over the backward passes since the last step, in the adapter's dtype."""
        return self._a.grad

    def append_to(self, a: Tensor, gate: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, gate and B of an adapter with the probe's ranks appended.

        The adapter may be a replica of ``nn.DataParallel`` on another device. The gradient is collected on the probe's
        own device.
        """
        ones = gate.new_ones(self.mix.shape[0])
        return torch.cat([a, self._a.to(a.device)]), torch.cat([gate, ones]), torch.cat([b, self.mix.to(b.device)])

    def state(self) -> dict[str, Tensor]:
        """Copies of ``"mix"``, ``"sketch"`` and ``"seen"``."""
        return {name: getattr(self, name).clone() for name in ("mix", "sketch", "seen")}


@torch.no_grad()
def update_sketches(probes: Sequence[Probe]) -> None:
    """Add the gradients of an optimizer step to the sketches, and reset them. Call it once after each step.

    Each gradient is normalised, so that neither a single unusual batch nor the scale of a GradScaler dominates the sum.
    A gradient that is not finite or almost 0 is skipped. No value is copied to the host.
    """
    pending = [probe.gradient for probe in probes]
    gradients = [gradient.float() for gradient in pending]
    for probe, gradient, norm in zip(probes, gradients, torch._foreach_norm(gradients), strict=True):
        usable = (norm > MIN_NORM) & (norm < torch.inf)
        probe.sketch += torch.where(usable, gradient / norm, 0.0)
        probe.seen += usable
    for gradient in pending:
        gradient.detach_()  # backward(create_graph=True) leaves a graph
    torch._foreach_zero_(pending)
