"""Each kernel by itself, called with tensors: for tests, and for benchmarks of single kernels.

The layers call the kernels through ``l1ra_kernels.gated_linear``, which prepares all launches of a pass together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l1ra_kernels.augment import write_behind as _write_behind
from l1ra_kernels.bundle import Bundle, three
from l1ra_kernels.configs import rank_tile
from l1ra_kernels.expand import NOTHING
from l1ra_kernels.expand import expand as _expand
from l1ra_kernels.input_backward import input_backward as _input_backward
from l1ra_kernels.output_backward import OutputParts
from l1ra_kernels.output_backward import output_backward as _output_backward
from l1ra_kernels.reductions import hidden_blocks
from l1ra_kernels.reductions import reduce_hidden as _reduce_hidden
from l1ra_kernels.reductions import reduce_rows as _reduce_rows
from l1ra_kernels.shrink import shrink as _shrink

__all__ = ["expand", "input_backward", "output_backward", "reduce_hidden", "reduce_rows", "shrink", "write_behind"]

Tensors = Sequence[Tensor]


def _bundle(
    tokens: int,
    dtype: torch.dtype,
    gates: Tensors,
    *,
    features: int = 1,
    x_stride: int = 1,
    outputs: Sequence[int] = (),
    scalings: Sequence[float] = (),
    dropout: float = 0.0,
    precision: str = "ieee",
    tensors: Tensors = (),
    input: torch.dtype | None = None,
) -> Bundle:
    count = len(gates)
    width = max(rank_tile(len(gate)) for gate in gates)
    kind = (gates[0].device, dtype, *((t.dtype, t.data_ptr() % 16) for t in (*gates, *tensors)))
    ranks = tuple(len(gate) for gate in gates)
    outputs, scalings = tuple(outputs) or (1,) * count, tuple(scalings) or (1.0,) * count
    device = gates[0].device
    return Bundle(
        *(device, kind, dtype, dtype if input is None else input, precision, tokens, features, x_stride, width),
        *(ranks, outputs, scalings, float(dropout)),
    )


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def shrink(
    x: Tensor,
    rows: Tensors,
    gates: Tensors,
    *,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    augment: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Parts of H ``(parts, M, G * R)``; with ``augment`` also ``[x | H]``, in which H is not written yet."""
    (tokens, features), dtype = x.shape, dtype or x.dtype
    sizes = {"features": features, "x_stride": x.stride(0), "dropout": dropout, "precision": precision}
    sizes["input"] = x.dtype
    bundle = _bundle(tokens, dtype, gates, **sizes, tensors=(x, *rows))
    launch, count = _shrink(bundle, augment)
    parts = _empty(x, count, tokens, bundle.columns)
    wide = _empty(x, tokens, features + bundle.columns, dtype=dtype) if augment else None
    out = _empty(x, 0, dtype=dtype) if wide is None else wide
    launch(x, *three(rows), *three(gates), parts, out, out if seed is None else seed)
    return parts, wide


def expand(
    parts: Tensor,
    gates: Tensors,
    bs: Tensors,
    scalings: Sequence[float],
    *,
    dtype: torch.dtype,
    bases: Tensors | None = None,
    kinds: Sequence[int] | None = None,
    precision: str = "ieee",
) -> tuple[list[Tensor], Tensor]:
    """Y of each adapter, and H ``(M, G * R)``. ``kinds``: what each of ``bases`` is, as in ``l1ra_kernels.expand``."""
    count, tokens, columns = parts.shape
    outputs = [b.shape[1] for b in bs]
    ys = [_empty(parts, tokens, n, dtype=dtype) for n in outputs]
    bases, kinds = ys if bases is None else bases, [NOTHING] * len(ys) if kinds is None else kinds
    bundle = _bundle(
        tokens, dtype, gates, outputs=outputs, scalings=scalings, precision=precision, tensors=(*bs, *bases)
    )
    launch = _expand(bundle, count, kinds, [base.stride(0) for base in bases], [True] * len(ys))
    h = _empty(parts, tokens, columns, dtype=dtype)
    launch(parts, *three(gates), *three(bs), *three(bases), *three(ys), h)
    return ys, h


