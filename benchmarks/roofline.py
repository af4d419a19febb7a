"""Roofline: what an adapter must cost, counted for one frozen linear layer and for a decoder layer's seven.

Nothing here is timed. The terms of each design, and what they assume, are in ``benchmarks/designs.py``. Of them,

    floor    = exposed bytes / copy bandwidth + FLOPs that lengthen the frozen products / product speed
    overhead = floor / (4 · tokens · inputs · outputs / product speed), summed over the layer's seven linears

Bytes move at copy bandwidth; hidden ones are counted, but not in the floor; the arithmetic of memory-bound kernels and
host time cost nothing. The estimate adds to the floor what ``Estimate`` lists.

    python -m benchmarks.roofline > docs/roofline.md
    python -m benchmarks.roofline --card h100
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.tables import markdown_table
from benchmarks.designs import BF16, DESIGNS, UNSHARED, Design, Passes, Shape, Terms

__all__ = ["CARDS", "MODELS", "Card", "Estimate", "estimate", "report"]

TOKENS, RANKS = (2048, 8192, 16384), (8, 16, 64)
SHOWN_TOKENS, SHOWN_RANK = 8192, 16
SETTING = f"{SHOWN_TOKENS} tokens, rank {SHOWN_RANK}"
SHOWN_LINEARS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
# The largest overhead, with all terms, that the kernels are meant to have on an H200 at rank 16.
BARS = {2048: 0.10, 8192: 0.07}
SHARED = tuple(name for name, design in DESIGNS.items() if design.shared)

# Assumptions; none is measured.
GAP = 2.25e-3  # ms between the end of a kernel and the beginning of the next one
WAIT = 0.8e-3  # ms of a load from memory that other loads wait for


@dataclass(frozen=True)
class Card:
    """``bandwidth`` of a copy and of ``l2`` in TB/s, ``tflops`` of a large bf16 product in TFLOP/s."""

    name: str
    bandwidth: float
    tflops: float
    l2: float
    source: str


CARDS = {
    "h200": Card("H200", 4.3, 790, 5.5, "assumption, not measured"),
    "h100": Card("H100", 3.0, 790, 5.5, "assumption, not measured"),
    "a100": Card("A100", 1.5, 260, 4.0, "assumption, not measured"),
}


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
    """The floor over the frozen products."""
    forward, backward = layer_passes(DESIGNS[name], layer, tokens, rank)
    return floor_ms(forward + backward, card) / frozen_ms(layer, tokens, card)


@dataclass(frozen=True)
class Estimate:
    """What a layer's adapters take, in ms; all terms are added, as if none of them hid behind another one.

    Attributes:
        bytes: exposed bytes at copy bandwidth.
        parts: those of them that are partial sums; they are not added again.
        longer: FLOPs that lengthen the frozen products.
        tail: bytes move the slower the fewer of the multiprocessors are busy, averaged over a kernel.
        again: operands that are read from L2 by further programs.
        waits: loads that wait for each other.
        gaps: between launches.
        credit: sums of dX that the frozen layer has and the adapted one does not.
        frozen: the frozen layer: products, its sums of dX, and gaps.
    """

    bytes: float
    parts: float
    longer: float
    tail: float
    again: float
    waits: float
    gaps: float
    credit: float
    frozen: float

    @property
    def added(self) -> float:
        return self.bytes + self.longer + self.tail + self.again + self.waits + self.gaps - self.credit

    @property
    def overhead(self) -> float:
        return self.added / self.frozen


def sums_of_dx(layer: Layer, tokens: int, card: Card) -> float:
    """Autograd adds the dX of the linears that read the same x, ms."""
    elements = sum((len(outputs) - 1) * tokens * inputs for _, inputs, outputs in layer)
    launches = sum(len(outputs) - 1 for _, _, outputs in layer)
    return 3 * BF16 * elements / card.bandwidth / 1e9 + GAP * launches


def estimate(name: str, layer: Layer, tokens: int, rank: int, card: Card) -> Estimate:
    """All terms of a design. Of competitors' kernels only bytes, FLOPs and gaps are known."""
    design = DESIGNS[name]
    forward, backward = layer_passes(design, layer, tokens, rank)
    exposed = [t for t in forward + backward if not t.hidden]
    copied = [((t.read + t.write) / card.bandwidth / 1e9, t) for t in exposed]
    sums = sums_of_dx(layer, tokens, card)
    products = 2 * sum(len(outputs) for _, _, outputs in layer)
    return Estimate(
        bytes=sum(ms for ms, _ in copied),
        parts=sum(t.parts for t in exposed) / card.bandwidth / 1e9,
        longer=sum(t.flops for t in exposed if t.in_product) / card.tflops / 1e9,
        tail=sum(ms * (1 / t.busy - 1) for ms, t in copied),
        again=sum(t.again for t in exposed) / card.l2 / 1e9,
        waits=WAIT * sum(t.waits for t in exposed),
        gaps=GAP * sum(t.launches for t in exposed),
        credit=sums if design.shared else 0.0,
        frozen=frozen_ms(layer, tokens, card) + sums + GAP * products,
    )


