"""Autograd for the fused layers: an autograd Function in eager mode, library ops under ``torch.compile``.

Only library ops can be traced. They are opaque to the compiler: what they decide (tiles, grids) follows the real
sizes, so a graph stays valid for any number of tokens and for all ranks of a rank tile. They are registered with
``torch.library.define`` and ``impl``: the wrapper of ``torch.library.custom_op`` would cost some 30 us a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l1ra_kernels import gated_linear as op
from l1ra_kernels.gated_linear import Needs
from l1ra_kernels.launch import on_device
from l1ra_kernels.layer import Layer

__all__ = ["fused"]


def fused(x: Tensor, layers: Sequence[Layer], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs ``(..., N)`` of layers that share the input ``x`` ``(..., K)``, differentiable once.

    The matrix products are computed in the dtype of ``Layer.output`` ``(..., N)``, or in the dtype of x if there is
    none.
    """
    dtype = x.dtype if layers[0].output is None else layers[0].output.dtype
    seed = torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None
    if torch.compiler.is_compiling():
        # The path "aug" writes into the memory behind the weight, which the op would have to declare as a mutation. The
        # path "chain" computes the same without it.
        lead, rows = x.shape[:-1], op.as_rows(x)
        return tuple(_traced(rows, layer, dropout, seed).view(*lead, layer.b.shape[1]) for layer in layers)
    tensors = [x]
    for layer in layers:
        tensors += layer[:3]
    tensors += [layer.output for layer in layers if layer.output is not None]
    return _apply((layers, dtype, dropout, seed), *tensors)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As ``once_differentiable``, which also enters ``no_grad`` where no graph is made; that takes a microsecond."""
    checked = once_differentiable(backward)
    return lambda ctx, *dys: (checked if torch.is_grad_enabled() else backward)(ctx, *dys)


class _Fused(torch.autograd.Function):
    """Its inputs: layers, dtype, dropout and seed as one, because the cost of a Function grows with the number of its
    inputs; x; A, gate and B of each layer; the outputs of base layers."""

    @staticmethod
    def forward(ctx, call, x, *tensors):
        layers, dtype, dropout, seed = call
        with on_device(x.device):
            outputs, hidden = op.forward(x, layers, dtype, dropout, seed)
        # The backward does not need the base layer's output, so it is not saved and its memory can be freed.
        ctx.save_for_backward(x, hidden, seed, *tensors[: 3 * len(layers)], *[layer.weight for layer in layers])
        ctx.constants = [layer.scaling for layer in layers], [layer.output is not None for layer in layers], dropout
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @_once_differentiable
    def backward(ctx, *dys):
        x, hidden, seed, *saved = ctx.saved_tensors
        scalings, has_output, dropout = ctx.constants
        needs_grad = ctx.needs_input_grad
        layers, needs, at = [], [], 0
        for scaling, weight in zip(scalings, saved[3 * len(scalings) :], strict=True):
            layers.append(Layer(*saved[at : at + 3], scaling, weight))
            needs.append(needs_grad[at + 2 : at + 5])
            at += 3
        # The autograd engine has made the device of x current.
        dx, grads = op.backward(dys, x, hidden, layers, needs_grad[1], needs, dropout, seed)
        found = [None, dx]
        for each in grads:
            found += each
        for dy, has_one in zip(dys, has_output, strict=True):
            if has_one:
                found.append(dy if needs_grad[len(found)] else None)
        return tuple(found)


# Function.apply itself also looks for functorch transforms, in which no fused path is chosen.
_apply = super(torch.autograd.Function, _Fused).apply


def _traced(x: Tensor, layer: Layer, dropout: float, seed: Tensor | None) -> Tensor:
    output = None if layer.output is None else op.as_rows(layer.output)
    tensors = (layer.a, layer.gate, layer.b, layer.weight, layer.bias, output, seed)
    return gated_linear_op(x, *tensors, layer.scaling, dropout)[0]


def _library_op(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function``, whose annotations are the schema, and return the op."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"l1ra_kernels::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"l1ra_kernels::{name}", "default", function)
    return getattr(torch.ops.l1ra_kernels, name).default


def _gated_linear(
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
    """The fused forward of one layer: y ``(M, N)`` and H, which the backward reads."""
    layer = Layer(a, gate, b, scaling, weight, bias, output)
    dtype = x.dtype if output is None else output.dtype
    with on_device(x.device):
        (y,), hidden = op.forward(x, [layer], dtype, dropout, seed)
    return y, hidden


gated_linear_op = _library_op("gated_linear", _gated_linear)


@torch.library.register_fake("l1ra_kernels::gated_linear")
def _(x, a, gate, b, weight, bias, output, seed, scaling, dropout):
    dtype = x.dtype if output is None else output.dtype
    y = x.new_empty(x.shape[0], b.shape[1], dtype=dtype)
    return y, x.new_empty(x.shape[0], op.hidden_width(a.shape[0]), dtype=dtype)


def _gated_linear_backward(
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
    """The fused backward of one layer: ``[dx, da, dg, db]``.

    A gradient that is not needed is replaced by an empty tensor, because a library op can't return None.
    """
    layer = Layer(a, gate, b, scaling, weight)
    with on_device(x.device):
        dx, (grads,) = op.backward([dy], x, hidden, [layer], needs[0], [Needs(*needs[1:])], dropout, seed)
    return [x.new_empty(0) if grad is None else grad for grad in (dx, *grads)]


gated_linear_backward_op = _library_op("gated_linear_backward", _gated_linear_backward)


@torch.library.register_fake("l1ra_kernels::gated_linear_backward")
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


torch.library.register_autograd("l1ra_kernels::gated_linear", _backward, setup_context=_save)
