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
- our buffers are as wide as the rank tile; our adapters and their gradients are fp32. Bundles, tiles, grids and partial
  sums are those that the launchers of ``l1ra_kernels`` choose for bf16 on an sm_90 with 132 multiprocessors.

Of our kernels, also what costs time beyond bytes: operands that several programs read (again, from L2), multiprocessors
that are idle at the end, and loads that wait for each other.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from l1ra.layers.padded_weight import padding_pays_off
from l1ra_kernels import configs
from l1ra_kernels.augment import write_behind
from l1ra_kernels.bundle import Bundle, bundles_of
from l1ra_kernels.expand import NOTHING, expand
from l1ra_kernels.input_backward import input_backward
from l1ra_kernels.launch import PreparedLaunch
from l1ra_kernels.output_backward import output_backward
from l1ra_kernels.reductions import FEATURES, hidden_blocks, reduce_hidden
from l1ra_kernels.shrink import shrink

__all__ = [
    "BF16",
    "DESIGNS",
    "FP32",
    "PASSES",
    "UNSHARED",
    "Design",
    "Passes",
    "Shape",
    "Term",
    "Terms",
    "busy_share",
    "name_of",
    "program_lengths",
]

BF16, FP32 = 2, 4
NO_GPU = torch.device("cpu")  # for which the launchers choose tiles of sm_90 and ``configs.PROCESSORS``
# Programs of a reduction that a multiprocessor runs at a time: 4 warps with at most 64 registers a thread.
REDUCTION_BLOCKS = 8
# Parts of a sum whose loads the machine code (sm_90, triton 3.9) has in flight together.
TOGETHER = {"expand": 4, "write_behind": 4, "reduce_hidden": 4, "reduce_rows": 4}


