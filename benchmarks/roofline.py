"""Roofline: what an adapter must cost, counted for one frozen linear layer and for a decoder layer's seven.

Nothing here is timed. The terms of each design, and what they assume, are in ``benchmarks/designs.py``. Of them,

    floor    = exposed bytes / copy bandwidth + FLOPs that lengthen the frozen products / product speed
    overhead = floor / (4 · tokens · inputs · outputs / product speed), summed over the layer's seven linears

Bytes move at copy bandwidth; hidden ones are counted, but not in the floor; the arithmetic of memory-bound kernels,
gaps between launches and host time cost nothing.

    python -m benchmarks.roofline > docs/roofline.md
    python -m benchmarks.roofline --card h200
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.tables import markdown_table
from benchmarks.designs import DESIGNS, PASSES, UNSHARED, Design, Passes, Shape, Terms

__all__ = ["CARDS", "MODELS", "Card", "report"]

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

This page estimates the cost of adapters on GPUs, term by term, for this library and for others. It is made by:

    python -m benchmarks.roofline > docs/roofline.md

Everything here is **modelled, never measured**: bytes to and from GPU memory, FLOPs and launches beyond the frozen
products, counted term by term, and a floor in time that follows from them. The assumptions stand at the top of
`benchmarks/designs.py` and `benchmarks/roofline.py`. A real kernel is slower than its floor, and not every kernel by
the same factor.

*chain*, *add* and *aug* are this project's designs: the adapter's output first and the dense product added to it; added
to the output of a foreign base module; `[x | s·g·H]` times `[W | Bᵀ]`. *Shared reads*: q, k, v read x once, gate and up
too, and their dX is written once, as long as three rank tiles fit 128 (at rank 64 two do). The code runs *chain* and
*aug* with shared reads, and *add* without them.

*PEFT fp32* is PEFT's default (adapters in fp32), with and without `torch.autocast(dtype=torch.bfloat16)`; *PEFT bf16*
needs `autocast_adapter_dtype=False`.
"""

DIFFERENCES = """## Where this differs from the first estimate

The design began with a count by hand (H100, 8192 tokens, rank 16). The bytes agree within 4 % but for these:

- PEFT fp32 (first count 873/1008 MB at 4096 → 4096) was counted under autocast, where both agree. Without autocast the
  adapter's activations are fp32, and it is up to 2.4 times as much. Both are right, each for its training loop.
- LoRAFusion, backward (154 and, at 4096 → 14336, 370 MB): the first count charges more for the atomic sums of dH and
  dB. They meet in L2, so here each buffer counts once: right for a floor, and kinder than we are to our partial sums.
- aug, backward at 4096 → 1024 (109 MB): a narrow dY has few tiles of features, so D is cut into more splits of tokens
  here, to fill 132 processors, and each leaves a partial sum.
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


def card_table(card: Card) -> str:
    rows = [[c.name, f"{c.bandwidth:g}", f"{c.tflops:g}", c.source] for c in dict.fromkeys([*CARDS.values(), card])]
    return markdown_table(["card", "copy, TB/s", "bf16 product, TFLOP/s", "source"], rows)


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


def overhead_table(layer: Layer, card: Card) -> str:
    settings = list(itertools.product(TOKENS, RANKS))
    rows = ([name, *(f"{overhead(name, layer, *setting, card):.1%}" for setting in settings)] for name in DESIGNS)
    return markdown_table(["tokens, rank", *(f"{tokens}, {rank}" for tokens, rank in settings)], rows)


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
    return markdown_table(header, rows)


def term_table(inputs: int, outputs: int) -> str:
    rows = []
    for name, design in UNSHARED.items():
        passes = design.count(Shape(SHOWN_TOKENS, inputs, (outputs,), SHOWN_RANK))
        for t, which in [(t, which) for which, terms in zip(PASSES, passes, strict=True) for t in terms]:
            note = "hidden" if t.hidden else "in the product" if t.in_product else ""
            numbers = [f"{t.read / 1e6:.2f}", f"{t.write / 1e6:.2f}", f"{t.flops / 1e9:.2f}", str(t.launches)]
            rows.append([f"{name}: {which}", t.name.replace("|", "\\|"), *numbers, note])
    return markdown_table(["design", "term", "MB read", "MB written", "GFLOP", "launches", ""], rows)


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
    parts = [INTRODUCTION.rstrip(), card_table(card), one_linear, *models, DIFFERENCES.rstrip(), terms]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--bandwidth", type=float, help="copy bandwidth in TB/s, instead of the card's")
    parser.add_argument("--tflops", type=float, help="speed of a large bf16 product in TFLOP/s, instead of the card's")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    if arguments.bandwidth or arguments.tflops:
        bandwidth, tflops = arguments.bandwidth or card.bandwidth, arguments.tflops or card.tflops
        card = Card(f"{card.name} (set by hand)", bandwidth, tflops, "given on the command line")
    print(report(card), end="")


if __name__ == "__main__":
    main()
