"""The gates of all adapters as flat vectors: the fp32 master copy that the controller moves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from l1ra.allocation.plan import Plan
from l1ra.layers.linear import L1RALinear
from l1ra.layers.precision import widest
from l1ra.layers.row_moves import RowMoves, row_sources
from l1ra_kernels import dispatch

__all__ = ["GateBank"]

# name -> value of a new rank
STATE = {"value": 1.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "importance_sq": 0.0, "age": 0.0, "weight": 0.0}


class GateBank:
    """Flat float32 tensors ``(R,)``, R the sum of all ranks, adapter after adapter.

    They live on the first gate's device and follow it: a model is often moved after it was patched.

    Attributes:
        value: the master gates. The layers' Parameters are copies of them times the layers' ``share``, in whatever
            dtype the model has.
        exp_avg, exp_avg_sq: Adam moments (rule ``"l1"``).
        importance_sq: moving average of ``(g * dL/dg)**2``.
        age: steps that each gate has seen.
        weight: of each rank's L1 penalty (rule ``"adaptive-l1"``).
        skipped: int64 scalar, steps with a gradient that was not finite, or whose square was not.
    """

    PRESSED = 2.0  # weight of a rank that is to go: its gate falls as fast as the others are pulled to 1

    def __init__(self, layers: Sequence[L1RALinear]) -> None:
        self.layers = list(layers)
        device = self.layers[0].gate.device
        self._measure(device)
        gates = torch.cat([layer.gate.detach()[: layer.rank].to(device, torch.float32) for layer in self.layers])
        self.value = (gates / self._share).to(gates)
        for name, fill in STATE.items():
            if name != "value":
                setattr(self, name, torch.full_like(gates, fill))
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def _measure(self, device: torch.device) -> None:
        self.ranks = [layer.rank for layer in self.layers]
        # A changed rank divides B by what the gates of a float64 adapter must take to the last bit.
        shares = [layer.share for layer, rank in zip(self.layers, self.ranks, strict=True) for _ in range(rank)]
        self._share = torch.tensor(shares, dtype=widest(device)).to(device)

    def _follow(self, device: torch.device) -> None:
        if self.value.device != device:
            for name in (*STATE, "skipped"):
                setattr(self, name, getattr(self, name).to(device))
            self._share = self._share.to(device, widest(device))

    def take_gradients(self) -> tuple[Tensor, Tensor | None] | None:
        """Remove the gradients from the gates: flat, of the masters, and a mask of the gates that had one.

        The mask is None if all of them had one; None instead of both if no gate has a gradient.
        """
        grads = [layer.gate.grad for layer in self.layers]
        if all(grad is None for grad in grads):
            return None
        for layer in self.layers:
            layer.gate.grad = None
        self._follow(self.layers[0].gate.device)
        device, dtype = self.value.device, self.value.dtype
        parts = [
            torch.zeros(rank, device=device, dtype=dtype) if grad is None else grad[:rank].to(device, dtype)
            for grad, rank in zip(grads, self.ranks, strict=True)
        ]
        seen = None
        if any(grad is None for grad in grads):
            had = torch.tensor([grad is not None for grad in grads])
            seen = had.repeat_interleave(torch.tensor(self.ranks)).to(device)
        return (torch.cat(parts) * self._share).to(dtype), seen

    def update(self, new: dict[str, Tensor], grad: Tensor, seen: Tensor | None) -> None:
        """Take over new values of the state, but nothing at all at a step whose gradient is not finite.

        A new state that has an ``age`` is taken as it is: the ops for gate steps have seen to that already. No value is
        brought to the host, so that a GPU is not waited for.
        """
        if "age" not in new:
            new = {**new, "age": self.age + 1}
            old = [getattr(self, name) for name in new]
            kept = dispatch.unless_not_finite(list(new.values()), old, grad, self.skipped, seen)
            new = dict(zip((*new, "skipped"), kept, strict=True))
        for name, tensor in new.items():
            setattr(self, name, tensor)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the masters into the layers' gates, undoing whatever an optimizer did to them."""
        gates = [layer.gate if layer.reserve is None else layer.gate[: layer.rank] for layer in self.layers]
        torch._foreach_copy_(gates, self._written())

    def _written(self) -> list[Tensor]:
        return list((self.value * self._share).split(self.ranks))

    def refresh(self) -> None:
        """Start anew from the layers' gates if somebody else has resized a layer, or loaded other gates into it."""
        if self._stale():
            self.__init__(self.layers)

    def _stale(self) -> bool:
        loaded = [layer.gate_loaded for layer in self.layers]
        for layer in self.layers:
            layer.gate_loaded = False
        if any(layer.rank != rank for layer, rank in zip(self.layers, self.ranks, strict=True)):
            return True
        return any(loaded) and any(
            new and not torch.equal(layer.gate[: layer.rank], gate.to(layer.gate))
            for new, layer, gate in zip(loaded, self.layers, self._written(), strict=True)
        )

    def press(self, chosen: Sequence[Sequence[int]]) -> None:
        """From now on an L1 penalty presses these rows of each adapter, and no others."""
        weight = torch.zeros(len(self.value))
        start = 0
        for rows, rank in zip(chosen, self.ranks, strict=True):
            weight[[start + row for row in rows]] = self.PRESSED
            start += rank
        self.weight = weight.to(self.weight)

    def plan_move(self, moves: RowMoves, plan: Plan) -> None:
        """Add to ``moves``: the state goes along with a plan that the layers will follow."""
        flat, start = [], 0
        for layer, rank in zip(plan.layers, self.ranks, strict=True):
            flat += [start + row if row >= 0 else row for row in row_sources(layer)]
            start += rank
        for name, fill in STATE.items():
            moves.add(getattr(self, name), flat, fill, partial(setattr, self, name))
        moves.afterwards(lambda: self._measure(self.value.device))

    def settled(self) -> list[list[int]]:
        """For each adapter the rows that have been trained and that no penalty has moved: their gates are 1."""
        whole = self.rows((self.age > 0) & (self.value == 1))
        return [[k for k, is_whole in enumerate(row) if is_whole] for row in whole]

    def turn(self, rows: Sequence[Sequence[int]], rotations: Sequence[Tensor | None]) -> None:
        """These rows of each adapter were turned among themselves: so is their importance.

        As their gates' gradients were uncorrelated, the squares of turned ones are means of the squares.
        """
        start = 0
        for some, rotation, rank in zip(rows, rotations, self.ranks, strict=True):
            if rotation is not None:
                index = torch.tensor(some, device=self.value.device) + start
                matrix = rotation.square().to(self.importance_sq)
                self.importance_sq[index] = matrix @ self.importance_sq[index]
            start += rank

    def rows(self, flat: Tensor) -> list[list[float]]:
        """A flat tensor as one list an adapter."""
        return [part.tolist() for part in flat.cpu().split(self.ranks)]

    def summary(self) -> dict[str, float]:
        """Smallest and mean gate, the share at exactly 0, and the steps skipped."""
        value = self.value
        return {
            "min": value.min().item(),
            "mean": value.mean().item(),
            "zero": (value == 0).float().mean().item(),
            "skipped": self.skipped.item(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {**{name: getattr(self, name).clone() for name in STATE}, "skipped": self.skipped.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same ranks."""
        for name in (*STATE, "skipped"):
            setattr(self, name, state[name].to(getattr(self, name)).clone())
        self._measure(self.value.device)
        self.write()
