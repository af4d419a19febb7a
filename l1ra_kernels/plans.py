"""What a forward or a backward of adapted layers decides: bundles, tiles, grids and strides of its launches.

All of this follows from the shapes, strides, dtypes and alignment of the tensors of a call: its :class:`Signature`. The
decisions are made once for a signature and kept, because they would take the host longer than the launches themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from l1ra_kernels import choice, configs
from l1ra_kernels.augment import write_behind
from l1ra_kernels.bundle import Bundle, Piece, bundles_of, three
from l1ra_kernels.expand import BIAS, LEFT, NOTHING, OUTPUT, expand
from l1ra_kernels.input_backward import input_backward
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.layer import Layer
from l1ra_kernels.output_backward import output_backward
from l1ra_kernels.reductions import hidden_blocks, reduce_hidden, reduce_rows
from l1ra_kernels.shrink import shrink

__all__ = [
    "BackwardStep",
    "ForwardStep",
    "Needs",
    "Part",
    "Signature",
    "backward_plan",
    "backward_signature",
    "forward_plan",
    "forward_signature",
]

PLANS = 4096  # kept for as many signatures; batches of changing lengths have many


class Needs(NamedTuple):
    """Which gradients of a layer's adapter are needed."""

    a: bool
    gate: bool
    b: bool


class Signature(NamedTuple):
    """What all decisions of a call depend on. Alignment: the address modulo 16.

    A call makes a plain tuple of it, which is cheaper, and is hashed and compared in the same way.

    Attributes:
        device, architecture, processors: where the call runs.
        dtype, precision, dropout: of the products, and of the adapters' input.
        x: shape, row stride, dtype and alignment of x.
        adapters: for each layer the rank, outputs, scaling, dtypes, and alignments or 0, see :func:`_adapter`.
        bases: in the forward, for each layer the kind of its base, its row stride and alignment.
        augmented: in the forward, for each layer columns, row stride and alignment of its augmented weight, None
            without one.
        dys: in the backward, for each layer columns, row stride and alignment of dY, None without one.
        hidden: in the backward, the alignment of H.
        needs_dx, needs: in the backward, which gradients are needed.
    """

    device: torch.device
    architecture: str
    processors: int
    dtype: torch.dtype
    precision: str
    dropout: float
    x: tuple
    adapters: tuple
    bases: tuple = ()
    augmented: tuple = ()
    dys: tuple = ()
    hidden: int = 0
    needs_dx: bool = False
    needs: tuple[Needs, ...] = ()


def forward_signature(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, dropout: float) -> tuple:
    """The :class:`Signature` of a forward, for x ``(M, K)`` and layers that the kernels can read."""
    adapters, bases, augmented = [], [], []
    for layer in layers:
        *_, bias, output, room = layer
        adapters.append(_adapter(layer))
        if output is not None:
            bases.append((OUTPUT, output.stride(0), output.data_ptr() % 16))
        else:
            bases.append((NOTHING, 0, 0) if bias is None else (BIAS, 0, bias.data_ptr() % 16))
        augmented.append(None if room is None else _matrix(room))
    return *_call(x, dtype, dropout), tuple(adapters), tuple(bases), tuple(augmented)


def backward_signature(
    x: Tensor,
    hidden: Tensor,
    dys: Sequence[Tensor | None],
    layers: Sequence[Layer],
    dropout: float,
    needs_dx: bool,
    needs: Sequence[Needs],
) -> tuple:
    """The :class:`Signature` of a backward; dYs ``(M, N)``."""
    adapters, kinds = [], []
    for layer, dy in zip(layers, dys, strict=True):
        adapters.append(_adapter(layer))
        kinds.append(None if dy is None else _matrix(dy))
    alignment = hidden.data_ptr() % 16
    call = _call(x, hidden.dtype, dropout)
    return *call, tuple(adapters), (), (), tuple(kinds), alignment, needs_dx, tuple(needs)


def _call(x: Tensor, dtype: torch.dtype, dropout: float) -> tuple:
    """What comes first in a signature. ``x``: ``(M, K)``."""
    device = x.device
    precision = "tf32" if dtype == torch.float32 and choice.tf32_allowed() else "ieee"
    kind = (x.shape, x.stride(0), x.dtype, x.data_ptr() % 16)
    return device, configs.architecture(device), configs.processors(device), dtype, precision, dropout, kind


def _adapter(layer: Layer) -> tuple:
    a, gate, b, scaling, *_ = layer
    at_a, at_gate, at_b = a.data_ptr(), gate.data_ptr(), b.data_ptr()
    alignments = (at_a % 16, at_gate % 16, at_b % 16) if (at_a | at_gate | at_b) % 16 else 0
    return a.shape[0], b.shape[1], scaling, (a.dtype, gate.dtype, b.dtype), alignments


def _matrix(t: Tensor) -> tuple[int, int, int]:
    """Columns, row stride and alignment."""
    return t.shape[1], t.stride(0), t.data_ptr() % 16


