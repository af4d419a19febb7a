"""The gates of all adapters as flat vectors: the float32 master copy that a gate rule (``gate_rules.py``) moves."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from l1ra.allocation.plan import Plan
from l1ra.layers.base_layers import is_partitioned, tensor_of
from l1ra.layers.linear import L1RALinear
from l1ra.layers.precision import widest_float
from l1ra.layers.row_moves import RowMoves, row_sources
from l1ra.layers.sharding import is_sharded, part_of, wholes
from l1ra.layers.tensor_lists import copy_all_, grouped, transferred
from l1ra.layers.zero import ZeroOptimizer
from l1ra.training.row_rotation import RowRotation, rotate_rows
from l1ra_kernels import dispatch

__all__ = ["GateBank", "GateGradients"]

# Name of a tensor -> its value for a new rank.
STATE = {"value": 1.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "importance_sq": 0.0, "age": 0.0, "weight": 0.0}


class GateGradients(NamedTuple):
    """The gradients of the master gates.

    Attributes:
        flat: ``(R,)``.
        seen: ``(R,)`` bool, the gates that had a gradient; None if all had.
        layers: the numbers of the layers whose gates had one.
    """

    flat: Tensor
    seen: Tensor | None
    layers: Collection[int]


class GateBank:
    """Flat float32 tensors ``(R,)``, R the sum of all ranks, adapter after adapter.

    They live on the device of the first gate and follow it, since a model is often moved after it was patched.

    Attributes:
        value: the master gates. The layers' Parameters are copies of them, times the layers' ``rank_scaling``, in the
            dtype of these.
        exp_avg, exp_avg_sq: Adam moments (rule ``"l1"``).
        importance_sq: moving average of ``(g * dL/dg)**2``.
        age: the number of steps at which each gate was trained.
        weight: of the L1 penalty of each rank (rule ``"adaptive-l1"``).
        skipped: int64 scalar, the number of steps at which a gradient, or its square, was not finite.
        zero: DeepSpeed's optimizer that holds the gates, None without one.
    """

    PENALTY_WEIGHT = 2.0  # a penalised gate falls by 2 - 1 = 1 unit a step, as fast as other gates are pulled up to 1

    def __init__(self, layers: Sequence[L1RALinear]) -> None:
        self.layers = list(layers)
        self.zero: ZeroOptimizer | None = None
        self._read_layers()

    def _read_layers(self) -> None:
        device = self.layers[0].gate.device
        self._read_ranks(device)
        gates = torch.cat(transferred(_gates_of(self.layers), device, torch.float32))
        self.value = (gates / self._rank_scaling).to(gates)
        for name, fill in STATE.items():
            if name != "value":
                setattr(self, name, torch.full_like(gates, fill))
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def _read_ranks(self, device: torch.device) -> None:
        self.ranks = [layer.rank for layer in self.layers]
        # B was divided by this number to the last bit, so the gates of a float64 adapter take it without rounding.
        factors = [factor for layer in self.layers for factor in [layer.rank_scaling] * layer.rank]
        self._rank_scaling = torch.tensor(factors, dtype=widest_float(device), device="cpu").to(device)

    def _move_to(self, device: torch.device) -> None:
        if self.value.device != device:
            for name in (*STATE, "skipped"):
                setattr(self, name, getattr(self, name).to(device))
            self._rank_scaling = self._rank_scaling.to(device, widest_float(device))

    def take_gradients(self, chosen: Iterable[int]) -> dict[int, Tensor]:
        """Remove the gradients from the gates of the layers with these numbers: layer number -> gradient."""
        taken = {}
        for i in chosen:
            gate = tensor_of(self.layers[i], "gate")
            if gate.grad is not None:
                taken[i], gate.grad = gate.grad, None
        return taken

    def flatten(self, taken: Mapping[int, Tensor]) -> GateGradients | None:
        """The gradients of the layers' gates, by layer number, as one of the master gates; None if there are none."""
        if not taken:
            return None
        taken = dict(zip(taken, wholes(list(taken.values())), strict=True))
        self._move_to(tensor_of(self.layers[0], "gate").device)
        device, dtype = self.value.device, self.value.dtype
        seen = none = None
        if len(taken) < len(self.layers):
            none = torch.zeros(max(self.ranks), device=device, dtype=dtype)
            had = torch.tensor([i in taken for i in range(len(self.layers))], device="cpu")
            seen = had.repeat_interleave(torch.tensor(self.ranks, device="cpu")).to(device)
        parts = [taken.get(i, none)[:rank] for i, rank in enumerate(self.ranks)]
        flat = (torch.cat(transferred(parts, device, dtype)) * self._rank_scaling).to(dtype)
        return GateGradients(flat, seen, taken.keys())

    def update(self, new: dict[str, Tensor], grad: Tensor, seen: Tensor | None) -> None:
        """Take over the new state that a rule has returned; see ``Rule.step``.

        Nothing is copied to the host, so that the GPU is not waited for.
        """
        if "age" not in new:
            new = {**new, "age": self.age + 1}
            old = [getattr(self, name) for name in new]
            kept = dispatch.unless_not_finite(list(new.values()), old, grad, self.skipped, seen)
            new = dict(zip((*new, "skipped"), kept, strict=True))
        for name, tensor in new.items():
            setattr(self, name, tensor)

    @torch.no_grad()
    def write_to_layers(self, held: Collection[int] | None = None, moved: Collection[int] = ()) -> None:
        """Copy the master gates into the layers, which undoes whatever an optimizer did to them.

        Args:
            held: the numbers of the layers to write; None: all, each of which may have moved.
            moved: the layers among them whose master gates may have changed. The gates of the others keep their
                values, and are written without a mark: a backward that needs them may be waiting.
        """
        if self.zero is not None:
            self.zero.write_gates(self._layer_gates())
            return
        gates, own = _rows_here(self.layers, self._layer_gates())
        if held is not None:
            gates = [gates[i] if i in moved else gates[i].data for i in held]
            own = [own[i] for i in held]
        copy_all_(gates, own)

    def is_written(self, gates: Sequence[Tensor]) -> bool:
        """Whether ``gates`` ``(rows,)`` of each layer are the master gates, up to rounding, and 0 behind the ranks."""
        pairs = zip(gates, self._layer_gates(), self.ranks, strict=True)
        return all(
            torch.allclose(gate[:rank], own.to(gate), rtol=1e-2, atol=1e-2) and not gate[rank:].any()
            for gate, own, rank in pairs
        )

    def _layer_gates(self) -> tuple[Tensor, ...]:
        return (self.value * self._rank_scaling).split(self.ranks)

    def refresh(self) -> None:
        """Start again from the layers if one of them was resized, or has loaded other gates, without this bank."""
        if self._stale():
            self._read_layers()

    @torch.no_grad()
    def _stale(self) -> bool:
        loaded = [i for i, layer in enumerate(self.layers) if layer.gate_loaded and not layer.is_flat]
        for i in loaded:
            self.layers[i].gate_loaded = False
        loaded = [i for i in loaded if not is_partitioned(self.layers[i].gate)]
        if any(layer.rank != rank for layer, rank in zip(self.layers, self.ranks, strict=True)):
            return True
        gates, own = _gates_of([self.layers[i] for i in loaded]), self._layer_gates() if loaded else ()
        for (device, dtype), alike in grouped(gates, lambda gate: (gate.device, gate.dtype)).items():
            there = transferred([own[loaded[k]] for k in alike], device, dtype)
            if not torch.equal(torch.cat([gates[k] for k in alike]), torch.cat(there)):
                return True
        return False

    def penalise(self, chosen: Sequence[Sequence[int]], periods: Sequence[int]) -> None:
        """From now on apply the L1 penalty to these rows of each adapter, and to no others.

        Args:
            periods: of each adapter, in how many steps it is trained once. Its penalty is as many times larger, so that
                its gates fade as soon.
        """
        rows = [start + row for start, rows in zip(self._starts(), chosen, strict=True) for row in rows]
        factors = [period for rows, period in zip(chosen, periods, strict=True) for _ in rows]
        weight = torch.zeros(len(self.value), dtype=torch.float32, device="cpu")
        weight[torch.tensor(rows, dtype=torch.long, device="cpu")] = self.PENALTY_WEIGHT * torch.tensor(
            factors, dtype=torch.float32, device="cpu"
        )
        self.weight = weight.to(self.weight)

    def penalise_none(self) -> None:
        """From now on apply no penalty: all gates return to 1."""
        self.weight = torch.zeros_like(self.weight)

    def _starts(self) -> Iterator[int]:
        """The first row of each adapter."""
        return itertools.accumulate(self.ranks[:-1], initial=0)

    def plan_move(self, moves: RowMoves, plan: Plan) -> None:
        """Add the state to ``moves``, by a plan that the layers will follow."""
        flat = [
            start + row if row >= 0 else row
            for start, layer in zip(self._starts(), plan.layers, strict=True)
            for row in row_sources(layer)
        ]
        for name, fill in STATE.items():
            moves.add(getattr(self, name), flat, fill, partial(setattr, self, name))
        moves.afterwards(lambda: self._read_ranks(self.value.device))

    def rows_at_one(self) -> list[list[int]]:
        """For each adapter the rows that have been trained and whose gate is 1: no penalty has moved them."""
        at_one = self.by_adapter((self.age > 0) & (self.value == 1))
        return [[k for k, yes in enumerate(row) if yes] for row in at_one]

    def rotate(self, rows: Sequence[Sequence[int]], rotations: Sequence[Tensor | None]) -> None:
        """Rotate the importance of these rows of each adapter as the rows themselves were rotated.

        The gradients of different gates are taken as uncorrelated: the squares of the rotated ones are then means of
        the squares.
        """
        parts = zip(self.importance_sq.split(self.ranks), rows, rotations, strict=True)
        rotate_rows([RowRotation(*part, squared=True) for part in parts if part[2] is not None])

    def by_adapter(self, flat: Tensor) -> list[list[float]]:
        """A flat tensor as one list an adapter."""
        values = flat.tolist()
        return [values[start : start + rank] for start, rank in zip(self._starts(), self.ranks, strict=True)]

    def summary(self) -> dict[str, float]:
        """The smallest and the mean gate, the share of gates at exactly 0, and the number of skipped steps."""
        value = self.value
        numbers = torch.stack([value.min(), value.mean(), (value == 0).float().mean()])
        least, mean, zero, skipped = torch.cat([numbers.to(self._rank_scaling), self.skipped[None]]).tolist()
        return {"min": least, "mean": mean, "zero": zero, "skipped": int(skipped)}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, by name. The gates are those of the layers, into which a user may have copied an
        average."""
        state = {**{name: getattr(self, name).clone() for name in STATE}, "skipped": self.skipped.clone()}
        parted = any(is_sharded(layer.gate) or is_partitioned(layer.gate) for layer in self.layers)
        if not parted:  # otherwise all processes would have to ask for the state together
            gates, kind = _gates_of(self.layers), (self.value.device, self.value.dtype)
            # A layer that was cast holds the master gates rounded, which are no others.
            written = [master.to(gate.dtype) for master, gate in zip(self._layer_gates(), gates, strict=True)]
            own, written = (torch.cat(transferred(part, *kind)) for part in (gates, written))
            state["value"] = torch.where(own == written, self.value, (own / self._rank_scaling).to(own).clamp(0, 1))
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same ranks, and write the gates to the layers."""
        for name in (*STATE, "skipped"):
            setattr(self, name, state[name].to(getattr(self, name)).clone())
        self._read_ranks(self.value.device)
        self.write_to_layers()


def _gates_of(layers: Sequence[L1RALinear]) -> list[Tensor]:
    """The gates of the ranks of each layer."""
    gates = wholes([tensor_of(layer, "gate") for layer in layers])
    return [gate if layer.reserve is None else gate[: layer.rank] for layer, gate in zip(layers, gates, strict=True)]


def _rows_here(layers: Sequence[L1RALinear], values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gates that this process holds, and for them the parts of ``values``, the gates of each layer's ranks."""
    gates, parts = [], []
    for layer, value in zip(layers, values, strict=True):
        gate = tensor_of(layer, "gate")
        if is_sharded(gate):
            gate, start, _ = part_of(gate)
            value = value[start : start + len(gate)]
        gates.append(gate if len(gate) == len(value) else gate[: len(value)])
        parts.append(value)
    return gates, parts
