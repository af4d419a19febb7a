"""Roofline: what an adapter must cost, counted for one frozen linear layer and for a decoder layer's seven.

Nothing here is timed. A design is a list of terms for the forward and one for the backward. A term is a kernel: the
bytes it reads from and writes to GPU memory, its FLOPs, its launches, all beyond the frozen products ``x Wᵀ`` and
``dY W``. Then

    floor    = exposed bytes / copy bandwidth + FLOPs that lengthen the frozen products / product speed
    overhead = floor / (4 · tokens · inputs · outputs / product speed), summed over the layer's seven linears

Assumptions, the same for all designs:

- activations, W and their gradients are bf16; a launch moves each operand once, at copy bandwidth; what one launch
  writes the next reads from memory (L2 is not credited, also not for partial sums that would fit in it);
- arithmetic of memory-bound kernels, gaps between launches, host time and the gates' few bytes cost nothing;
- no dropout, no bias; the frozen network's own sums of dX (q + k + v, gate + up) belong to the frozen network;
- *hidden* bytes are read by a large product that adds to its output (cuBLAS with beta = 1) and disappear under its
  arithmetic: they are counted, but not in the floor;
- our buffers are as wide as the rank's bucket (16, 32, 64, 128); our adapters and their gradients are fp32.

    python benchmarks/roofline.py > docs/roofline.md
    python benchmarks/roofline.py --card h200 --csv roofline.csv
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

BF16, FP32 = 2, 4
RANK_BUCKETS = (16, 32, 64, 128)
# Our backward passes leave partial sums in fp32: of P (tokens, rank) one slab per tile of columns, of dA and dB one per
# chunk of tokens.
COLUMN_TILE, TOKEN_CHUNK = 512, 512

TOKENS, RANKS = (2048, 8192, 16384), (8, 16, 64)
SHOWN_TOKENS, SHOWN_RANK = 8192, 16
SETTING = f"{SHOWN_TOKENS} tokens, rank {SHOWN_RANK}"
SHOWN_LINEARS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))


@dataclass(frozen=True)
class Card:
    """``bandwidth`` of a copy in TB/s, ``tflops`` of a large bf16 product in TFLOP/s."""

    name: str
    bandwidth: float
    tflops: float
    source: str


CARDS = {
    "h100": Card("H100", 3.0, 790, "the design's figures; an assumption here"),
    "h200": Card("H200", 4.3, 790, "assumption, not measured"),
    "a100": Card("A100", 1.5, 260, "assumption, not measured"),
}


class Shape:
    """Linears that read the same x: ``tokens``, common ``inputs``, ``outputs`` of each, ``rank`` of each.

    The other attributes are numbers of elements, summed over the linears; x is there once.
    """

    def __init__(self, tokens: int, inputs: int, outputs: tuple[int, ...], rank: int) -> None:
        self.inputs, self.outputs, self.linears, self.rank = inputs, outputs, len(outputs), rank
        self.bucket = next(width for width in RANK_BUCKETS if width >= rank)
        self.x, self.y = tokens * inputs, tokens * sum(outputs)
        self.a, self.b = rank * inputs * self.linears, rank * sum(outputs)
        self.h = tokens * rank * self.linears
        # In our own buffers: H or Q, and the partial sums of P, dA, dB.
        chunks = math.ceil(tokens / TOKEN_CHUNK)
        self.wide_h = tokens * self.bucket * self.linears
        self.p_slabs = tokens * self.bucket * sum(math.ceil(n / COLUMN_TILE) for n in outputs)
        self.da_slabs = chunks * self.bucket * inputs * self.linears
        self.db_slabs = chunks * self.bucket * sum(outputs)

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


# Ours. A shape of several linears is a shared read of x (q, k, v; gate, up).


def our_shrink(s: Shape) -> Term:
    return Term("shrink: H", BF16 * s.x + FP32 * s.a, BF16 * s.wide_h, s.x_flops(s.bucket))


def our_expand(s: Shape) -> Term:
    read = BF16 * s.wide_h + FP32 * s.b
    return Term("expand: Y from H, B", read, BF16 * s.y, s.y_flops(s.bucket), launches=s.linears)


def read_back(name: str, elements: int) -> Term:
    return Term(name, BF16 * elements, 0, launches=0, hidden=True)


def our_gradients(s: Shape, copies_dy: bool = False) -> Terms:
    """Two passes and two reductions. The pass over x writes dX = Q A, unless the pass over dY copies dY."""
    dy_write = FP32 * (s.p_slabs + s.db_slabs) + (BF16 * s.y if copies_dy else 0)
    x_pass = Term("pass over x: dA", BF16 * (s.x + s.wide_h), FP32 * s.da_slabs, s.x_flops(s.bucket))
    if not copies_dy:
        read, write, flops = x_pass.read + FP32 * s.a, x_pass.write + BF16 * s.x, 2 * x_pass.flops
        x_pass = Term("pass over x: dX = Q A, dA", read, write, flops)
    dy_read, dy_flops = BF16 * (s.y + s.wide_h) + FP32 * s.b, 2 * s.y_flops(s.bucket)
    return [
        Term("pass over dY: P, dB", dy_read, dy_write, dy_flops, launches=s.linears),
        Term("reduce P: Q = s·g·P", FP32 * s.p_slabs, BF16 * s.wide_h),
        x_pass,
        Term("reduce dA, dB, dg", FP32 * (s.da_slabs + s.db_slabs + s.b), FP32 * (s.a + s.b)),
    ]


def chain(s: Shape) -> Passes:
    forward = [our_shrink(s), our_expand(s), read_back("x Wᵀ adds to Y: read back", s.y)]
    return forward, [*our_gradients(s), read_back("dY W adds to dX: read back", s.x)]


def add(s: Shape) -> Passes:
    """The base's own forward left its output in Y; its own backward makes a dX, and autograd adds the two."""
    expand = our_expand(s)
    in_place = replace(expand, name="expand: Y += from H, B", read=expand.read + BF16 * s.y)
    return [our_shrink(s), in_place], [*our_gradients(s), sum_of_dx(s)]


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