INTRODUCTION = """# Roofline: what an adapter must cost

This page estimates the cost of adapters on GPUs, term by term, for this library and for others. It is made by:

    python -m benchmarks.roofline > docs/roofline.md

Everything here is **modelled, never measured**. Bytes to and from GPU memory, FLOPs and launches beyond the frozen
products are counted, launch by launch; a test holds ours to the launches that the code makes. From the counts follow:

- the **floor**: exposed bytes at the speed of a copy, and longer products, over the frozen products alone;
- **all terms**: the floor, and gaps of 2.25 µs between launches. For our kernels also 0.8 µs for each load that has to
  arrive before the next one begins (in sums of parts, for each group of 4 or 8 parts), operands that further programs
  read, at the speed of L2, and bytes that move the slower the more multiprocessors are idle at a kernel's end. The
  terms are added, as if none hid behind another: the safe side. The sum is taken over the whole frozen layer, with its
  gaps and its sums of dX; layers that share x no longer need these sums, which is credited. Of competitors only bytes
  and gaps are counted, so they look better than they will be.

The constants are at the top of `benchmarks/roofline.py`, further assumptions at the top of `benchmarks/designs.py`.

*chain*, *add* and *aug* are this project's designs: the adapter's output first and the dense product added to it; added
to the output of a foreign base module; `[x | H]` times `[W | Cᵀ]`. *Shared reads*: q, k, v are computed by the same
launches, gate and up too, as long as their rank tiles fit 128 together (at rank 64 two do). The code runs *chain* with
shared reads; with *augment=True*, *aug* where N ≥ 1.5 K; and *add* without shared reads.

*PEFT fp32* is PEFT's default (adapters in fp32), with and without `torch.autocast(dtype=torch.bfloat16)`; *PEFT bf16*
needs `autocast_adapter_dtype=False`.
"""


def card_table(card: Card) -> str:
    cards = dict.fromkeys([*CARDS.values(), card])
    rows = [[c.name, f"{c.bandwidth:g}", f"{c.l2:g}", f"{c.tflops:g}", c.source] for c in cards]
    return markdown_table(["card", "copy, TB/s", "L2, TB/s", "bf16 product, TFLOP/s", "source"], rows)


def break_even(name: str, layer: Layer, card: Card) -> float:
    """Speed of LoRAFusion's products, cuBLAS's being 1, at which its layer takes as long as that of the design."""
    ours, theirs = (estimate(n, layer, SHOWN_TOKENS, SHOWN_RANK, card).overhead for n in (name, "LoRAFusion"))
    return 1 / (1 + ours - theirs)


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
    return markdown_table(["MB", *(f"{inputs} → {outputs}" for inputs, outputs in SHOWN_LINEARS)], rows)


def overhead_table(layer: Layer, card: Card, rank: int) -> str:
    rows = []
    for name in DESIGNS:
        floors = [f"{overhead(name, layer, tokens, rank, card):.1%}" for tokens in TOKENS]
        rows.append([name, *floors, *(f"{estimate(name, layer, t, rank, card).overhead:.1%}" for t in TOKENS)])
    return markdown_table(["tokens", *(f"{t}: {what}" for what in ("floor", "all terms") for t in TOKENS)], rows)


def rank_table(layer: Layer, card: Card) -> str:
    rows = [
        [name, *(f"{estimate(name, layer, t, rank, card).overhead:.1%}" for t in TOKENS for rank in RANKS)]
        for name in ("PEFT bf16", *SHARED)
    ]
    return markdown_table(["tokens, rank", *(f"{t}, {rank}" for t in TOKENS for rank in RANKS)], rows)


def estimate_table(card: Card) -> str:
    rows = []
    for model, layer in MODELS.items():
        for tokens in TOKENS:
            for name in SHARED:
                e = estimate(name, layer, tokens, SHOWN_RANK, card)
                parts = (e.bytes, e.parts, e.longer, e.tail, e.again, e.waits, e.gaps, -e.credit)
                bar = BARS.get(tokens)
                verdict = "" if bar is None else f"{bar:.0%}: {'met' if e.overhead <= bar else 'missed'}"
                label = f"{model}, {tokens}: {name.removesuffix(', shared reads')}"
                cells = [f"{part / e.frozen:.1%}" for part in parts]
                rows.append([label, f"{e.frozen:.2f}", *cells, f"**{e.overhead:.1%}**", verdict])
    terms = ("bytes", "partial sums", "longer products", "tail", "L2", "waits", "gaps", "credit")
    head = ["", "frozen, ms", *terms, "sum", "bar"]
    return markdown_table(head, rows)


