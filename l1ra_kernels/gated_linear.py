"""Forward and backward of frozen linear layers that share the input x, with gated low-rank adapters: the launches.

    y_i = x @ W_i.T + bias_i + s_i * ((dropout(x) @ A_i.T) * g_i) @ B_i        or output_i + s_i * ...

Forward:
    shrink           x -> H, for all layers in one pass over x
    expand           H -> y, for each layer
    cuBLAS           y += x @ W.T (beta = 1), for each layer
    A layer whose weight has memory for the adapter behind its columns (see augment) needs only one product of
    ``[x | H]`` in place of expand and cuBLAS.

Backward:
    output_backward  dY -> partial sums of P and D, for each layer in one pass over dY
    reduce_hidden    P -> Q, the gradient of H, and partial sums of dg
    reduce_rows      D -> dB, and dg
    input_backward   x, Q -> dX and partial sums of dA, for all layers in one pass over x
    reduce_rows      dA
    cuBLAS           dX += dY @ W (beta = 1), for each layer

The backward needs x and H from the forward. Adapters are grouped in bundles; shrink and input_backward are launched
once per bundle. All adapters of a bundle use the same rank tile, and the sum of their rank tiles is at most the largest
rank tile. A rank above the largest rank tile is split into pieces, which are processed like separate adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l1ra_kernels import choice
from l1ra_kernels.augment import write_behind
from l1ra_kernels.configs import RANK_TILES, rank_tile
from l1ra_kernels.expand import expand
from l1ra_kernels.input_backward import input_backward
from l1ra_kernels.layer import Layer
from l1ra_kernels.output_backward import output_backward
from l1ra_kernels.reductions import reduce_hidden, reduce_rows
from l1ra_kernels.shrink import shrink

__all__ = ["Needs", "backward", "forward", "hidden_width"]

LARGEST_RANK_TILE = RANK_TILES[-1]
MAX_BUNDLE = 3  # the largest number of adapters in a bundle


class Needs(NamedTuple):
    """Which gradients of a layer's adapter are needed."""

    a: bool
    gate: bool
    b: bool


class _Piece(NamedTuple):
    layer: int
    rows: slice


def _bundles(ranks: Sequence[int]) -> list[tuple[int, list[_Piece]]]:
    """The rank tile and the pieces of each bundle, for layers with these ranks."""
    bundles: list[tuple[int, list[_Piece]]] = []
    for layer, rank in enumerate(ranks):
        for start in range(0, max(rank, 1), LARGEST_RANK_TILE):
            piece = _Piece(layer, slice(start, min(start + LARGEST_RANK_TILE, rank)))
            width = rank_tile(piece.rows.stop - start)
            if bundles:
                widest = max(width, bundles[-1][0])
                if len(bundles[-1][1]) < MAX_BUNDLE and (len(bundles[-1][1]) + 1) * widest <= LARGEST_RANK_TILE:
                    bundles[-1] = (widest, [*bundles[-1][1], piece])
                    continue
            bundles.append((width, [piece]))
    return bundles


def hidden_width(rank: int) -> int:
    """The number of columns of H for one layer.

    The rank may be symbolic under ``torch.compile``. It is used in comparisons only, so that the compiled graph is
    valid for all ranks with the same rank tile.
    """
    width = 0
    while rank > LARGEST_RANK_TILE:
        width, rank = width + LARGEST_RANK_TILE, rank - LARGEST_RANK_TILE
    return width + rank_tile(rank)


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and choice.tf32_allowed() else "ieee"


