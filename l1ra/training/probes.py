"""The gradient probes of all adapters of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from l1ra.layers.gradient_probe import Probe, coherence, start_probes, update_sketches
from l1ra.layers.linear import L1RALinear
from l1ra.processes.group import ReplicaGroup

__all__ = ["PROBE_RANKS", "ProbeSet"]

# With 4 ranks, the coherence of a small encoder's layers was off by .17 (root mean square) by the choice of the random
# directions, with 16 by .09, with 64 by .03. Beside adapters of up to 16 ranks the kernels' tile of 32 has room for 16.
PROBE_RANKS = 16


class ProbeSet:
    """One probe beside each adapter in the first half of an interval, and what they have observed until its end."""

    def __init__(self, adapters: Mapping[str, L1RALinear]) -> None:
        self._adapters = adapters
        self._probes: dict[str, Probe] = {}

    def __bool__(self) -> bool:
        """Whether there are probes, observing or stopped."""
        return bool(self._probes)

    def start(self, generator: torch.Generator) -> None:
        """Put new probes beside the adapters; they observe the gradients from the next forward on."""
        layers = list(self._adapters.values())
        probes = start_probes(PROBE_RANKS, [(a.lora_A, a.in_features, a.out_features) for a in layers], generator)
        self._probes = dict(zip(self._adapters, probes, strict=True))
        for layer, probe in zip(layers, probes, strict=True):
            layer.probe = probe

    def take_step(self) -> None:
        """Add the gradients of an optimizer step to the sketches."""
        if self._probes:
            update_sketches(list(self._probes.values()))

    def stop(self) -> None:
        """Stop observing, and keep the sketches."""
        for layer in self._adapters.values():
            layer.probe = None

    def sum_over_replicas(self, replicas: ReplicaGroup) -> None:
        """Sum the sketches over all data-parallel processes."""
        replicas.sum_over_replicas(self._sums())

    def _sums(self) -> list[Tensor]:
        return [part for probe in self._probes.values() for part in (probe.sketch, probe.seen)]

    def reset(self) -> None:
        """Set the sketches to zero."""
        if self._probes:
            torch._foreach_zero_(self._sums())

    def discard(self) -> None:
        """Remove the probes and their sketches."""
        self.stop()
        self._probes = {}

    def coherence(self) -> dict[str, float]:
        """Adapter name -> how much its gradients agree, see ``gradient_probe.coherence``. Values that are not finite
        are left out."""
        if not self._probes:
            return {}
        values = coherence(list(self._probes.values())).tolist()
        return {name: value for name, value in zip(self._probes, values, strict=True) if math.isfinite(value)}

    def sketch(self, name: str) -> Tensor | None:
        """The sketch of an adapter's weight gradient, ``(count, in_features)``, or None without a probe."""
        probe = self._probes.get(name)
        return None if probe is None else probe.sketch

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adapter name -> copies of the tensors of its probe."""
        return {name: probe.state() for name, probe in self._probes.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], observing: bool) -> None:
        """Take over a state that ``check_state`` has accepted.

        Args:
            observing: whether the probes go on observing, or have been stopped.
        """
        self.discard()
        for name, layer in self._adapters.items():
            if parts := state.get(name):
                a = layer.lora_A
                sums = [parts[part].to(a.device, torch.float32, copy=True) for part in ("sketch", "seen")]
                self._probes[name] = probe = Probe(parts["mix"].to(a, copy=True), *sums)
                layer.probe = probe if observing else None
