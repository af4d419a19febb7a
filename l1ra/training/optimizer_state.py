"""Optimizer state follows the rows: what an optimizer remembers of a kept row stays with it, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation.plan import LayerPlan
from l1ra.layers.row_moves import RowMoves, row_sources
from l1ra.training.quantised_state import BESIDE, in_blocks, read, write

__all__ = ["holds", "move_state", "plan_state", "scale_state", "turn_state", "turns"]

# Factored second moments. Per row: one number a row of the parameter. Shared: one number a column, over all rows.
PER_ROW = ("row_var", "exp_avg_sq_row")
SHARED = ("col_var", "exp_avg_sq_col")
# What is never negative: sums of squares, largest values, and the step of Rprop.
SQUARES = (*PER_ROW, "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size")
# What is no gradient: averages of the parameter itself (ASGD, schedule-free), which begin with a new row as it is, and
# sizes of steps.
AVERAGES = ("ax", "z")
STEPS = ("acc_delta", "step_size")
# What changes as the gradient does. An optimizer of another library may have other names for it.
LINEAR = ("exp_avg", "momentum_buffer", "grad_avg", "prev", *AVERAGES)
# What starts at a value of the user's choice instead of 0, and the setting of the group that holds it: Adagrad's sum
# and the step of Rprop, which is only ever multiplied.
STARTS = {"sum": "initial_accumulator_value", "step_size": "lr"}


def holds(optimizer: Optimizer, params: set[int]) -> bool:
    """Whether ``optimizer`` steps any of the parameters with these ids."""
    return any(id(p) in params for group in optimizer.param_groups for p in group["params"])


def move_state(optimizer: Optimizer, param: torch.nn.Parameter, plan: LayerPlan, old_shape: torch.Size) -> None:
    """Carry the state of one parameter, resized by ``plan`` from ``old_shape``, along with its rows: see
    :func:`plan_state`."""
    moves = RowMoves()
    plan_state(moves, optimizer, {param: (row_sources(plan), old_shape)})
    moves.run()


def plan_state(
    moves: RowMoves, optimizer: Optimizer, plans: Mapping[torch.nn.Parameter, tuple[Sequence[int], torch.Size]]
) -> None:
    """Add to ``moves`` the state of all parameters whose rows move, each to its sources, from its old shape.

    State tensors of the parameter's old shape and per-row factors move, new rows start at 0; scalars and factors
    shared by all rows stay. bitsandbytes' 8-bit numbers move too, rounded anew. The rest can't be followed: then the
    state of this parameter alone will be reset, and a warning names it.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        if plans:
            _reset_lbfgs(moves, optimizer)
        return
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for param, (sources, old_shape) in plans.items():
        state = optimizer.state.get(param)
        if not state:
            continue
        lost = next((name for name in state if _kind(state, name, old_shape) == "unknown"), None)
        if lost is not None:
            sort = "" if _is_plain(state[lost]) else f", an {type(state[lost]).__name__}"
            warnings.warn(
                f"{type(optimizer).__name__} keeps {lost!r}{sort} of shape {tuple(state[lost].shape)} for an adapter "
                f"parameter of shape {tuple(old_shape)}, which can't be moved with its rows: the state of that "
                "parameter starts anew after a reallocation.",
                stacklevel=2,
            )
            moves.afterwards(state.clear)
            continue
        for name in state:
            if _kind(state, name, old_shape) == "rows":
                start = groups.get(param, {}).get(STARTS[name], 0.0) if name in STARTS else 0.0
                take = partial(_take_average, param, sources) if name in AVERAGES else write
                moves.add(read(state, name), sources, float(start), partial(take, state, name))


def turns(optimizer: Optimizer, param: torch.nn.Parameter) -> bool:
    """Whether :func:`turn_state` can turn what ``optimizer`` keeps of the parameter."""
    state = optimizer.state.get(param)
    if not state:
        return True
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    kinds = {name: _kind(state, name, param.shape) for name in state}
    return all(
        kind == "shared" or (kind == "rows" and (state[name].is_floating_point() or in_blocks(state, name)))
        for name, kind in kinds.items()
    )


def turn_state(optimizer: Optimizer, param: torch.nn.Parameter, rows: Tensor, rotation: Tensor) -> None:
    """The rows of a parameter were turned among themselves: so is its state.

    What is linear in the gradient turns alike. Squares become means weighted by the squares of the rotation, which is
    what they would be if the rows' gradients were uncorrelated.

    Args:
        rows: their ``(n,)`` indices.
        rotation: ``(n, n)``, orthogonal, in the widest dtype of the device.
    """
    state = optimizer.state.get(param, {})
    for name in state:
        if _kind(state, name, param.shape) == "rows":
            values = read(state, name)
            matrix = rotation.square() if _never_negative(name, values) else rotation
            values.index_copy_(0, rows, (matrix @ values[rows].to(matrix)).to(values.dtype))
            write(state, name, values)


def scale_state(optimizer: Optimizer, param: torch.nn.Parameter, factor: float) -> None:
    """A parameter was divided by ``factor``, which its gradient takes from now on: so does its state.

    Sizes of steps stay: the optimizer goes on in steps as long as before, in a parameter that is scaled.
    """
    state = optimizer.state.get(param, {})
    # The momentum of RMSprop, and of transformers' Adafactor, is one of steps, that of all others one of gradients.
    momentum = {"square_avg": "momentum_buffer", "exp_avg_sq_row": "exp_avg"}
    steps = (*STEPS, *(name for squares, name in momentum.items() if squares in state))
    for name in state:
        if name in steps or not (name in SHARED or _kind(state, name, param.shape) == "rows"):
            continue
        values = read(state, name)
        if values.is_floating_point():
            squares = name in SHARED or (name != "exp_inf" and _never_negative(name, values))
            write(state, name, values.mul_(1 / factor if name in AVERAGES else factor**2 if squares else factor))


def _take_average(param: torch.nn.Parameter, sources: Sequence[int], state: dict, name: str, moved: Tensor) -> None:
    new = [row for row, source in enumerate(sources) if source < 0]
    moved[new] = param.detach()[new].to(moved)  # which has got its new rows before
    write(state, name, moved)


def _never_negative(name: str, values: Tensor) -> bool:
    # Of unknown names the numbers tell: a root will be taken of squares, so none of them may become negative.
    return name in SQUARES or (name not in LINEAR and bool((values >= 0).all()))


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)


def _kind(state: dict, name: str, old_shape: torch.Size) -> str:
    """``"rows"`` if it moves with the rows, ``"shared"`` if it stays, else ``"unknown"``."""
    # By name first: at rank 1 a factor has the shape of the parameter itself, or that of a scalar.
    value = state[name]
    if not isinstance(value, Tensor) or name in SHARED:
        return "shared"
    if not _is_plain(value):
        return "unknown"
    if name in BESIDE:
        owner = "state" + name[-1]
        return "shared" if owner in state and in_blocks(state, owner) else "unknown"
    if value.shape == old_shape or (name in PER_ROW and value.shape[:1] == old_shape[:1]):
        return "rows"
    return "shared" if value.numel() == 1 and value.dim() < len(old_shape) else "unknown"


def _reset_lbfgs(moves: RowMoves, optimizer: torch.optim.LBFGS) -> None:
    # One state for all parameters, flattened one after the other.
    if optimizer.state:
        warnings.warn(
            "LBFGS keeps one flat state for all parameters, which can't be moved with the rows of one: it starts anew "
            "after a reallocation.",
            stacklevel=3,
        )
    moves.afterwards(optimizer.state.clear)
    moves.afterwards(lambda: setattr(optimizer, "_numel_cache", None))
