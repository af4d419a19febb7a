"""The probes of all adapters of a model: when they ride along, and what they have found."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l1ra.layers.gradient_probe import Probe, take_step
from l1ra.layers.linear import L1RALinear
from l1ra.training.data_parallel import Replicas

__all__ = ["PROBE_RANKS", "Probing"]

# With four, coherences of a small encoder's layers were .17 off (root mean square) by the luck of the directions, with
# sixteen .09, with 64 .03. Beside adapters of up to 16 ranks the kernels' tile of 32 has room for sixteen.
PROBE_RANKS = 16


class Probing:
    """One probe beside each adapter for the first half of an interval; what it has seen is asked in the second."""

    def __init__(self, adapters: dict[str, L1RALinear]) -> None:
        self._adapters = adapters
        self._probes: dict[str, Probe] = {}

    def __bool__(self) -> bool:
        """Whether they have begun and are not over."""
        return bool(self._probes)

    def begin(self, generator: torch.Generator) -> None:
        """From now on they look at the gradients."""
        for name, layer in self._adapters.items():
            self._probes[name] = layer.probe = Probe.start(PROBE_RANKS, layer.lora_A, layer.lora_B, generator)

    def take_step(self) -> None:
        """An optimizer step is over."""
        if self._probes:
            take_step(list(self._probes.values()))

    def stop(self) -> None:
        """They look no more, but keep what they have seen."""
        for layer in self._adapters.values():
            layer.probe = None

    def add_up(self, replicas: Replicas) -> None:
        """What all replicas have seen, in each of them."""
        replicas.add_up([part for probe in self._probes.values() for part in (probe.sketch, probe.seen)])

    def empty(self) -> None:
        """They have seen nothing so far."""
        for probe in self._probes.values():
            probe.sketch.zero_()
            probe.seen.zero_()

    def forget(self) -> None:
        """It is over."""
        self.stop()
        self._probes = {}

    def coherence(self) -> dict[str, float]:
        """Adapter -> how much its gradients agree, see ``Probe.coherence``; those of which that is not known are left
        out."""
        found = {name: probe.coherence for name, probe in self._probes.items()}
        if not found:
            return {}
        device = next(iter(found.values())).device
        values = torch.stack([c.to(device) for c in found.values()]).tolist()
        return {name: value for name, value in zip(found, values, strict=True) if math.isfinite(value)}

    def sketch(self, name: str) -> Tensor | None:
        """What was seen beside an adapter, ``(count, in_features)``, or None."""
        probe = self._probes.get(name)
        return None if probe is None else probe.sketch

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: probe.state() for name, probe in self._probes.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], looking: bool) -> None:
        """Go on from a state that ``check_state`` has accepted; not ``looking``: they have stopped."""
        self.forget()
        for name, layer in self._adapters.items():
            if parts := state.get(name):
                a = layer.lora_A
                sums = [parts[part].to(a.device, torch.float32, copy=True) for part in ("sketch", "seen")]
                self._probes[name] = probe = Probe(parts["mix"].to(a, copy=True), *sums)
                layer.probe = probe if looking else None
