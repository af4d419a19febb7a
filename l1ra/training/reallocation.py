"""Carrying out a plan: rows of adapters, gates and optimizer state are pruned, kept and appended together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation.plan import Plan
from l1ra.layers.linear import L1RALinear
from l1ra.layers.row_moves import RowMoves
from l1ra.training.averages import Averages
from l1ra.training.gate_bank import GateBank
from l1ra.training.optimizer_state import plan_state, scale_states

__all__ = ["Reallocation", "move_ranks"]


class Reallocation(NamedTuple):
    """What a reallocation did.

    Attributes:
        pruned: number of ranks that were cut.
        moved: number of ranks by which adapters grew, in all.
        coherence: adapter name -> agreement of its gradients in the interval before, see ``gradient_probe.coherence``;
            empty without probes.
    """

    pruned: int
    moved: int
    coherence: dict[str, float]


def move_ranks(
    adapters: Sequence[L1RALinear],
    plan: Plan,
    bank: GateBank,
    optimizers: Sequence[Optimizer],
    new_rows: Sequence[Tensor | None],
    averages: Averages | None = None,
) -> Reallocation:
    """Prune and append ranks of all adapters as ``plan`` says.

    The function of the model does not change if the gates of the pruned ranks are 0.

    Args:
        plan: for as many layers as ``adapters``, in the same order.
        bank: the gates of these adapters.
        optimizers: whose state moves along.
        new_rows: for each adapter A of its new ranks, ``(grow, in_features)``, or None if it grows by none.
        averages: of these adapters; they move along.

    Returns:
        The number of ranks that were pruned, and by which adapters grew, without coherence.
    """
    moves, resized, rescaled, pruned, moved = RowMoves(), {}, {}, 0, 0
    for layer, change, rows in zip(adapters, plan.layers, new_rows, strict=True):
        cut = layer.rank - len(change.keep)
        pruned += cut
        moved += max(0, change.rank - layer.rank)
        if not cut and not change.grow:
            continue
        layer.plan_resize(moves, change, rows)
        if (factor := layer.gate_factor(change.rank)) != 1:
            rescaled[layer.lora_B] = factor
        sources = layer.row_sources(change)
        resized |= {param: (sources, param.shape) for param in (layer.lora_A, layer.gate, layer.lora_B)}
    for optimizer in optimizers:
        plan_state(moves, optimizer, resized)
    moves.afterwards(partial(scale_states, optimizers, rescaled))
    if averages is not None:
        averages.plan_move(moves, plan, new_rows)
    bank.plan_move(moves, plan)
    moves.run()
    bank.write_to_layers()
    return Reallocation(pruned, moved, {})