def write_behind(
    parts: Tensor, gates: Tensors, bs: Tensors, scalings: Sequence[float], wholes: Tensors, wide: Tensor
) -> Tensor:
    """Write C.T behind the K columns of the weights ``wholes``, and H behind x in ``wide``; return H."""
    count, tokens, columns = parts.shape
    outputs = [b.shape[1] for b in bs]
    features = wide.shape[1] - columns
    sizes = {"features": features, "outputs": outputs, "scalings": scalings}
    bundle = _bundle(tokens, wide.dtype, gates, **sizes, tensors=(*bs, *wholes, wide))
    h = _empty(parts, tokens, columns, dtype=wide.dtype)
    launch = _write_behind(bundle, count, [whole.stride(0) for whole in wholes], [True] * len(bs))
    launch(parts, *three(gates), *three(bs), *three(wholes), h, wide)
    return h


def output_backward(
    dys: Tensors, h: Tensor, gates: Tensors, bs: Tensors, *, needs_d: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None, OutputParts]:
    """Partial sums of P ``(tiles, M, R)`` and D ``(splits, R, sum of N)``, and their numbers."""
    tokens, outputs = len(h), [b.shape[1] for b in bs]
    bundle = _bundle(tokens, h.dtype, gates, outputs=outputs, precision=precision, tensors=(*dys, h, *bs))
    launch, parts = _output_backward(bundle, [dy.stride(0) for dy in dys], [True] * len(dys), needs_d)
    p = _empty(h, sum(parts.tiles), tokens, bundle.width)
    d = _empty(h, parts.splits, bundle.width, sum(outputs)) if needs_d else None
    launch(*three(dys), h, *three(gates), *three(bs), p, p if d is None else d)
    return p, d, parts


def reduce_hidden(
    p: Tensor, tiles: Sequence[int], h: Tensor, gates: Tensors, scalings: Sequence[float], *, needs_dg: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Q ``(M, G * R)``, and partial sums of dg ``(blocks, G * R)``."""
    bundle = _bundle(len(h), h.dtype, gates, scalings=scalings, tensors=(p, h))
    q = torch.empty_like(h)
    dg = _empty(h, hidden_blocks(bundle), bundle.columns) if needs_dg else None
    _reduce_hidden(bundle, tiles, needs_dg)(p, h, *three(gates), q, p if dg is None else dg)
    return q, dg


def input_backward(
    x: Tensor,
    q: Tensor,
    rows: Tensors,
    gates: Tensors,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    needs_dx: bool = True,
    needs_da: bool = True,
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """dX ``(M, K)``, and partial sums of dA ``(splits, G * R, K)``."""
    tokens, features = x.shape
    sizes = {"features": features, "x_stride": x.stride(0), "dropout": dropout, "precision": precision}
    sizes["input"] = x.dtype
    bundle = _bundle(tokens, q.dtype, gates, **sizes, tensors=(x, q, *rows))
    launch, splits = _input_backward(bundle, needs_dx, needs_da)
    dx = _empty(x, tokens, features, dtype=x.dtype) if needs_dx else None
    da = _empty(x, splits, bundle.columns, features) if needs_da else None
    outs = (x if dx is None else dx, q if da is None else da, q if seed is None else seed)
    launch(x, q, *three(rows), *three(gates), *outs)
    return dx, da


def reduce_rows(
    da_parts: Tensor,
    d_parts: Tensor,
    dg_parts: Tensor,
    gates: Tensors,
    outputs: Sequence[int],
    scalings: Sequence[float],
    *,
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dA, dB and dg of each adapter. ``tokens``: as many as ``reduce_hidden`` was called with."""
    features, count = da_parts.shape[2], len(gates)
    bundle = _bundle(tokens, dtype, gates, features=features, outputs=outputs, scalings=scalings)
    every = [True] * count
    parts = OutputParts((1,) * count, len(d_parts))
    das = [_empty(gate, len(gate), features, dtype=dtype) for gate in gates]
    dbs = [_empty(gate, len(gate), n, dtype=dtype) for gate, n in zip(gates, outputs, strict=True)]
    dgs = [torch.empty_like(gate) for gate in gates]
    launch = _reduce_rows(bundle, len(da_parts), parts, every, every, every)
    launch(da_parts, d_parts, dg_parts, *three(gates), *three(das), *three(dbs), *three(dgs))
    return das, dbs, dgs
