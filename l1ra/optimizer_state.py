"""Optimizer state follows the rows: what an optimizer remembers of a kept row stays with it, bit for bit."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation import LayerPlan
from l1ra_kernels import dispatch

__all__ = ["holds", "move_state"]

# Factored second moments. Per row: one number a row of the parameter. Shared: one number a column, over all rows.
PER_ROW = ("row_var", "exp_avg_sq_row")
SHARED = ("col_var", "exp_avg_sq_col")


def holds(optimizer: Optimizer, params: set[int]) -> bool:
    """Whether ``optimizer`` steps any of the parameters with these ids."""
    return any(id(p) in params for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def move_state(optimizer: Optimizer, param: torch.nn.Parameter, plan: LayerPlan, old_shape: torch.Size) -> None:
    """Carry the state of ``param``, resized by ``plan`` from ``old_shape``, along with its rows; new rows start at 0.

    State tensors of the parameter's old shape and per-row factors move; scalars and factors shared by all rows stay.
    The rest can't be followed: then the state of this parameter alone is reset, and a warning names it.
    """
    state = optimizer.state.get(param)
    if not state:
        return
    group = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), {})
    moved = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() < len(old_shape)):
            continue
        if value.shape == old_shape or (name in PER_ROW and value.shape[:1] == old_shape[:1]):
            # Adagrad's sum starts at a value of the user's choice.
            start = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0
            moved[name] = dispatch.move_rows(value, plan.keep, plan.grow, start)
        elif name not in SHARED:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for an adapter parameter of "
                f"shape {tuple(old_shape)}, which can't be moved with its rows: the state of that parameter starts "
                "anew after a reallocation.",
                stacklevel=2,
            )
            state.clear()
            return
    state.update(moved)
