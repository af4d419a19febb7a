"""A plan carried out: rows of adapters, of their gates, and of what optimizers remember of them move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation.plan import LayerPlan, Plan
from l1ra.layers.linear import L1RALinear
from l1ra.layers.row_moves import RowMoves
from l1ra.training.gate_bank import GateBank
from l1ra.training.optimizer_state import plan_state, scale_state

__all__ = ["move_ranks"]


def move_ranks(
    adapters: Mapping[str, L1RALinear],
    plan: Plan,
    bank: GateBank,
    optimizers: Sequence[Optimizer],
    new_rows: Callable[[str, LayerPlan], Tensor],
) -> tuple[int, int]:
    """Cut and deal the ranks of all adapters as ``plan`` says; the model's function stays if the cut ones' gates are 0.

    Args:
        plan: of as many layers as ``adapters``, in the same order.
        new_rows: called with a name and its part of the plan, once for each adapter that changes, in order; returns A
            of its new ranks, ``(grow, in_features)``.

    Returns:
        How many ranks were cut, and by how many the growing adapters grew, both in all.
    """
    moves, resized, rescaled, pruned, moved = RowMoves(), {}, {}, 0, 0
    for (name, layer), change in zip(adapters.items(), plan.layers, strict=True):
        cut = layer.rank - len(change.keep)
        pruned += cut
        moved += max(0, change.rank - layer.rank)
        if not cut and not change.grow:
            continue
        layer.plan_resize(moves, change, new_rows(name, change))
        if (factor := layer.rescaling(change.rank)) != 1:
            rescaled[layer.lora_B] = factor
        sources = layer.row_sources(change)
        resized |= {param: (sources, param.shape) for param in (layer.lora_A, layer.gate, layer.lora_B)}
    for optimizer in optimizers:
        plan_state(moves, optimizer, resized)
        for param, factor in rescaled.items():
            moves.afterwards(partial(scale_state, optimizer, param, factor))
    bank.plan_move(moves, plan)
    moves.run()
    bank.write()
    return pruned, moved
