"""Principal axes: the ranks of an adapter, turned so that each is one singular direction of what the adapter adds.

``B.T @ A`` does not say which ranks it is made of: any orthogonal Q turns it into the ranks ``Q @ A`` and ``Q @ B`` of
the same sum. Training leaves them in an arbitrary basis, in which ranks that have all learned the same thing look
equally important. On the principal axes the first one holds that thing, and what the last one is worth is what a rank
less would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.layers.linear import L1RALinear
from l1ra.layers.precision import widest
from l1ra.training.optimizer_state import turn_state, turns

__all__ = ["principal_rotation", "turn_adapters"]


def principal_rotation(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """The turn of ranks onto their principal axes, strongest first.

    Args:
        gram_a, gram_b: ``A @ A.T`` and ``B @ B.T``, each ``(r, r)``, float64, finite.

    Returns:
        Orthogonal ``(r, r)`` Q, float64: of all turns that for which the rows of ``Q @ A`` and ``Q @ B`` lie nearest to
        the singular vectors of ``B.T @ A``, weighted by the singular values (orthogonal Procrustes problem: Schönemann
        1966). Where A's rows are orthogonal and equally long, as nearly at the start, it is met exactly.
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
def turn_adapters(
    layers: Iterable[tuple[L1RALinear, Sequence[int]]],
    optimizers: Sequence[Optimizer],
    agreed: Callable[[list[Tensor | None]], list[Tensor | None]] = lambda rotations: rotations,
) -> list[Tensor | None]:
    """Turn rows of each adapter, and what optimizers remember of them, onto their principal axes.

    The function of the model stays, but for rounding to the adapters' dtype.

    Args:
        layers: each adapter with the rows that shall turn among themselves; their gates must be equal.
        agreed: given the rotations, returns those that all replicas take.

    Returns:
        For each adapter its rotation ``(n, n)``, float64 on the CPU, or None where it stays as it is: fewer than two
        rows, nothing learned yet, not finite, or an optimizer with state that can't be turned.
    """
    layers = list(layers)
    grams = [None if len(rows) < 2 else torch.stack([_gram(p, rows) for p in _params(layer)]) for layer, rows in layers]
    rotations: list[Tensor | None] = []
    for (layer, _), gram in zip(layers, grams, strict=True):
        rotation = None
        if gram is not None and all(turns(optimizer, p) for optimizer in optimizers for p in _params(layer)):
            gram_a, gram_b = gram = gram.cpu().double()
            if torch.isfinite(gram).all() and gram_a.trace() > 0 and gram_b.trace() > 0:
                rotation = principal_rotation(gram_a, gram_b)
        rotations.append(rotation)
    rotations = agreed(rotations)
    for (layer, rows), rotation in zip(layers, rotations, strict=True):
        if rotation is None:
            continue
        there = rotation.to(layer.lora_A.device, widest(layer.lora_A.device))
        index = torch.tensor(rows, device=there.device)
        for param in _params(layer):
            for tensor in (param, param.grad):
                if tensor is not None:
                    tensor.index_copy_(0, index, (there @ tensor.detach()[index].to(there)).to(tensor.dtype))
            for optimizer in optimizers:
                turn_state(optimizer, param, index, there)
    return rotations


def _params(layer: L1RALinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A, layer.lora_B


def _gram(param: Tensor, rows: Sequence[int]) -> Tensor:
    some = param.detach()[list(rows)].to(widest(param.device))
    return some @ some.T
