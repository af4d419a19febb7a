"""Gradient probe: auxiliary ranks beside an adapter that collect a random sketch of the layer's weight gradient.

The sketch provides directions for new ranks, and an estimate of whether a new rank would learn anything, see
:func:`coherence`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from l1ra.layers.tensor_lists import batches, grouped, transferred, views

__all__ = ["Probe", "coherence", "least_coherence", "start_probes", "update_sketches"]

MIN_NORM = 1e-18  # the square of a smaller norm vanishes in float32
# The coherence of all adapters falls as the training proceeds, with a higher learning rate, and with smaller batches.
# The threshold is therefore relative to the largest coherence, not one number for all trainings.
SHARE_OF_LARGEST = 0.5


def least_coherence(coherences: Collection[float], floor: float) -> float:
    """The smallest coherence at which an adapter may receive ranks.

    Args:
        coherences: :func:`coherence` of all adapters.
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

    def __init__(self, mix: Tensor, sketch: Tensor, seen: Tensor, zeros: tuple[Tensor, Tensor] | None = None) -> None:
        """
        Args:
            mix, sketch, seen: see above.
            zeros: memory for A and for its gradient, each of the shape of ``sketch`` in the dtype of ``mix``.
        """
        self.mix = mix
        self.sketch = sketch
        self.seen = seen
        self._reset_a(zeros)

    def _reset_a(self, zeros: tuple[Tensor, Tensor] | None = None) -> None:
        a, grad = zeros or (self.mix.new_zeros(self.sketch.shape) for _ in range(2))
        self._a = a.requires_grad_()
        self._a.grad = grad

    def move_to(self, a: Tensor) -> None:
        """Adopt the device and the dtype of ``a``, A of the adapter. A gradient not yet in the sketch is dropped."""
        self.mix, self.sketch, self.seen = self.mix.to(a), self.sketch.to(a.device), self.seen.to(a.device)
        self._reset_a()

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


def start_probes(count: int, adapters: Sequence[tuple[Tensor, int, int]], generator: torch.Generator) -> list[Probe]:
    """New probes with empty sketches. Those of one device and dtype share the memory of each of their tensors.

    Args:
        count: number of ranks.
        adapters: A of each adapter, which determines dtype and device, and its in_features and out_features.
        generator: a CPU generator, for ``mix``, from which the probes draw in order.
    """
    shapes = [(count, out_features) for *_, out_features in adapters]
    mixes = views(torch.empty(sum(map(math.prod, shapes)), dtype=torch.float32, device="cpu"), shapes)
    for mix in mixes:
        mix.normal_(generator=generator)
    probes: dict[int, Probe] = {}
    for (device, dtype), alike in grouped(adapters, lambda adapter: (adapter[0].device, adapter[0].dtype)).items():
        drawn = torch.cat([mixes[i].view(-1) for i in alike]).to(device, dtype) / math.sqrt(count)
        a_shapes = [(count, adapters[i][1]) for i in alike]
        size = sum(map(math.prod, a_shapes))
        sketches, a, grads = (
            views(torch.zeros(size, dtype=kind, device=device), a_shapes) for kind in (torch.float32, dtype, dtype)
        )
        seen = torch.zeros(len(alike), dtype=torch.float32, device=device)
        own_mixes = views(drawn, [shapes[i] for i in alike])
        for i, *parts in zip(alike, own_mixes, sketches, seen, zip(a, grads, strict=True), strict=True):
            probes[i] = Probe(*parts)
    return [probes[i] for i in range(len(adapters))]


@torch.no_grad()
def update_sketches(probes: Sequence[Probe]) -> None:
    """Add the gradients of an optimizer step to the sketches, and reset them. Call it once after each step.

    Each gradient is normalised, so that neither a single unusual batch nor the scale of a GradScaler dominates the sum.
    A gradient that is not finite or almost 0 is skipped. No value is copied to the host.
    """
    pending = [probe.gradient for probe in probes]
    for gradient in pending:
        if gradient.requires_grad:
            gradient.detach_()  # backward(create_graph=True) leaves a graph
    kinds = grouped(pending, lambda gradient: (gradient.device, gradient.dtype, gradient.shape))
    for (_, _, shape), alike in kinds.items():
        for chosen in batches(alike, shape.numel()):
            _add_directions([probes[i] for i in chosen])


def _add_directions(probes: list[Probe]) -> None:
    """As :func:`update_sketches`, for probes that are alike."""
    pending = [probe.gradient for probe in probes]
    gradients = torch.stack(pending).float()
    norms = torch.linalg.vector_norm(gradients, dim=(1, 2), keepdim=True)
    usable = (norms > MIN_NORM) & (norms < torch.inf)
    directions = torch.where(usable, gradients.div_(norms), 0.0)
    torch._foreach_add_([probe.sketch for probe in probes], list(directions))
    torch._foreach_add_([probe.seen for probe in probes], list(usable.flatten().float()))
    torch._foreach_zero_(pending)


@torch.no_grad()
def coherence(probes: Sequence[Probe]) -> Tensor:
    """How much the gradients of the n steps that each probe has observed agree: ``(len(probes),)`` float32 on the CPU.

    Let c be the mean cosine between the gradients of two steps. The coherence is the cosine to be expected between the
    sum over one half of the steps and the sum over the other half, ``m c / (1 + (m - 1) c)`` with m = n / 2.

    It is near 1 where the layer still has something to learn, near 0 where the gradients are noise, and negative where
    the training overshoots, so that successive gradients have opposite directions. It is 0 without any gradient, and
    not finite after a single one.
    """
    norms: dict[int, Tensor] = {}
    for alike in grouped(probes, lambda probe: probe.sketch.device).values():
        norms |= zip(alike, torch._foreach_norm([probes[i].sketch for i in alike]), strict=True)
    numbers = [number for i, probe in enumerate(probes) for number in (norms[i], probe.seen)]
    norm, seen = torch.stack(transferred(numbers, torch.device("cpu"), torch.float32)).view(-1, 2).unbind(1)
    half = seen / 2
    cosine = (norm.square() - seen) / (seen * (seen - 1))
    agreement = half * cosine / (1 + (half - 1) * cosine)
    return torch.where(seen > 0, agreement.clamp(min=-1.0), 0.0)
