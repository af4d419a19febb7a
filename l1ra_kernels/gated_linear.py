"""Forward and backward of frozen linear layers that share the input x, with gated low-rank adapters: the launches.

    y_i = x @ W_i.T + bias_i + s_i * ((dropout(x) @ A_i.T) * g_i) @ B_i        or output_i + s_i * ...

Forward:
    shrink           x -> parts of H, for all layers in one pass over x
    expand           H -> y, for all layers
    cuBLAS           y += x @ W.T (beta = 1), for each layer
    Layers whose weight has memory for the adapter behind its columns (see augment) need only write_behind and one
    product of ``[x | H]`` each in place of expand and cuBLAS.

Backward:
    output_backward  dY -> partial sums of P and D, for all layers in one pass over each dY
    reduce_hidden    P -> Q, the gradient of H, and partial sums of dg
    input_backward   x, Q -> dX and partial sums of dA, for all layers in one pass over x
    reduce_rows      dA, dB and dg
    cuBLAS           dX += dY @ W (beta = 1), for each layer

The backward needs x and H from the forward. Each of these launches serves one bundle of adapters, see bundle.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l1ra_kernels.bundle import LARGEST_RANK_TILE, MAX_BUNDLE, three
from l1ra_kernels.configs import rank_tile
from l1ra_kernels.expand import BIAS, OUTPUT
from l1ra_kernels.layer import Layer
from l1ra_kernels.plans import Needs, backward_plan, backward_signature, forward_plan, forward_signature

__all__ = ["MAX_BUNDLE", "Needs", "as_rows", "backward", "forward", "hidden_width"]


def hidden_width(rank: int) -> int:
    """The number of columns of H for one layer.

    The rank may be symbolic under ``torch.compile``. It is used in comparisons only, so that the compiled graph is
    valid for all ranks with the same rank tile.
    """
    width = 0
    while rank > LARGEST_RANK_TILE:
        width, rank = width + LARGEST_RANK_TILE, rank - LARGEST_RANK_TILE
    return width + rank_tile(rank)


def forward(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The forward of all layers.

    Args:
        x: ``(..., K)``, any strides. M is the product of the leading dimensions.
        layers: the layers that share x.
        dtype: of the matrix products and the results.
        dropout: probability that an element of x is dropped in the adapters.
        seed: of the dropout mask, int64 ``(1,)`` on the device of x; None without dropout.

    Returns:
        The output ``(..., N)`` of each layer, contiguous, and H, which contains the columns of all bundles. For a
        single layer H is ``(M, hidden_width(r))``.
    """
    lead, x = x.shape[:-1], as_rows(x)
    tokens, features = x.shape
    layers = [_readable(layer, dtype) for layer in layers]
    steps = forward_plan(forward_signature(x, layers, dtype, dropout))
    columns = steps[-1].part.before + steps[-1].part.columns
    hidden = x.new_empty(tokens, columns, dtype=dtype)
    ys = [x.new_empty(*lead, layer.b.shape[1], dtype=dtype) for layer in layers]
    seed = hidden if seed is None else seed
    for step in steps:
        _, pieces, width, _ = step.part
        rows, gates, bs = step.part.operands(layers)
        h = step.part.own(hidden)
        parts = x.new_empty(step.parts, tokens, width, dtype=torch.float32)
        x_and_h = h if step.write_behind is None else x.new_empty(tokens, features + width)
        step.shrink(x, *rows, *gates, parts, x_and_h, seed)
        if step.write_behind is not None:
            pairs = zip(pieces, step.augments, strict=True)
            wholes = [layers[i].augmented if behind else x_and_h for (i, _), behind in pairs]
            step.write_behind(parts, *gates, *bs, *three(wholes), h, x_and_h)
        if step.expand is not None:
            pairs = zip(pieces, step.bases, strict=True)
            base = [_base_of(layers[i], kind, ys[i]) for (i, _), kind in pairs]
            step.expand(parts, *gates, *bs, *three(base), *three([ys[i] for i, _ in pieces]), h)
    for i, layer in enumerate(layers):
        if layer.weight is None:
            continue
        y = ys[i] if len(lead) == 1 else ys[i].view(tokens, layer.b.shape[1])
        if steps[0].write_behind is not None and steps[0].augments[i]:
            whole = layer.augmented[:, : x_and_h.shape[1]].t()
            if layer.bias is None:
                torch.mm(x_and_h, whole, out=y)
            else:
                torch.addmm(layer.bias, x_and_h, whole, out=y)
        else:
            y.addmm_(x, layer.weight.t())
    return ys, hidden