class Part(NamedTuple):
    """A bundle of a call.

    Attributes:
        pieces: of its adapters.
        columns, before: the number of its columns in H, and of those before its own.
    """

    bundle: Bundle
    pieces: tuple[Piece, ...]
    columns: int
    before: int

    def operands(self, layers: Sequence[Layer]) -> tuple[tuple[Tensor, ...], ...]:
        """A, the gate and B of the adapters, each of them as three."""
        if len(self.pieces) == 1 and self.pieces[0].rows is None:
            a, gate, b = layers[self.pieces[0].layer][:3]
            return (a, a, a), (gate, gate, gate), (b, b, b)
        cut = [layers[i][:3] if rows is None else [t[slice(*rows)] for t in layers[i][:3]] for i, rows in self.pieces]
        return tuple(three(tensors) for tensors in zip(*cut, strict=True))

    def own(self, hidden: Tensor) -> Tensor:
        """The columns ``(M, G * R)`` of this bundle in H."""
        tokens, width = hidden.shape[0], self.columns
        if hidden.shape[1] == width:
            return hidden
        return hidden.view(-1)[tokens * self.before : tokens * (self.before + width)].view(tokens, width)


def _parts(s: Signature) -> list[Part]:
    (tokens, features), x_stride, *x_kind = s.x
    ranks, outputs, scalings, dtypes, alignments = zip(*s.adapters, strict=True)
    kind = (s.device, s.dtype, *x_kind, dtypes, alignments, s.bases, s.augmented, s.dys, s.hidden)
    parts, before = [], 0
    for width, pieces in bundles_of(ranks, dtypes):
        bundle = Bundle(
            s.device,
            (kind, tuple(pieces)),
            s.dtype,
            x_kind[0],
            s.precision,
            tokens,
            features,
            x_stride,
            width,
            tuple([ranks[layer] if rows is None else rows[1] - rows[0] for layer, rows in pieces]),
            tuple([outputs[layer] for layer, _ in pieces]),
            tuple([scalings[layer] for layer, _ in pieces]),
            s.dropout,
        )
        parts.append(Part(bundle, tuple(pieces), bundle.columns, before))
        before += bundle.columns
    return parts


class ForwardStep(NamedTuple):
    """The launches of one bundle.

    Attributes:
        parts: of H.
        bases: what each adapter's output is added to.
        augments: for each adapter whether it is behind the columns of its weight.
    """

    part: Part
    parts: int
    shrink: PreparedLaunch
    expand: PreparedLaunch | None
    write_behind: PreparedLaunch | None
    bases: list[int]
    augments: list[bool]


@lru_cache(PLANS)
def forward_plan(signature: tuple) -> list[ForwardStep]:
    """The launches of a forward, one step for each bundle."""
    s = Signature(*signature)
    parts, steps, begun = _parts(s), [], set()
    wide = s.x[0][1] + sum(part.columns for part in parts)
    for part in parts:
        bundle, layers = part.bundle, [layer for layer, _ in part.pieces]
        behind = [s.augmented[i] for i in layers]
        augments = [len(parts) == 1 and room is not None and room[0] >= wide for room in behind]
        bases = [(LEFT, s.adapters[i][1]) if i in begun else s.bases[i][:2] for i in layers]
        begun.update(layers)
        kinds, strides = zip(*bases, strict=True)
        first, count = shrink(bundle, augment=any(augments))
        others = [not augment for augment in augments]
        strides_behind = [room[1] if augment else 0 for room, augment in zip(behind, augments, strict=True)]
        steps.append(
            ForwardStep(
                part,
                count,
                first,
                expand(bundle, count, kinds, strides, others) if any(others) else None,
                write_behind(bundle, count, strides_behind, augments) if any(augments) else None,
                list(kinds),
                augments,
            )
        )
    return steps


class BackwardStep(NamedTuple):
    """The launches of one bundle.

    Attributes:
        rank_tile: of every adapter.
        tiles, splits: parts of P, and of D.
        outputs: columns of D.
        a_parts: of dA.
        blocks: parts of dg.
        needs: which gradients of each adapter are needed.
    """

    part: Part
    output_backward: PreparedLaunch
    reduce_hidden: PreparedLaunch
    input_backward: PreparedLaunch | None
    reduce_rows: PreparedLaunch | None
    rank_tile: int
    tiles: int
    splits: int
    outputs: int
    a_parts: int
    blocks: int
    needs: list[Needs]


@lru_cache(PLANS)
def backward_plan(signature: tuple) -> list[BackwardStep]:
    """The launches of a backward, one step for each bundle."""
    s, steps = Signature(*signature), []
    for part in _parts(s):
        bundle, layers = part.bundle, [layer for layer, _ in part.pieces]
        dys = [s.dys[i] for i in layers]
        used = [dy is not None for dy in dys]
        needs = [Needs(*s.needs[i]) if use else Needs(False, False, False) for i, use in zip(layers, used, strict=True)]
        needs_a, needs_gate, needs_b = map(list, zip(*needs, strict=True))
        strides = [0 if dy is None else dy[1] for dy in dys]
        first, left = output_backward(bundle, strides, used, needs_d=any(needs_b))
        second, a_parts = None, 0
        if s.needs_dx or any(needs_a):
            second, a_parts = input_backward(bundle, s.needs_dx, any(needs_a))
        last = None
        if any(map(any, needs)):
            last = reduce_rows(bundle, a_parts, left, needs_a, needs_b, needs_gate)
        steps.append(
            BackwardStep(
                part,
                first,
                reduce_hidden(bundle, left.tiles, any(needs_gate)),
                second,
                last,
                bundle.width,
                sum(left.tiles),
                left.splits if any(needs_b) else 0,
                sum(n for n, use in zip(bundle.outputs, used, strict=True) if use),
                a_parts if any(needs_a) else 0,
                hidden_blocks(bundle) if any(needs_gate) else 0,
                needs,
            )
        )
    return steps
