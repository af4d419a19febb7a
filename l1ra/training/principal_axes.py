"""Rotation of an adapter's ranks onto its principal axes: each rank becomes one singular direction of ``B.T @ A``.

``B.T @ A`` is the same for the ranks ``Q @ A`` and ``Q @ B`` with any orthogonal Q. Training leaves the ranks in an
arbitrary basis, in which ranks that have learned the same direction look equally important. On the principal axes the
first rank has that direction, and the importance of the last rank is what pruning it would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.layers.linear import L1RALinear
from l1ra.layers.row_moves import COLUMNS
from l1ra.layers.sharding import sum_over_columns
from l1ra.layers.tensor_lists import grouped
from l1ra.training.optimizer_state import can_rotate, rotate_states
from l1ra.training.row_rotation import RowRotation, grams, rotate_rows

__all__ = ["principal_rotations", "rotate_to_principal_axes"]

Rotations = list[tuple[list[int], Tensor]]  # adapters that rotate as many ranks, and their rotations (k, n, n)


def principal_rotations(grams: Tensor) -> Tensor:
    """The rotations of the ranks of k adapters onto their principal axes, strongest first.

    Args:
        grams: ``A @ A.T`` of each adapter, then ``B @ B.T`` of each, ``(2, k, r, r)`` float64, finite, not 0.

    Returns:
        Orthogonal Q of each adapter, ``(k, r, r)`` float64. Among all rotations it brings the rows of ``Q @ A`` and
        ``Q @ B`` nearest to the singular vectors of ``B.T @ A``, weighted by the singular values (orthogonal Procrustes
        problem: Schönemann 1966). If A's rows are orthogonal and equally long, as nearly at the start, they are met
        exactly.
    """
    # A.T = U @ root(A A.T) with orthonormal columns of U, so the r x r core has the singular values of B.T @ A.
    lengths, vectors = torch.linalg.eigh(grams)
    root_a, root_b = vectors * lengths.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
    norm_a, norm_b = _traces(grams).sqrt()[..., None, None]
    left, values, right = torch.linalg.svd(torch.bmm(root_b, root_a))
    toward = torch.bmm(right, root_a) / norm_a + torch.bmm(left.mT, root_b) / norm_b
    u, _, v = torch.linalg.svd(values.sqrt().unsqueeze(-1) * toward)
    return torch.bmm(u, v)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


@torch.no_grad()
def rotate_to_principal_axes(
    layers: Iterable[tuple[L1RALinear, Sequence[int]]],
    optimizers: Sequence[Optimizer],
    broadcast: Callable[[Rotations], Rotations] = lambda rotations: rotations,
) -> list[Tensor | None]:
    """Rotate rows of each adapter, and the optimizers' state of them, onto their principal axes.

    The function of the model does not change, up to rounding to the adapters' dtype.

    Args:
        layers: each adapter with the rows to be rotated, ascending, whose gates must be equal.
        optimizers: whose state is rotated too.
        broadcast: given the rotations, returns those that all data-parallel processes apply.

    Returns:
        For each adapter its rotation ``(n, n)``, float64 on the CPU, or None if it was not rotated: fewer than two
        rows, B = 0, values that are not finite, or optimizer state that can't be rotated.
    """
    layers = list(layers)
    rotations: list[Tensor | None] = [None] * len(layers)
    for chosen, found in broadcast(_find_rotations(layers, optimizers)):
        for i, rotation in zip(chosen, found, strict=True):
            rotations[i] = rotation
    turns = {
        param: (rows, rotation)
        for (layer, rows), rotation in zip(layers, rotations, strict=True)
        if rotation is not None
        for param in (layer.lora_A, layer.lora_B)
    }
    both = [(tensor, turn) for param, turn in turns.items() for tensor in (param, param.grad) if tensor is not None]
    rotate_rows([RowRotation(tensor, *turn) for tensor, turn in both])
    rotate_states(optimizers, turns)
    return rotations


def _find_rotations(layers: Sequence[tuple[L1RALinear, Sequence[int]]], optimizers: Sequence[Optimizer]) -> Rotations:
    able = [
        i
        for i, (layer, rows) in enumerate(layers)
        if len(rows) > 1 and all(can_rotate(o, p) for o in optimizers for p in (layer.lora_A, layer.lora_B))
    ]
    # All products are computed before the one transfer to the CPU.
    params = [(param, layers[i][1]) for i in able for param in (layers[i][0].lora_A, layers[i][0].lora_B)]
    found = sum_over_columns(grams(params), [getattr(param, COLUMNS, None) for param, _ in params])
    rotations = []
    for alike in grouped(able, lambda i: len(layers[i][1])).values():
        pairs = torch.stack([found[2 * k + part] for part in (0, 1) for k in alike]).double().unflatten(0, (2, -1))
        traces = _traces(pairs)  # not finite if any element of A or B isn't
        fit = ((traces > 0) & (traces < torch.inf)).all(0).nonzero()[:, 0]
        if len(fit):
            rotations.append(([able[alike[k]] for k in fit.tolist()], principal_rotations(pairs[:, fit])))
    return rotations