def forward(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The forward of all layers.

    Args:
        x: ``(M, K)``, last stride 1.
        layers: the layers that share x.
        dtype: of the matrix products and the results.
        dropout: probability that an element of x is dropped in the adapters.
        seed: of the dropout mask, int64 ``(1,)`` on the device of x; None without dropout.

    Returns:
        The output ``(M, N)`` of each layer, and H, which contains the columns of all bundles. For a single layer H is
        ``(M, hidden_width(r))``.
    """
    precision = _precision(dtype)
    layers = [_readable(layer) for layer in layers]
    bundles = _bundles([layer.a.shape[0] for layer in layers])
    hidden = x.new_empty(x.shape[0], sum(width * len(pieces) for width, pieces in bundles), dtype=dtype)
    outputs: list[Tensor | None] = [None] * len(layers)
    wide = x.shape[1] + hidden.shape[1]
    augmented = [len(bundles) == 1 and t.augmented is not None and t.augmented.shape[1] >= wide for t in layers]
    x_and_h = x.new_empty(x.shape[0], wide) if any(augmented) else None
    column = 0
    for width, pieces in bundles:
        rows = [layers[i].a[cut] for i, cut in pieces]
        gates = [layers[i].gate[cut] for i, cut in pieces]
        h = hidden[:, column : column + width * len(pieces)]
        column += h.shape[1]
        shrink(x, rows, gates, h, dropout=dropout, seed=seed, augmented=x_and_h, precision=precision)
        for n, ((i, cut), gate) in enumerate(zip(pieces, gates, strict=True)):
            layer = layers[i]
            if augmented[i]:
                whole = layer.augmented[:, :wide]
                write_behind(whole[:, x.shape[1] :], n * width, gate, layer.b, layer.scaling)
                outputs[i] = F.linear(x_and_h, whole, layer.bias)
                continue
            first = outputs[i] is None
            outputs[i] = expand(
                h[:, n * width : (n + 1) * width],
                gate,
                layer.b[cut],
                layer.scaling,
                output=layer.output if first else outputs[i],
                bias=layer.bias if first else None,
                precision=precision,
            )
    for layer, y, done in zip(layers, outputs, augmented, strict=True):
        if layer.weight is not None and not done:
            y.addmm_(x, layer.weight.t())
    return outputs, hidden


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    hidden: Tensor,
    layers: Sequence[Layer],
    needs_dx: bool,
    needs: Sequence[Needs],
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """The backward of all layers.

    Args:
        dys: the gradient ``(M, N)`` of each output; None for an output that was not used.
        x, layers, dropout, seed: as in :func:`forward`.
        hidden: H, as returned by :func:`forward`.
        needs_dx: whether dX is needed.
        needs: which gradients of each adapter are needed.

    Returns:
        dX ``(M, K)`` in the dtype of x, and ``(dA, dg, dB)`` of each layer; None for gradients that are not needed.
    """
    precision = _precision(hidden.dtype)
    layers = [_readable(layer) for layer in layers]
    grads: list[list[tuple]] = [[] for _ in layers]
    dx = None
    column = 0
    dys = [None if dy is None else _contiguous_rows(dy.to(hidden.dtype)) for dy in dys]
    for width, pieces in _bundles([layer.a.shape[0] for layer in layers]):
        h = hidden[:, column : column + width * len(pieces)]
        column += h.shape[1]
        rows = [layers[i].a[cut] for i, cut in pieces]
        gates = [layers[i].gate[cut] for i, cut in pieces]
        q = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        found = []
        for n, ((i, cut), gate) in enumerate(zip(pieces, gates, strict=True)):
            mine = slice(n * width, (n + 1) * width)
            if dys[i] is None:
                q[:, mine] = 0
                found.append((None, None))
            else:
                layer = layers[i]._replace(gate=gate, b=layers[i].b[cut])
                found.append(_output_gradients(dys[i], h[:, mine], layer, needs[i], q[:, mine], precision))
        needs_da = any(needs[i].a for i, _ in pieces)
        part, das = None, None
        if needs_dx or needs_da:
            part, das = input_backward(
                x,
                q,
                rows,
                gates,
                dropout=dropout,
                seed=seed,
                needs_dx=needs_dx,
                needs_da=needs_da,
                precision=precision,
            )
        for n, ((i, _), gate, (dg, db)) in enumerate(zip(pieces, gates, found, strict=True)):
            da = None
            if needs[i].a and dys[i] is not None:
                da, _ = reduce_rows(das[:, n * width : (n + 1) * width], gate, layers[i].a.dtype)
            grads[i].append((da, dg, db))
        if part is not None:
            dx = part if dx is None else dx.add_(part)
    if needs_dx:
        for dy, layer in zip(dys, layers, strict=True):
            if dy is not None and layer.weight is not None:
                dx.addmm_(dy, layer.weight)
    return dx, [_join(pieces) for pieces in grads]


def _output_gradients(
    dy: Tensor, h: Tensor, layer: Layer, needs: Needs, q: Tensor, precision: str
) -> tuple[Tensor | None, Tensor | None]:
    """The pass over dY of one adapter, with its reductions. Write Q into ``q``.

    Returns:
        dg and dB; None if not needed.
    """
    gate = layer.gate
    p, d = output_backward(dy, h, gate, layer.b, needs_d=needs.b, precision=precision)
    dg_parts = reduce_hidden(p, h, gate, layer.scaling, q, needs_dg=needs.gate)
    if needs.b:
        db, dg = reduce_rows(d, gate, layer.b.dtype, scaling=layer.scaling, dg_parts=dg_parts)
        return dg, db
    if needs.gate:
        return torch.where(gate != 0, dg_parts.sum(0)[: gate.shape[0]], 0.0).to(gate.dtype), None
    return None, None


def _join(pieces: list[tuple]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if len(pieces) == 1:
        return pieces[0]
    return tuple(None if grads[0] is None else torch.cat(grads) for grads in zip(*pieces, strict=True))


def _readable(layer: Layer) -> Layer:
    """The layer with last stride 1 in A, gate, B and bias, which the kernels require."""
    a, gate, b, bias = layer.a, layer.gate, layer.b, layer.bias
    if a.stride(1) == gate.stride(0) == b.stride(1) == 1 and (bias is None or bias.stride(0) == 1):
        return layer
    bias = None if bias is None else bias.contiguous()
    return layer._replace(a=_contiguous_rows(a), gate=gate.contiguous(), b=_contiguous_rows(b), bias=bias)


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