def launch_table(layer: Layer, tokens: int, card: Card) -> str:
    """Each launch of chain, with what it takes."""
    rows = []
    for names, inputs, outputs in layer:
        for t in [t for terms in DESIGNS["chain"].count(Shape(tokens, inputs, outputs, SHOWN_RANK)) for t in terms]:
            if t.launches:
                ms = (t.read + t.write) / card.bandwidth / 1e9
                parts = (ms, ms * (1 / t.busy - 1), t.again / card.l2 / 1e9, t.waits * WAIT, t.launches * GAP)
                cells = [f"{part * 1e3:.1f}" for part in (*parts, sum(parts))]
                rows.append([f"{names}: {t.name}", f"{t.read / 1e6:.1f}", f"{t.write / 1e6:.1f}", *cells])
    head = ["", "MB read", "MB written", "µs: bytes", "tail", "L2", "waits", "gap", "sum"]
    return markdown_table(head, rows)


def layer_table(layer: Layer) -> str:
    rows = []
    for name, design in DESIGNS.items():
        forward, backward = layer_passes(design, layer, SHOWN_TOKENS, SHOWN_RANK)
        both = forward + backward
        gigabytes = [moved(forward) / 1e9, moved(backward) / 1e9, moved(both, hidden=True) / 1e9]
        launches = [str(sum(t.launches for t in terms)) for terms in (forward, backward)]
        rows.append(
            [name, *(f"{value:.2f}" for value in gigabytes), f"{sum(t.flops for t in both) / 1e9:.0f}", *launches]
        )
    header = ["design", "GB forward", "GB backward", "GB hidden", "GFLOP", "launches forward", "backward"]
    return markdown_table(header, rows)


def card_section(card: Card) -> str:
    tables = [f"{model}:\n\n{overhead_table(layer, card, SHOWN_RANK)}" for model, layer in MODELS.items()]
    text = f"Modelled overhead, the seven linears of a decoder layer, forward and backward, rank {SHOWN_RANK}."
    return "\n\n".join([f"## {card.name}", text, *tables])


def report(cards: list[Card]) -> str:
    first, (model, layer) = cards[0], next(iter(MODELS.items()))
    terms = f"""## Which terms cost what on {first.name}

Modelled, rank {SHOWN_RANK}, shares of the frozen layer's time; the bars are at most
{" and ".join(f"{bar:.0%} at {tokens} tokens" for tokens, bar in BARS.items())}.

{estimate_table(first)}

Partial sums are among the bytes; those that stay in L2 (50 MB) until they are read cost less.

LoRAFusion's Triton products are taken at cuBLAS's speed. They may fall to
{break_even("chain, shared reads", layer, first):.1%} of cuBLAS's speed ({model}, {SETTING}) before chain is faster, to
{break_even("augment=True, shared reads", layer, first):.1%} before `augment=True` is.

Each launch of chain with shared reads, {model}, {SETTING}, modelled:

{launch_table(layer, SHOWN_TOKENS, first)}

Other ranks, {model}, all terms:

{rank_table(layer, first)}"""
    counted = f"""## Counts

Counted, {SETTING}, {model}, seven linears:

{layer_table(layer)}

MB of one linear, forward / backward; in brackets what of both is hidden:

{bytes_table()}"""
    sections = [card_section(card) for card in cards]
    parts = [INTRODUCTION.rstrip(), card_table(first), sections[0], terms, *sections[1:], counted]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, help="one card; default: all of them")
    parser.add_argument("--bandwidth", type=float, help="copy bandwidth in TB/s, instead of the card's")
    parser.add_argument("--tflops", type=float, help="speed of a large bf16 product in TFLOP/s, instead of the card's")
    arguments = parser.parse_args()
    cards = [CARDS[arguments.card]] if arguments.card else list(CARDS.values())
    if arguments.bandwidth or arguments.tflops:
        card = cards[0]
        bandwidth, tflops = arguments.bandwidth or card.bandwidth, arguments.tflops or card.tflops
        cards = [Card(f"{card.name} (set by hand)", bandwidth, tflops, card.l2, "given on the command line")]
    print(report(cards), end="")


if __name__ == "__main__":
    main()
