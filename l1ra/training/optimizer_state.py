"""The optimizer's state (moments, momentum) of adapter rows that are kept, appended, rotated or rescaled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.layers.row_moves import RowMoves
from l1ra.layers.tensor_lists import multiply_all_, transferred
from l1ra.training.quantised_state import COMPANIONS, is_quantised, read_values, write_values
from l1ra.training.row_rotation import RowRotation, rotate_rows

__all__ = ["can_rotate", "plan_state", "rotate_states", "scale_states"]

# Factored second moments: one number for each row of the parameter, and one for each column, shared by all rows.
PER_ROW = ("row_var", "exp_avg_sq_row")
SHARED = ("col_var", "exp_avg_sq_col")
# Never negative: sums of squares, largest values, and the step size of Rprop.
SQUARES = (*PER_ROW, "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size")
# In units other than the gradient's: averages of the parameter itself (ASGD, schedule-free), which start at the value
# of a new row, and step sizes.
AVERAGES = ("ax", "z")
STEPS = ("acc_delta", "step_size")
# Linear in the gradient. Optimizers of other libraries may use other names.
LINEAR = ("exp_avg", "momentum_buffer", "grad_avg", "prev", *AVERAGES)
# State that starts at a value of the parameter group instead of 0, and the name of that setting: Adagrad's sum, and the
# step size of Rprop, which is only ever multiplied.
STARTS = {"sum": "initial_accumulator_value", "step_size": "lr"}


def plan_state(
    moves: RowMoves, optimizer: Optimizer, plans: Mapping[torch.nn.Parameter, tuple[Sequence[int], torch.Size]]
) -> None:
    """Add the state of all parameters whose rows move to ``moves``.

    State tensors of the parameter's old shape, and factors with one number a row, move with the rows; new rows start at
    0. Scalars and factors shared by all rows stay. 8-bit state of bitsandbytes moves too and is quantised again. If a
    parameter has any other state, its whole state is reset, with a warning that names it.

    Args:
        plans: parameter -> for each new row the row it was before (-1: none), and the shape before the move.
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
            shape = f" of shape {tuple(state[lost].shape)}" if isinstance(state[lost], Tensor) else ""
            warnings.warn(
                f"{type(optimizer).__name__} keeps {lost!r}{sort}{shape} for an adapter parameter of shape "
                f"{tuple(old_shape)}, which can't be moved with its rows: the state of that parameter starts anew "
                "after a reallocation.",
                stacklevel=2,
            )
            moves.afterwards(state.clear)
            continue
        for name in state:
            if _kind(state, name, old_shape) == "rows":
                start = groups.get(param, {}).get(STARTS[name], 0.0) if name in STARTS else 0.0
                store, own = partial(write_values, state, name), not is_quantised(state, name)
                if name in AVERAGES:
                    store, own = partial(_write_average, param, sources, state, name), False
                moves.add(read_values(state, name), sources, float(start), store, in_place=own)


def can_rotate(optimizer: Optimizer, param: torch.nn.Parameter) -> bool:
    """Whether the state of the parameter can be rotated, see :func:`rotate_states`."""
    state = optimizer.state.get(param)
    if not state:
        return True
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    kinds = {name: _kind(state, name, param.shape) for name in state}
    return all(
        kind == "shared" or (kind == "rows" and (state[name].is_floating_point() or is_quantised(state, name)))
        for name, kind in kinds.items()
    )


class _Values(NamedTuple):
    """State with one row for each rank: ``values`` are the tensor ``state[name]`` itself or dequantised from it."""

    state: dict
    name: str
    values: Tensor

    def write(self) -> None:
        """Quantise ``values`` again, if need be, after they were changed in place."""
        if self.values is not self.state[self.name]:
            write_values(self.state, self.name, self.values)


