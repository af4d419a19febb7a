"""Autograd for the fused layers: an autograd Function in eager mode, a custom op under ``torch.compile``.

Only the custom op can be traced. In eager mode it would cost some tens of microseconds of CPU time per call, where the
Function costs a few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l1ra_kernels import gated_linear as op
from l1ra_kernels.gated_linear import Needs
from l1ra_kernels.launch import on_device
from l1ra_kernels.layer import Layer

__all__ = ["fused"]

PER_LAYER = 7  # tensors per layer: a, gate, b, weight, bias, output, augmented


def fused(x: Tensor, layers: Sequence[Layer], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs ``(..., N)`` of layers that share the input ``x`` ``(..., K)``, differentiable once.

    The matrix products are computed in the dtype of ``Layer.output`` ``(..., N)``, or in the dtype of x if there is
    none.
    """
    dtype = x.dtype if layers[0].output is None else layers[0].output.dtype
    lead = x.shape[:-1]
    x = _rows(x)
    layers = [_with_rows(layer) for layer in layers]
    seed = torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None
    if torch.compiler.is_compiling():
        # The path "aug" writes into the memory behind the weight, which the op would have to declare as a mutation. The
        # path "chain" computes the same without it.
        outputs = tuple(_traced(x, layer, dtype, dropout, seed) for layer in layers)
    else:
        tensors = [
            t
            for a, gate, b, _, weight, bias, output, augmented in layers
            for t in (a, gate, b, weight, bias, output, augmented)
        ]
        outputs = _Fused.apply(x, seed, dtype, dropout, [layer.scaling for layer in layers], *tensors)
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


def _rows(t: Tensor) -> Tensor:
    """``t`` as ``(M, F)`` with last stride 1; a view if possible."""
    flat = t.reshape(-1, t.shape[-1]) if t.numel() else t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return op._contiguous_rows(flat)


def _with_rows(layer: Layer) -> Layer:
    # torch.compile can't trace Layer._replace in torch 2.7.
    *others, output, augmented = layer
    return Layer(*others, None if output is None else _rows(output), augmented)


def _layers(tensors: Sequence[Tensor | None], scalings: Sequence[float]) -> list[Layer]:
    per_layer = zip(*[iter(tensors)] * PER_LAYER, strict=True)
    return [Layer(a, g, b, s, *base) for (a, g, b, *base), s in zip(per_layer, scalings, strict=True)]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, dtype, dropout, scalings, *tensors):
        layers = _layers(tensors, scalings)
        with on_device(x.device):
            outputs, hidden = op.forward(x, layers, dtype, dropout, seed)
        # The backward does not need the base layer's output, so it is not saved and its memory can be freed.
        kept = [t for i, t in enumerate(tensors) if i % PER_LAYER < 4]
        ctx.save_for_backward(x, hidden, seed, *kept)
        ctx.scalings, ctx.dropout = scalings, dropout
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, hidden, seed, *kept = ctx.saved_tensors
        layers = [
            Layer(a, g, b, s, w)
            for (a, g, b, w), s in zip(zip(*[iter(kept)] * 4, strict=True), ctx.scalings, strict=True)
        ]
        wanted = ctx.needs_input_grad[5:]
        needs = [Needs(*wanted[i : i + 3]) for i in range(0, len(wanted), PER_LAYER)]
        with on_device(x.device):
            dx, grads = op.backward(dys, x, hidden, layers, ctx.needs_input_grad[0], needs, ctx.dropout, seed)
        flat = []
        for i, ((da, dg, db), dy) in enumerate(zip(grads, dys, strict=True)):
            output_needs = wanted[i * PER_LAYER + 5]
            flat += [da, dg, db, None, None, dy if output_needs else None, None]
        return dx, None, None, None, None, *flat


def _traced(x: Tensor, layer: Layer, dtype: torch.dtype, dropout: float, seed: Tensor | None) -> Tensor:
    y, _ = gated_linear_op(
        x, layer.a, layer.gate, layer.b, layer.weight, layer.bias, layer.output, seed, layer.scaling, dropout
    )
    return y


@torch.library.custom_op("l1ra_kernels::gated_linear", mutates_args=())
def gated_linear_op(
    x: Tensor,
    a: Tensor,
    gate: Tensor,
    b: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The fused forward of one layer as a custom op: y ``(M, N)`` and H, which the backward reads."""
    layer = Layer(a, gate, b, scaling, weight, bias, None if output is None else _rows(output))
    dtype = x.dtype if output is None else output.dtype
    with on_device(x.device):
        (y,), hidden = op.forward(_rows(x), [layer], dtype, dropout, seed)
    return y, hidden


@gated_linear_op.register_fake
def _(x, a, gate, b, weight, bias, output, seed, scaling, dropout):
    dtype = x.dtype if output is None else output.dtype
    y = x.new_empty(x.shape[0], b.shape[1], dtype=dtype)
    return y, x.new_empty(x.shape[0], op.hidden_width(a.shape[0]), dtype=dtype)


@torch.library.custom_op("l1ra_kernels::gated_linear_backward", mutates_args=())
def gated_linear_backward_op(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    a: Tensor,
    gate: Tensor,
    b: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    needs: list[bool],
) -> list[Tensor]:
    """The fused backward of one layer as a custom op: ``[dx, da, dg, db]``.

    A gradient that is not needed is replaced by an empty tensor, because a custom op can't return None.
    """
    layer = Layer(a, gate, b, scaling, weight)
    with on_device(x.device):
        dx, (grads,) = op.backward([dy], _rows(x), hidden, [layer], needs[0], [Needs(*needs[1:])], dropout, seed)
    return [x.new_empty(0) if grad is None else grad for grad in (dx, *grads)]


@gated_linear_backward_op.register_fake
def _(dy, x, hidden, a, gate, b, weight, seed, scaling, dropout, needs):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for t, need in zip((x, a, gate, b), needs, strict=True)
    ]


def _save(ctx, inputs, output):
    x, a, gate, b, weight, _, _, seed, ctx.scaling, ctx.dropout = inputs
    ctx.save_for_backward(x, output[1], a, gate, b, weight, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    x, hidden, a, gate, b, weight, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    found = [None] * 4
    if dy is not None and any(needs):
        grads = gated_linear_backward_op(dy, x, hidden, a, gate, b, weight, seed, ctx.scaling, ctx.dropout, needs)
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *found, None, None, dy if ctx.needs_input_grad[6] else None, None, None, None


gated_linear_op.register_autograd(_backward, setup_context=_save)