Layer = tuple[tuple[str, int, tuple[int, ...]], ...]


def decoder_layer(hidden: int, kv: int, mlp: int) -> Layer:
    """Names, inputs and outputs of the seven linears, grouped by the x that they read."""
    q_k_v, gate_up = ("q k v", hidden, (hidden, kv, kv)), ("gate up", hidden, (mlp, mlp))
    return q_k_v, ("o", hidden, (hidden,)), gate_up, ("down", mlp, (hidden,))


MODELS = {"Llama-3-8B": decoder_layer(4096, 1024, 14336), "Llama-3.2-1B": decoder_layer(2048, 512, 8192)}


def shapes(design: Design, layer: Layer, tokens: int, rank: int) -> Iterator[tuple[str, Shape]]:
    for names, inputs, outputs in layer:
        if design.shared:
            yield names, Shape(tokens, inputs, outputs, rank)
        else:
            for name, n in zip(names.split(), outputs, strict=True):
                yield name, Shape(tokens, inputs, (n,), rank)


def layer_passes(design: Design, layer: Layer, tokens: int, rank: int) -> Passes:
    """The terms of all of a layer's linears."""
    passes = [design.count(shape) for _, shape in shapes(design, layer, tokens, rank)]
    return [t for forward, _ in passes for t in forward], [t for _, backward in passes for t in backward]


def moved(terms: Terms, hidden: bool | None = None) -> int:
    """Bytes read and written: of all terms, or of those that are (not) hidden."""
    return sum(t.read + t.write for t in terms if hidden in (None, t.hidden))


def floor_ms(terms: Terms, card: Card) -> float:
    flops = sum(t.flops for t in terms if t.in_product)
    return (moved(terms, hidden=False) / card.bandwidth + flops / card.tflops) / 1e9


def frozen_ms(layer: Layer, tokens: int, card: Card) -> float:
    """The products x Wᵀ and dY W."""
    return sum(4 * tokens * inputs * sum(outputs) for _, inputs, outputs in layer) / card.tflops / 1e9


def overhead(name: str, layer: Layer, tokens: int, rank: int, card: Card) -> float:
    forward, backward = layer_passes(DESIGNS[name], layer, tokens, rank)
    return floor_ms(forward + backward, card) / frozen_ms(layer, tokens, card)


def break_even(name: str, layer: Layer, card: Card) -> float:
    """Speed of LoRAFusion's products, cuBLAS's being 1, at which its layer takes as long as that of the design."""
    ours, theirs = (overhead(n, layer, SHOWN_TOKENS, SHOWN_RANK, card) for n in (name, "LoRAFusion"))
    return 1 / (1 + ours - theirs)


