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
# What starts at a value of the user's choice instead of 0, and the setting of the group that holds it: Adagrad's sum
# and the step of Rprop, which is only ever multiplied.
STARTS = {"sum": "initial_accumulator_value", "step_size": "lr"}


def holds(optimizer: Optimizer, params: set[int]) -> bool:
    """Whether ``optimizer`` steps any of the parameters with these ids."""
    return any(id(p) in params for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def move_state(optimizer: Optimizer, param: torch.nn.Parameter, plan: LayerPlan, old_shape: torch.Size) -> None:
    """Carry the state of ``param``, resized by ``plan`` from ``old_shape``, along with its rows; new rows start at 0.

    State tensors of the parameter's old shape and per-row factors move; scalars and factors shared by all rows stay.
    The rest can't be followed: then the state of this parameter alone is reset, and a warning names it.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        _reset_lbfgs(optimizer)
        return
    state = optimizer.state.get(param)
    if not state:
        return
    group = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), {})
    moved = {}
    for name, value in state.items():
        # By name first: at rank 1 a factor has the shape of the parameter itself, or that of a scalar.
        if not isinstance(value, Tensor) or name in SHARED:
            continue
        if value.shape == old_shape or (name in PER_ROW and value.shape[:1] == old_shape[:1]):
            start = group.get(STARTS[name], 0.0) if name in STARTS else 0.0
            moved[name] = dispatch.move_rows(value, plan.keep, plan.grow, float(start))
        elif value.numel() != 1 or value.dim() >= len(old_shape):
            warnings.warn(
                f"{type(optimizer).__name__} keeps {name!r} of shape {tuple(value.shape)} for an adapter parameter of "
                f"shape {tuple(old_shape)}, which can't be moved with its rows: the state of that parameter starts "
                "anew after a reallocation.",
                stacklevel=2,
            )
            state.clear()
            return
    state.update(moved)


def _reset_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    # One state for all parameters, flattened one after the other.
    if optimizer.state:
        warnings.warn(
            "LBFGS keeps one flat state for all parameters, which can't be moved with the rows of one: it starts anew "
            "after a reallocation.",
            stacklevel=3,
        )
    optimizer.state.clear()
    optimizer._numel_cache = None