class Shape:
    """Linears that read the same x: ``tokens``, common ``inputs``, ``outputs`` of each, ``rank`` of each.

    ``bundles`` are those of the adapters that share launches. The other attributes are numbers of elements, summed over
    the linears; x is there once.
    """

    def __init__(self, tokens: int, inputs: int, outputs: tuple[int, ...], rank: int) -> None:
        self.tokens, self.inputs, self.outputs, self.linears, self.rank = tokens, inputs, outputs, len(outputs), rank
        self.x, self.y = tokens * inputs, tokens * sum(outputs)
        self.a, self.b = rank * inputs * self.linears, rank * sum(outputs)
        self.h = tokens * rank * self.linears

    @property
    def bundles(self) -> list[Bundle]:
        found = []
        for width, pieces in bundles_of([self.rank] * self.linears, [None] * self.linears):
            ranks = [self.rank if rows is None else rows[1] - rows[0] for _, rows in pieces]
            layers = tuple(self.outputs[layer] for layer, _ in pieces)
            sizes = (self.tokens, self.inputs, self.inputs, width, tuple(ranks), layers, (1.0,) * len(pieces), 0.0)
            found.append(Bundle(NO_GPU, None, torch.bfloat16, torch.bfloat16, "ieee", *sizes))
        return found

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
    in a frozen product. ``again``: bytes that further programs read, beyond ``read``. ``busy``: the share of the
    kernel's time in which a slot for a program is busy. ``waits``: loads that wait for each other, one after another.
    ``parts``: bytes of partial sums among those read and written.
    """

    name: str
    read: int
    write: int
    flops: int = 0
    launches: int = 1
    hidden: bool = False
    in_product: bool = False
    again: int = 0
    busy: float = 1.0
    waits: float = 0.0
    parts: int = 0


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


# Ours. A shape of several linears is a shared read of x (q, k, v; gate, up), as far as a bundle can serve them.


def name_of(launch: PreparedLaunch) -> str:
    return launch.fn.__name__.removeprefix("_")


def number(launch: PreparedLaunch, name: str) -> int:
    """The value of a numeric parameter of the kernel."""
    names = [name for name in inspect.signature(launch.fn).parameters if not name.startswith("p_")]
    return dict(zip(names, launch.numbers, strict=False))[name]


def program_lengths(launch: PreparedLaunch) -> list[int]:
    """For each program, in the order in which they start, its number of tiles; 1 each for kernels without a loop."""
    kernel, meta = name_of(launch), launch.meta
    if kernel == "shrink":
        cut = [(-(-number(launch, "K") // meta["BK"]), number(launch, "run"))]
    elif kernel == "expand":
        columns = [-(-number(launch, f"N{i}") // meta["BN"]) for i in range(meta["G"])]
        cut = [(tiles, number(launch, "run")) for tiles in columns]
    elif kernel in ("output_backward", "input_backward"):
        cut = [(-(-number(launch, "M") // meta["BM"]), number(launch, "run") // meta["BM"])]
    else:
        return [1] * math.prod(launch.grid)
    first, second = launch.grid[:2]
    lengths = [min(run, tiles - start) for tiles, run in cut for start in range(0, tiles, run)]
    assert len(lengths) == second
    return [length for length in lengths for _ in range(first)]


def busy_share(lengths: list[int], slots: int) -> float:
    """The share of the time in which one of ``slots`` programs at a time runs, if each takes as long as its tiles."""
    ends = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return sum(lengths) / (slots * max(ends))


def busy_as_cut(launch: PreparedLaunch, bundle: Bundle, width: int) -> float:
    """With as many programs at a time as the tile says."""
    tile = configs.tile(name_of(launch), width, bundle.dtype, bundle.device)
    return busy_share(program_lengths(launch), tile.blocks * configs.processors(bundle.device))


def sum_waits(kernel: str, parts: int) -> int:
    """Waits of a sum of parts."""
    return -(-parts // TOGETHER[kernel])


def small(waits: int, programs: int) -> float:
    """Waits of a kernel that has little to read: each program makes all of them, and programs follow one another."""
    return waits * max(1.0, programs / (REDUCTION_BLOCKS * configs.PROCESSORS))


def our_shrink(s: Shape, bundle: Bundle, augment: bool = False) -> tuple[Term, int]:
    """And the parts of H. Before its first tile a program waits for the gates, then for x and A."""
    launch, parts = shrink(bundle, augment)
    a, h = sum(bundle.ranks) * s.inputs, s.tokens * bundle.columns
    term = Term(
        "shrink: [x | ], parts of H" if augment else "shrink: parts of H",
        BF16 * s.x + FP32 * a,
        FP32 * parts * h + (BF16 * s.x if augment else 0),
        2 * s.x * bundle.columns,
        parts=FP32 * parts * h,
        again=FP32 * a * (launch.grid[0] - 1),
        busy=busy_as_cut(launch, bundle, bundle.columns),
        waits=2,
    )
    return term, parts


def our_expand(s: Shape, bundle: Bundle, parts: int) -> Term:
    """A program adds the parts of H, then waits for the gate, then for B."""
    launch = expand(bundle, parts, [NOTHING] * bundle.adapters, [0] * bundle.adapters, [True] * bundle.adapters)
    b, h = FP32 * adapters_b(bundle), FP32 * parts * s.tokens * bundle.width
    return Term(
        "expand: Y from parts of H, B; H",
        h * bundle.adapters + b,
        BF16 * (s.tokens * bundle.columns + s.tokens * sum(bundle.outputs)),
        2 * s.tokens * sum(bundle.outputs) * bundle.width,
        parts=h * bundle.adapters,
        again=h * (launch.grid[1] - bundle.adapters) + b * (launch.grid[0] - 1),
        busy=busy_as_cut(launch, bundle, bundle.width),
        waits=sum_waits("expand", parts) + 2,
    )


def adapters_b(bundle: Bundle) -> int:
    return sum(rank * n for rank, n in zip(bundle.ranks, bundle.outputs, strict=True))


def our_write_behind(s: Shape, bundle: Bundle, parts: int) -> Term:
    launch = write_behind(bundle, parts, [0] * bundle.adapters, [True] * bundle.adapters)
    h = s.tokens * bundle.columns
    return Term(
        "write behind: H, C behind x, W",
        FP32 * (parts * h + adapters_b(bundle)),
        BF16 * (2 * h + sum(bundle.outputs) * bundle.columns),
        parts=FP32 * parts * h,
        waits=small(max(sum_waits("write_behind", parts), 2), math.prod(launch.grid)),
    )


def read_back(name: str, elements: int) -> Term:
    return Term(name, BF16 * elements, 0, launches=0, hidden=True)


def our_backward(s: Shape) -> Terms:
    """Two passes and a reduction after each, for each bundle; each linear's dY W adds to the same dX."""
    bundles, terms = s.bundles, []
    for bundle in bundles:
        terms += our_gradients(s, bundle)
    if len(bundles) > 1:
        more = len(bundles) - 1
        terms.append(each("dX of further bundles added", more * s.x, 2 * BF16, BF16, launches=more))
    return [*terms, read_back("dY W adds to dX: read back", s.linears * s.x)]