def _base_of(layer: Layer, kind: int, y: Tensor) -> Tensor:
    """What is added to the output of a piece of ``layer``; where there is nothing, a tensor that is not read."""
    if kind == BIAS:
        return layer.bias
    return layer.output if kind == OUTPUT else y


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
        dys: the gradient ``(..., N)`` of each output; None for an output that was not used.
        x, layers, dropout, seed: as in :func:`forward`.
        hidden: H, as returned by :func:`forward`.
        needs_dx: whether dX is needed.
        needs: which gradients of each adapter are needed.

    Returns:
        dX ``(..., K)`` in the dtype of x, contiguous, and ``(dA, dg, dB)`` of each layer; None for
        gradients that are not needed.
    """
    shape, x = x.shape, as_rows(x)
    tokens, features = x.shape
    dtype, single = hidden.dtype, torch.float32
    layers = [_readable(layer, dtype) for layer in layers]
    dys = [None if dy is None else as_rows(dy if dy.dtype == dtype else dy.to(dtype)) for dy in dys]
    hidden = hidden.contiguous()
    steps = backward_plan(backward_signature(x, hidden, dys, layers, dropout, needs_dx, needs))
    grads: list[list[tuple]] = [[] for _ in layers]
    dx = None
    seed = hidden if seed is None else seed
    for step in steps:
        _, pieces, width, _ = step.part
        rows, gates, bs = step.part.operands(layers)
        h = step.part.own(hidden)
        mine = three([h if dys[i] is None else dys[i] for i, _ in pieces])
        p = x.new_empty(step.tiles, tokens, step.rank_tile, dtype=single)
        d = x.new_empty(step.splits, step.rank_tile, step.outputs, dtype=single)
        step.output_backward(*mine, h, *gates, *bs, p, d)
        q = x.new_empty(tokens, width, dtype=dtype)
        dg = x.new_empty(step.blocks, width, dtype=single)
        step.reduce_hidden(p, h, *gates, q, dg)
        da = dg
        if step.input_backward is not None:
            del p  # its memory may serve dA
            da = x.new_empty(step.a_parts, width, features, dtype=single)
            part = x.new_empty(*shape) if needs_dx else q
            step.input_backward(x, q, *rows, *gates, part, da, seed)
            if needs_dx:
                dx = part if dx is None else dx.add_(part)
        if step.reduce_rows is None:
            for i, _ in pieces:
                grads[i].append((None, None, None))
            continue
        # In place of a gradient that is not needed stands a tensor of its dtype, which is not written.
        outs = []
        for k, ((i, _), need) in enumerate(zip(pieces, step.needs, strict=True)):
            a = torch.empty_like(rows[k]) if need.a else rows[k]
            gate = torch.empty_like(gates[k]) if need.gate else gates[k]
            b = torch.empty_like(bs[k]) if need.b else bs[k]
            outs.append((a, gate, b))
            grads[i].append((a if need.a else None, gate if need.gate else None, b if need.b else None))
        out_a, out_gate, out_b = zip(*three(outs), strict=True)
        step.reduce_rows(da, d, dg, *gates, *out_a, *out_b, *out_gate)
    if needs_dx:
        flat = dx if len(shape) == 2 else dx.view(tokens, features)
        for dy, layer in zip(dys, layers, strict=True):
            if dy is not None and layer.weight is not None:
                flat.addmm_(dy, layer.weight)
    return dx, [each[0] if len(each) == 1 else _join(each) for each in grads]


def _join(pieces: list[tuple]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return tuple(None if grads[0] is None else torch.cat(grads) for grads in zip(*pieces, strict=True))


def _readable(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with contiguous A, gate, B and bias, and an output ``(M, N)`` in ``dtype``, as kernels take them."""
    a, gate, b, _, _, bias, output, _ = layer
    contiguous = a.is_contiguous() and gate.is_contiguous() and b.is_contiguous()
    if contiguous and output is None and (bias is None or bias.is_contiguous()):
        return layer
    return layer._replace(
        a=a.contiguous(),
        gate=gate.contiguous(),
        b=b.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        output=None if output is None else as_rows(output.to(dtype)),
    )


def as_rows(t: Tensor) -> Tensor:
    """``t`` ``(..., F)`` as ``(M, F)`` with last stride 1; a view if possible."""
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1]) if t.numel() else t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
