"""The designs of an adapter on a frozen linear layer, counted: what each kernel reads, writes, computes.

A design is a list of terms for the forward and one for the backward, of a ``Shape``. A term is a kernel: the bytes that
it reads from and writes to GPU memory, its FLOPs, its launches, all beyond the frozen products ``x Wᵀ`` and ``dY W``.

Assumptions, the same for all designs:

- activations, W and their gradients are bf16; a launch moves each operand once; what one launch writes the next reads
  from memory (L2 is not credited, also not for partial sums that would fit in it);
- the gates' few bytes, and those of the parts of their gradient, are nothing;
- no dropout, no bias; the frozen network's own sums of dX (q + k + v, gate + up) belong to the frozen network;
- *hidden* bytes are read by a large product that adds to its output (cuBLAS with beta = 1) and disappear under its
  arithmetic;
- our buffers are as wide as the rank tile; our adapters and their gradients are fp32. Tiles, streams and bundles are
  those of ``l1ra_kernels``, for bf16 on an H100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from l1ra_kernels import configs

__all__ = ["BF16", "DESIGNS", "FP32", "PASSES", "UNSHARED", "Design", "Passes", "Shape", "Term", "Terms"]

BF16, FP32 = 2, 4
TILES, _ = configs.TILES.get("sm_90", (configs.HALF, configs.SINGLE))
# Without a GPU to ask, streams are cut for as many processors as an H100 has.
NO_GPU = torch.device("cpu")
SHARING = 3  # adapters that one pass over x serves at most; their rank tiles must fit the widest one


def partial_sums(kernel: str, width: int, tokens: int, features: int) -> tuple[int, int]:
    """Tiles of features and streams of tokens of a backward pass, each of which leaves a partial sum."""
    tile = TILES[kernel][configs.rank_tile(width)]
    columns = math.ceil(features / tile.features)
    return columns, configs.split_tokens(tokens, tile.tokens, columns, NO_GPU)[1]


class Shape:
    """Linears that read the same x: ``tokens``, common ``inputs``, ``outputs`` of each, ``rank`` of each.

    ``bundles`` are the adapters that share a pass over x, the number of them in each. The other attributes are numbers
    of elements, summed over the linears; x is there once.
    """

    def __init__(self, tokens: int, inputs: int, outputs: tuple[int, ...], rank: int) -> None:
        self.inputs, self.outputs, self.linears, self.rank = inputs, outputs, len(outputs), rank
        self.bucket = configs.rank_tile(rank)
        fit = min(SHARING, configs.RANK_TILES[-1] // self.bucket)
        self.bundles = [min(fit, self.linears - first) for first in range(0, self.linears, fit)]
        self.x, self.y = tokens * inputs, tokens * sum(outputs)
        self.a, self.b = rank * inputs * self.linears, rank * sum(outputs)
        self.h = tokens * rank * self.linears
        # In our own buffers: H or Q; the partial sums of P, D = Hᵀ dY and dA as they are written. Of D and dA, only the
        # rows of true ranks are read again.
        self.wide_h = tokens * self.bucket * self.linears
        self.p_parts = self.d_parts = self.da_parts = 0
        for n in outputs:
            columns, streams = partial_sums("output_backward", self.bucket, tokens, n)
            self.p_parts += columns * tokens * self.bucket
            self.d_parts += streams * self.bucket * n
        for adapters in self.bundles:
            width = adapters * self.bucket
            _, streams = partial_sums("input_backward", width, tokens, inputs)
            self.da_parts += streams * width * inputs
        self.d_live, self.da_live = (parts * rank // self.bucket for parts in (self.d_parts, self.da_parts))

    def x_flops(self, width: int) -> int:
        """FLOPs of a product of x's size with ``width`` ranks of each linear."""
        return 2 * self.x * width * self.linears

    def y_flops(self, width: int) -> int:
        """FLOPs of a product of each y's size with ``width`` ranks."""
        return 2 * self.y * width


@dataclass(frozen=True)
class Term:
    """One launch, or several alike: bytes read and written, FLOPs.

    ``hidden``: the bytes disappear under a large product. ``in_product``: no launch of its own, but so many FLOPs more
    in a frozen product.
    """

    name: str
    read: int
    write: int
    flops: int = 0
    launches: int = 1
    hidden: bool = False
    in_product: bool = False


Terms = list[Term]
Passes = tuple[Terms, Terms]
PASSES = ("forward", "backward")


def each(name: str, elements: int, source: int, target: int, launches: int = 1) -> Term:
    """A pointwise kernel, ``source`` bytes read and ``target`` bytes written an element."""
    return Term(name, source * elements, target * elements, launches=launches)