def our_gradients(s: Shape, bundle: Bundle) -> Terms:
    used = [True] * bundle.adapters
    a, b, y = sum(bundle.ranks) * s.inputs, adapters_b(bundle), s.tokens * sum(bundle.outputs)
    part, h = s.tokens * bundle.width, s.tokens * bundle.columns
    y_launch, left = output_backward(bundle, [0] * bundle.adapters, used)
    x_launch, a_parts = input_backward(bundle)
    h_launch = reduce_hidden(bundle, left.tiles)
    p_parts, d_parts = FP32 * sum(left.tiles) * part, FP32 * left.splits * bundle.width * sum(bundle.outputs)
    da_parts = FP32 * a_parts * bundle.columns * s.inputs
    y_pass = Term(
        "pass over dY: P, D = Hᵀ dY",
        BF16 * (y + h) + FP32 * b,
        p_parts + d_parts,
        4 * y * bundle.width,
        parts=p_parts + d_parts,
        again=BF16 * part * (sum(left.tiles) - bundle.adapters) + FP32 * b * (left.splits - 1),
        busy=busy_as_cut(y_launch, bundle, bundle.width),
        waits=3,  # gate, B, the first tile
    )
    reduce_p = Term(
        "reduce P: Q = s·g·P, dg",
        p_parts + BF16 * h,
        BF16 * h,
        parts=p_parts,
        waits=small(sum_waits("reduce_hidden", max(left.tiles)) + 2, math.prod(h_launch.grid)),  # gate, parts, H
    )
    x_pass = Term(
        "pass over x: dX = Q A, dA",
        BF16 * (s.x + h) + FP32 * a,
        BF16 * s.x + da_parts,
        4 * s.x * bundle.columns,
        parts=da_parts,
        again=BF16 * h * (x_launch.grid[0] - 1) + FP32 * a * (a_parts - 1),
        busy=busy_as_cut(x_launch, bundle, bundle.columns),
        waits=3,
    )
    columns = FEATURES * 16 // bundle.width
    programs = sum(-(-s.inputs // columns) - (-n // columns) for n in bundle.outputs)
    dg_waits = -(-hidden_blocks(bundle) // columns)  # after dB, in the first program of an adapter
    sums = max(sum_waits("reduce_rows", a_parts), sum_waits("reduce_rows", left.splits) + dg_waits)
    reduce_all = Term(
        "reduce D, dA, dg: dB, dA, dg",
        FP32 * (a_parts * a + left.splits * b),
        FP32 * (a + b),
        parts=FP32 * (a_parts * a + left.splits * b),
        waits=small(1 + sums, programs),
    )
    return [y_pass, reduce_p, x_pass, reduce_all]


def our_forward(s: Shape) -> tuple[Terms, Terms]:
    """The terms of shrink and of expand, one of each for a bundle."""
    firsts, seconds = [], []
    for bundle in s.bundles:
        first, parts = our_shrink(s, bundle)
        firsts.append(first)
        seconds.append(our_expand(s, bundle, parts))
    return firsts, seconds


def chain(s: Shape) -> Passes:
    shrinks, expands = our_forward(s)
    return [*shrinks, *expands, read_back("x Wᵀ adds to Y: read back", s.y)], our_backward(s)


def add(s: Shape) -> Passes:
    """The base's own forward left its output in Y0; its own backward makes a dX, and autograd adds the two."""
    shrinks, expands = our_forward(s)
    onto = [replace(term, name=f"{term.name}, Y0") for term in expands]
    onto[0] = replace(onto[0], read=onto[0].read + BF16 * s.y)
    return [*shrinks, *onto], [*our_backward(s)[:-1], sum_of_dx(s)]


def aug(s: Shape) -> Passes:
    """With shared reads each product runs over the ranks of all linears, W's columns for the others' being 0.

    Several bundles run as chain does: there is only one ``[x | H]``.
    """
    bundles = s.bundles
    if len(bundles) > 1:
        return chain(s)
    first, parts = our_shrink(s, bundles[0], augment=True)
    columns = bundles[0].columns
    longer = in_product(
        "x Wᵀ longer by the ranks",
        BF16 * (s.linears * s.tokens * columns + columns * sum(s.outputs)),
        s.y_flops(columns),
    )
    return [first, our_write_behind(s, bundles[0], parts), longer], our_backward(s)


def aug_where_it_pays(s: Shape) -> Passes:
    """What ``augment=True`` does."""
    return aug(s) if all(padding_pays_off(s.inputs, n) for n in s.outputs) else chain(s)


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
    "chain, shared reads": Design(chain, shared=True),
    "aug, shared reads": Design(aug, shared=True),
    "augment=True, shared reads": Design(aug_where_it_pays, shared=True),
}
UNSHARED = {name: design for name, design in DESIGNS.items() if not design.shared}
