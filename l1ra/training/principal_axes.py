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
from l1ra.layers.precision import widest_float
from l1ra.training.optimizer_state import can_rotate, rotate_state

__all__ = ["principal_rotation", "rotate_to_principal_axes"]


def principal_rotation(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """The rotation of ranks onto their principal axes, strongest first.

    Args:
        gram_a, gram_b: ``A @ A.T`` and ``B @ B.T``, each ``(r, r)``, float64, finite.

    Returns:
        Orthogonal ``(r, r)`` Q, float64. Among all rotations it brings the rows of ``Q @ A`` and ``Q @ B`` nearest to
        the singular vectors of ``B.T @ A``, weighted by the singular values (orthogonal Procrustes problem: Schönemann
        1966). If A's rows are orthogonal and equally long, as nearly at the start, they are met exactly.
    """
    # A.T = U @ root(A A.T) with orthonormal columns of U, so the r x r core has the singular values of B.T @ A.
    root_a, root_b = _root(gram_a), _root(gram_b)
    left, values, right = torch.linalg.svd(root_b @ root_a)
    toward = right @ root_a / gram_a.trace().sqrt() + left.T @ root_b / gram_b.trace().sqrt()
    u, _, v = torch.linalg.svd(values.sqrt().unsqueeze(1) * toward)
    return u @ v


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@torch.no_grad()
def rotate_to_principal_axes(
    layers: Iterable[tuple[L1RALinear, Sequence[int]]],
    optimizers: Sequence[Optimizer],
    broadcast: Callable[[list[Tensor | None]], list[Tensor | None]] = lambda rotations: rotations,
) -> list[Tensor | None]:
    """Rotate rows of each adapter, and the optimizers' state of them, onto their principal axes.

    The function of the model does not change, up to rounding to the adapters' dtype.

    Args:
        layers: each adapter with the rows to be rotated, whose gates must be equal.
        optimizers: whose state is rotated too.
        broadcast: given the rotations, returns those that all data-parallel processes apply.

    Returns:
        For each adapter its rotation ``(n, n)``, float64 on the CPU, or None if it was not rotated: fewer than two
        rows, B = 0, values that are not finite, or optimizer state that can't be rotated.
    """
    layers = list(layers)
    grams = [None if len(rows) < 2 else torch.stack([_gram(p, rows) for p in _params(layer)]) for layer, rows in layers]
    rotations: list[Tensor | None] = []
    for (layer, _), gram in zip(layers, grams, strict=True):
        rotation = None
        if gram is not None and all(can_rotate(optimizer, p) for optimizer in optimizers for p in _params(layer)):
            gram_a, gram_b = gram = gram.cpu().double()
            if torch.isfinite(gram).all() and gram_a.trace() > 0 and gram_b.trace() > 0:
                rotation = principal_rotation(gram_a, gram_b)
        rotations.append(rotation)
    rotations = broadcast(rotations)
    for (layer, rows), rotation in zip(layers, rotations, strict=True):
        if rotation is None:
            continue
        there = rotation.to(layer.lora_A.device, widest_float(layer.lora_A.device))
        index = torch.tensor(rows, device=there.device)
        for param in _params(layer):
            for tensor in (param, param.grad):
                if tensor is not None:
                    tensor.index_copy_(0, index, (there @ tensor.detach()[index].to(there)).to(tensor.dtype))
            for optimizer in optimizers:
                rotate_state(optimizer, param, index, there)
    return rotations


def _params(layer: L1RALinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A, layer.lora_B


def _gram(param: Tensor, rows: Sequence[int]) -> Tensor:
    some = param.detach()[list(rows)].to(widest_float(param.device))
    return some @ some.T