INTRODUCTION = """# Roofline: what an adapter must cost

    python benchmarks/roofline.py > docs/roofline.md

Everything here is **modelled, never measured**: bytes to and from GPU memory, FLOPs and launches beyond the frozen
products, counted term by term, and a floor in time that follows from them. The assumptions stand at the top of
`benchmarks/roofline.py`. A real kernel is slower than its floor, and not every kernel by the same factor.

*chain*, *add* and *aug* are this project's designs: the adapter's output first and the dense product added to it; added
to the output of a foreign base module; `[x | s·g·H]` times `[W | Bᵀ]`. *Shared reads*: q, k, v read x once, gate and up
too, and their dX is written once. *PEFT fp32* is PEFT's default (adapters in fp32), with and without
`torch.autocast(dtype=torch.bfloat16)`; *PEFT bf16* needs `autocast_adapter_dtype=False`.
"""

DIFFERENCES = """## Where this differs from the first estimate

The design began with a count by hand (H100, 8192 tokens, rank 16). The bytes agree within 4 % but for these:

- PEFT fp32 (first count 873/1008 MB at 4096 → 4096) was counted under autocast, where both agree. Without autocast the
  adapter's activations are fp32, and it is up to 2.4 times as much. Both are right, each for its training loop.
- LoRAFusion, backward (154 and, at 4096 → 14336, 370 MB): the first count charges more for the atomic sums of dH and
  dB. They meet in L2, so here each buffer counts once: right for a floor, and kinder than we are to our partial sums.
- aug, backward at N < K (109 and 392 MB; chain 288, 227, 491, 794 MB, within 4 %): the partial sums of dA and dB here
  are in chunks of 512 tokens; the first count doesn't say its own. Open until the kernels' tiles are settled.
- aug here also keeps A below W's rows and H besides s·g·H (a gate at 0 still has a gradient); the first description had
  neither. Both are needed, and cost less than 1 MB.

The first overheads were Llama-3-8B: PEFT fp32 85 %, PEFT bf16 53 %, torch.compile 42 %, Unsloth 36 %, LoRAFusion 24 %,
ours 16 %, with shared reads 11 %; Llama-3.2-1B: 165, 104, 84, 71, –, 32, 22 %. Most are higher than the tables here:

- PEFT, torch.compile, Unsloth: the bytes agree, and at the stated bandwidth they give no more than stands here. The
  first figures seem to hold a further charge that they don't state (a slower rate for dA and dB would explain most of
  it). Plausible, but no part of a floor until it is timed: here these designs look better than they will be.
- LoRAFusion: bytes explain a third of the first figure; the rest may be a Triton product slower than cuBLAS. Here that
  costs nothing; the break-even below the tables says how much it may be.
- ours: 16 and 32 % lie between all read-backs hidden (here) and none hidden. With shared reads the two agree.
- "Producer fusion" (6 and 12 %) is not counted: no kernel here belongs to another layer.
"""


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def card_table(card: Card) -> str:
    rows = [[c.name, f"{c.bandwidth:g}", f"{c.tflops:g}", c.source] for c in dict.fromkeys([*CARDS.values(), card])]
    return table(["card", "copy, TB/s", "bf16 product, TFLOP/s", "source"], rows)


def bytes_table() -> str:
    rows = []
    for name, design in UNSHARED.items():
        cells = []
        for inputs, outputs in SHOWN_LINEARS:
            forward, backward = design.count(Shape(SHOWN_TOKENS, inputs, (outputs,), SHOWN_RANK))
            hidden = moved(forward + backward, hidden=True) / 1e6
            both = f"{moved(forward) / 1e6:.0f} / {moved(backward) / 1e6:.0f}"
            cells.append(f"{both} ({hidden:.0f})" if hidden else both)
        rows.append([name, *cells])
    return table(["MB", *(f"{inputs} → {outputs}" for inputs, outputs in SHOWN_LINEARS)], rows)


def overhead_table(layer: Layer, card: Card) -> str:
    settings = list(itertools.product(TOKENS, RANKS))
    rows = ([name, *(f"{overhead(name, layer, *setting, card):.1%}" for setting in settings)] for name in DESIGNS)
    return table(["tokens, rank", *(f"{tokens}, {rank}" for tokens, rank in settings)], rows)