class Products:
    """The adapter's products, each a launch, all operands of ``size`` bytes an element."""

    def __init__(self, s: Shape, size: int = BF16) -> None:
        def product(name: str, read: int, write: int, flops: int) -> Term:
            return Term(name, size * read, size * write, flops)

        x_flops, y_flops = s.x_flops(s.rank), s.y_flops(s.rank)
        self.h = product("H = x Aᵀ", s.x + s.a, s.h, x_flops)
        self.y = product("L = H B", s.h + s.b, s.y, y_flops)
        self.y_added = product("Y += H B (addmm)", s.h + s.b + s.y, s.y, y_flops)
        self.dh = product("dH = dY Bᵀ", s.y + s.b, s.h, y_flops)
        self.da = product("dA = dHᵀ x", s.h + s.x, s.a, x_flops)
        self.db = product("dB = Hᵀ dY", s.y + s.h, s.b, y_flops)
        self.dx = product("adapter's dX = dH A", s.h + s.a, s.x, x_flops)
        self.dx_added = product("dX += dH A (addmm)", s.h + s.a + s.x, s.x, x_flops)


def sum_of_dx(s: Shape) -> Term:
    return each("autograd adds the two dX", s.x, 2 * BF16, BF16)


# PEFT: result = result + lora_B(lora_A(x)) * scaling, one kernel a step. A test counts the same bytes on the operations
# that PEFT really calls.


def peft_steps(s: Shape, size: int) -> Passes:
    p = Products(s, size)
    scaled, d_scaled = each("L · scaling", s.y, size, size), each("dY · scaling", s.y, size, size)
    return [p.h, p.y, scaled], [d_scaled, p.db, p.dh, p.da, p.dx]


def peft_bf16(s: Shape) -> Passes:
    forward, backward = peft_steps(s, BF16)
    return [*forward, each("base output + L", s.y, 2 * BF16, BF16)], [*backward, sum_of_dx(s)]


def peft_autocast(s: Shape) -> Passes:
    """PEFT casts x up to the adapter's fp32; autocast casts it down again, and A and B too."""
    forward, backward = peft_bf16(s)
    x_casts = [each("x to fp32", s.x, BF16, FP32), each("x to bf16", s.x, FP32, BF16)]
    dx_casts = [each("adapter's dX to fp32", s.x, BF16, FP32), each("adapter's dX to bf16", s.x, FP32, BF16)]
    return [*x_casts, *adapters_down(s), *forward], [*backward, *dx_casts, *gradients_up(s)]


def adapters_down(s: Shape) -> Terms:
    return [each("A to bf16", s.a, FP32, BF16), each("B to bf16", s.b, FP32, BF16)]


def gradients_up(s: Shape) -> Terms:
    return [each("dA to fp32", s.a, BF16, FP32), each("dB to fp32", s.b, BF16, FP32)]


def peft_fp32(s: Shape) -> Passes:
    forward, backward = peft_steps(s, FP32)
    total = each("base output + L, in fp32", s.y, BF16 + FP32, FP32)
    dy_casts = [each("dY to fp32", s.y, BF16, FP32), each("dY to bf16 for the base", s.y, FP32, BF16)]
    dx_cast = each("adapter's dX to bf16", s.x, FP32, BF16)
    return (
        [each("x to fp32", s.x, BF16, FP32), *forward, total, each("output to bf16", s.y, FP32, BF16)],
        [*dy_casts, *backward, dx_cast, sum_of_dx(s)],
    )


def compiled(s: Shape) -> Passes:
    """bf16 adapters. The adapter's dX is read once more, by an addmm or by the kernel that uses dX next: no launch."""
    (h, y, _), backward = peft_steps(s, BF16)
    read_back = Term("adapter's dX read back", BF16 * s.x, 0, launches=0)
    return [h, y, each("base output + L · scaling", s.y, 2 * BF16, BF16)], [*backward, read_back]


def unsloth(s: Shape) -> Passes:
    """fp32 adapters. H is not kept, and dY Bᵀ is formed twice: for dA and for dX.

    That q, k, v and gate, up add their dX inside addmm would save the frozen network's sums too: not credited here.
    """
    p = Products(s)
    backward = [*adapters_down(s), p.dh, p.da, p.h, p.db, p.dh, p.dx_added, *gradients_up(s)]
    return [*adapters_down(s), p.h, p.y_added], backward


def lorafusion(s: Shape) -> Passes:
    """bf16 adapters. Triton products at cuBLAS's speed, with a rank step. Atomic sums meet in L2: counted once."""
    p, sums = Products(s), s.h + s.b
    dy_pass = Term("pass over dY: dH, dB", BF16 * (s.y + sums) + FP32 * sums, FP32 * sums, 2 * s.y_flops(s.rank))
    clear, casts = each("dH, dB = 0", sums, 0, FP32, launches=2), each("dH, dB to bf16", sums, FP32, BF16, launches=2)
    step = in_product("rank step in x Wᵀ", BF16 * (s.h + s.b), s.y_flops(s.rank))
    d_step = in_product("rank step in dY W", BF16 * (s.h + s.a), s.x_flops(s.rank))
    return [p.h, step], [clear, dy_pass, casts, p.da, d_step]


def in_product(name: str, read: int, flops: int) -> Term:
    return Term(name, read, 0, flops, launches=0, in_product=True)


# Ours. A shape of several linears is a shared read of x (q, k, v; gate, up), as far as a pass over x can serve them.