def rotate_states(
    optimizers: Sequence[Optimizer], rotations: Mapping[torch.nn.Parameter, tuple[Sequence[int], Tensor]]
) -> None:
    """Rotate the state of parameters as their rows were rotated.

    State that is linear in the gradient is rotated like the rows. Squares become means weighted by the squares of the
    rotation, as if the gradients of different rows were uncorrelated.

    Args:
        rotations: parameter -> the ascending indices of its n rotated rows, and their rotation as in
            :func:`rotate_rows`.
    """
    found, turns = [], []
    for optimizer in optimizers:
        for param, turn in rotations.items():
            state = optimizer.state.get(param, {})
            rows = [name for name in state if _kind(state, name, param.shape) == "rows"]
            found += [_Values(state, name, read_values(state, name)) for name in rows]
            turns += [turn] * len(rows)
    squares = _never_negative(found)
    rotate_rows([RowRotation(v.values, *turn, s) for v, turn, s in zip(found, turns, squares, strict=True)])
    for values in found:
        values.write()


def scale_states(optimizers: Sequence[Optimizer], factors: Mapping[torch.nn.Parameter, float]) -> None:
    """Rescale the state of parameters that were divided by ``factors``: their gradients grow by these factors.

    Step sizes are not rescaled.
    """
    # The momentum of RMSprop and of transformers' Adafactor averages steps, that of all others gradients.
    momentum = {"square_avg": "momentum_buffer", "exp_avg_sq_row": "exp_avg"}
    found, numbers = [], []
    for optimizer in optimizers:
        for param, factor in factors.items():
            state = optimizer.state.get(param, {})
            steps = (*STEPS, *(name for squares, name in momentum.items() if squares in state))
            for name in state:
                if name not in steps and (name in SHARED or _kind(state, name, param.shape) == "rows"):
                    values = read_values(state, name)
                    if values.is_floating_point():
                        found.append(_Values(state, name, values))
                        numbers.append(factor)
    scales = []
    for (_, name, _), factor, never_negative in zip(found, numbers, _never_negative(found), strict=True):
        squares = name in SHARED or (name != "exp_inf" and never_negative)
        scales.append(1 / factor if name in AVERAGES else factor**2 if squares else factor)
    multiply_all_([values.values for values in found], scales)
    for values in found:
        values.write()


def _write_average(param: torch.nn.Parameter, sources: Sequence[int], state: dict, name: str, moved: Tensor) -> None:
    if -1 in sources:
        new = slice(sources.index(-1), None)  # no old row comes behind a new one
        moved[new] = param.detach()[new].to(moved)  # its new rows are there already
    write_values(state, name, moved)


def _never_negative(found: Sequence[_Values]) -> list[bool]:
    # Under unknown names the values decide: optimizers take the root of squares, which must not become negative.
    unknown = [v for v in found if v.name not in (*SQUARES, *LINEAR)]
    least = transferred([v.values.min() for v in unknown], torch.device("cpu"), torch.float64)
    signs = iter(torch.stack(least).tolist() if least else ())
    return [v.name in SQUARES or (v.name not in LINEAR and next(signs) >= 0) for v in found]


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)


def _kind(state: dict, name: str, old_shape: torch.Size) -> str:
    """``"rows"`` if it moves with the rows, ``"shared"`` if it stays, else ``"unknown"``."""
    # By name first: at rank 1 a factor has the shape of the parameter or of a scalar.
    value = state[name]
    if not isinstance(value, Tensor):  # of an object nobody knows which rows it holds, e.g. GaLore's projector
        return "shared" if value is None or isinstance(value, int | float | str) else "unknown"
    if name in SHARED:
        return "shared"
    if not _is_plain(value):
        return "unknown"
    if name in COMPANIONS:
        owner = "state" + name[-1]
        return "shared" if owner in state and is_quantised(state, owner) else "unknown"
    if value.shape == old_shape or (name in PER_ROW and value.shape[:1] == old_shape[:1]):
        return "rows"
    return "shared" if value.numel() == 1 and value.dim() < len(old_shape) else "unknown"


def _reset_lbfgs(moves: RowMoves, optimizer: torch.optim.LBFGS) -> None:
    # LBFGS has one state for all parameters, flattened and concatenated.
    if optimizer.state:
        warnings.warn(
            "LBFGS keeps one flat state for all parameters, which can't be moved with the rows of one: it starts anew "
            "after a reallocation.",
            stacklevel=3,
        )
    moves.afterwards(optimizer.state.clear)
    moves.afterwards(lambda: setattr(optimizer, "_numel_cache", None))