def layer_table(layer: Layer, card: Card) -> str:
    rows = []
    for name, design in DESIGNS.items():
        forward, backward = layer_passes(design, layer, SHOWN_TOKENS, SHOWN_RANK)
        both = forward + backward
        gigabytes = [moved(forward) / 1e9, moved(backward) / 1e9, moved(both, hidden=True) / 1e9]
        launches = [str(sum(t.launches for t in terms)) for terms in (forward, backward)]
        flops = sum(t.flops for t in both) / 1e9
        numbers = [f"{value:.2f}" for value in gigabytes] + [f"{flops:.0f}", *launches, f"{floor_ms(both, card):.2f}"]
        rows.append([name, *numbers])
    header = ["design", "GB forward", "GB backward", "GB hidden", "GFLOP", "launches forward", "backward", "floor, ms"]
    return table(header, rows)


def term_table(inputs: int, outputs: int) -> str:
    rows = []
    for name, design in UNSHARED.items():
        passes = design.count(Shape(SHOWN_TOKENS, inputs, (outputs,), SHOWN_RANK))
        for t, which in [(t, which) for which, terms in zip(PASSES, passes, strict=True) for t in terms]:
            note = "hidden" if t.hidden else "in the product" if t.in_product else ""
            numbers = [f"{t.read / 1e6:.2f}", f"{t.write / 1e6:.2f}", f"{t.flops / 1e9:.2f}", str(t.launches)]
            rows.append([f"{name}: {which}", t.name.replace("|", "\\|"), *numbers, note])
    return table(["design", "term", "MB read", "MB written", "GFLOP", "launches", ""], rows)


def model_section(model: str, layer: Layer, card: Card) -> str:
    chain_alone, chain_shared = (break_even(name, layer, card) for name in ("chain", "chain, shared reads"))
    return f"""## {model} on {card.name}

Modelled overhead over the frozen products, the seven linears of a decoder layer, forward and backward:

{overhead_table(layer, card)}
LoRAFusion's Triton products are taken at cuBLAS's speed. At {SETTING} they may fall to {chain_alone:.1%}
of it before chain is faster, to {chain_shared:.1%} before chain with shared reads is.

The same at {SETTING}; the frozen products take {frozen_ms(layer, SHOWN_TOKENS, card):.2f} ms:

{layer_table(layer, card)}"""


def report(card: Card) -> str:
    inputs, outputs = SHOWN_LINEARS[0]
    brackets = "in brackets what of both is hidden"
    one_linear = f"## Bytes of one linear\n\nModelled MB forward / backward, {SETTING}; {brackets}.\n\n{bytes_table()}"
    terms = f"## Every term\n\nModelled, {inputs} → {outputs}, {SETTING}.\n\n{term_table(inputs, outputs)}"
    models = [model_section(model, layer, card) for model, layer in MODELS.items()]
    return "\n".join([INTRODUCTION, card_table(card), one_linear, *models, DIFFERENCES, terms])


def write_csv(path: str) -> None:
    """One row a term, for all models, tokens, ranks, designs and linears."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f.name for f in fields(Term)]
        writer.writerow(["model", "tokens", "rank", "design", "linears", "pass", *names])
        for setting in itertools.product(MODELS, TOKENS, RANKS, DESIGNS):
            model, tokens, rank, design = setting
            for linears, shape in shapes(DESIGNS[design], MODELS[model], tokens, rank):
                for name, terms in zip(PASSES, DESIGNS[design].count(shape), strict=True):
                    writer.writerows([*setting, linears, name, *(getattr(t, n) for n in names)] for t in terms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--bandwidth", type=float, help="copy bandwidth in TB/s, instead of the card's")
    parser.add_argument("--tflops", type=float, help="speed of a large bf16 product in TFLOP/s, instead of the card's")
    parser.add_argument("--csv", metavar="FILE", help="also write every term of every setting")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    if arguments.bandwidth or arguments.tflops:
        bandwidth, tflops = arguments.bandwidth or card.bandwidth, arguments.tflops or card.tflops
        card = Card(f"{card.name} (set by hand)", bandwidth, tflops, "given on the command line")
    if arguments.csv:
        write_csv(arguments.csv)
    print(report(card), end="")


if __name__ == "__main__":
    main()