def our_shrink(s: Shape) -> Term:
    passes = len(s.bundles)
    return Term("shrink: H", BF16 * passes * s.x + FP32 * s.a, BF16 * s.wide_h, s.x_flops(s.bucket), launches=passes)


def our_expand(s: Shape) -> Term:
    read = BF16 * s.wide_h + FP32 * s.b
    return Term("expand: Y from H, B", read, BF16 * s.y, s.y_flops(s.bucket), launches=s.linears)


def read_back(name: str, elements: int) -> Term:
    return Term(name, BF16 * elements, 0, launches=0, hidden=True)


def our_gradients(s: Shape, copies_dy: bool = False) -> Terms:
    """Two passes and three reductions. The pass over x writes dX = Q A, unless the pass over dY copies dY."""
    passes = len(s.bundles)
    dy_pass = Term(
        "pass over dY: P, D = Hᵀ dY",
        BF16 * (s.y + s.wide_h) + FP32 * s.b,
        FP32 * (s.p_parts + s.d_parts) + (BF16 * s.y if copies_dy else 0),
        2 * s.y_flops(s.bucket),
        launches=s.linears,
    )
    reduce_p = Term("reduce P: Q = s·g·P, dg", FP32 * s.p_parts + BF16 * s.wide_h, BF16 * s.wide_h, launches=s.linears)
    reduce_d = Term("reduce D: dB", FP32 * s.d_live, FP32 * s.b, launches=s.linears)
    reduce_da = Term("reduce dA", FP32 * s.da_live, FP32 * s.a, launches=s.linears)
    x_read, x_flops = BF16 * (passes * s.x + s.wide_h), s.x_flops(s.bucket)
    if copies_dy:
        x_pass = Term("pass over x: dA", x_read, FP32 * s.da_parts, x_flops, launches=passes)
        return [dy_pass, reduce_p, reduce_d, x_pass, reduce_da]
    x_write = FP32 * s.da_parts + BF16 * passes * s.x
    x_pass = Term("pass over x: dX = Q A, dA", x_read + FP32 * s.a, x_write, 2 * x_flops, launches=passes)
    further = each("dX of further passes added", (passes - 1) * s.x, 2 * BF16, BF16, launches=passes - 1)
    return [dy_pass, reduce_p, reduce_d, x_pass, reduce_da, *([further] if passes > 1 else [])]


def chain(s: Shape) -> Passes:
    """Each linear's dY W adds to the same dX: it is read back once a linear."""
    forward = [our_shrink(s), our_expand(s), read_back("x Wᵀ adds to Y: read back", s.y)]
    return forward, [*our_gradients(s), read_back("dY W adds to dX: read back", s.linears * s.x)]


def add(s: Shape) -> Passes:
    """The base's own forward left its output in Y0; its own backward makes a dX, and autograd adds the two."""
    expand = our_expand(s)
    onto = replace(expand, name="expand: Y = Y0 + from H, B", read=expand.read + BF16 * s.y)
    return [our_shrink(s), onto], [*our_gradients(s), sum_of_dx(s)]


def aug(s: Shape) -> Passes:
    """H is kept besides s·g·H: the gates' gradient needs it where g is 0.

    With shared reads each product runs over the ranks of all linears, W's columns for the others' being 0.
    Backward: ``[dY | Q]`` times ``[W; A]`` where copying dY is cheaper than writing dX, else as in chain.
    """
    shrink, columns = our_shrink(s), s.bucket * s.linears
    copy = replace(shrink, name="shrink: [x | s·g·H], H", write=BF16 * (s.x + 2 * s.wide_h))
    behind = each("B behind W's columns", s.b, FP32, BF16, launches=s.linears)
    longer = in_product(
        "x Wᵀ longer by the ranks", BF16 * (s.linears * s.wide_h + columns * sum(s.outputs)), s.y_flops(columns)
    )
    forward = [copy, behind, longer]
    if sum(s.outputs) >= s.inputs:
        return forward, chain(s)[1]
    below = each("A below W's rows", s.a, FP32, BF16, launches=s.linears)
    d_longer = in_product("dY W longer by the ranks", BF16 * (s.wide_h + columns * s.inputs), s.x_flops(s.bucket))
    return forward, [*our_gradients(s, copies_dy=True), below, d_longer]


@dataclass(frozen=True)
class Design:
    """``count``: shape -> terms. ``shared``: linears that read the same x are one shape."""

    count: Callable[[Shape], Passes]
    shared: bool = False


DESIGNS = {
    "PEFT fp32, no autocast": Design(peft_fp32),
    "PEFT fp32, autocast": Design(peft_autocast),
    "PEFT bf16": Design(peft_bf16),
    "torch.compile": Design(compiled),
    "Unsloth": Design(unsloth),
    "LoRAFusion": Design(lorafusion),
    "add": Design(add),
    "chain": Design(chain),
    "aug": Design(aug),
    "add, shared reads": Design(add, shared=True),
    "chain, shared reads": Design(chain, shared=True),
    "aug, shared reads": Design(aug, shared=True),
}
UNSHARED = {name: design for name, design in DESIGNS.items() if not design.shared}
