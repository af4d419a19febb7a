"""Every launch of the kernels, with tensors of real shapes whose memory is never touched.

To compile or count launches. A launch that is really made computes nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from benchmarks import single_launch
from l1ra_kernels import configs, gate_step, rank_compaction
from l1ra_kernels.expand import BIAS, OUTPUT

__all__ = ["BF16", "CALLS", "RAGGED", "REGULAR", "SHORT", "Kind", "Problem", "Shape", "call", "problems"]


class Kind(NamedTuple):
    """The dtypes of a launch; ``precision`` is that of float32 products."""

    products: torch.dtype
    adapters: torch.dtype
    input: torch.dtype
    precision: str = "ieee"

    @property
    def name(self) -> str:
        return "tf32" if self.precision == "tf32" else SHORT[self.products]


SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16 = Kind(torch.bfloat16, torch.float32, torch.bfloat16)
BF16_ADAPTERS = Kind(torch.bfloat16, torch.bfloat16, torch.bfloat16)
FP32_INPUT = Kind(torch.bfloat16, torch.float32, torch.float32)  # a layer norm in front, under autocast
FP16 = Kind(torch.float16, torch.float32, torch.float16)
FP32 = Kind(torch.float32, torch.float32, torch.float32)
TF32 = Kind(torch.float32, torch.float32, torch.float32, "tf32")


class Shape(NamedTuple):
    """M, and K = N."""

    tokens: int
    features: int


REGULAR = Shape(8192, 4096)
RAGGED = Shape(8191, 4095)  # no row begins where 16 bytes do


class Problem(NamedTuple):
    """One launch: what the launchers are called with."""

    kernel: str
    kind: Kind = BF16
    width: int = 16  # rank tile
    sharing: int = 1
    dropout: float = 0.0
    flag: str = ""
    shape: Shape = REGULAR


SINGLES = [(width, 1) for width in configs.RANK_TILES]
BUNDLES = [(16, 2), (16, 3), (32, 3), (64, 2)]


def problems() -> list[Problem]:
    """Every kernel and configuration; the rare dtypes with fewer of them."""
    found = []
    for name in ("shrink", "input_backward"):
        for kind in (BF16, FP32):
            found += [Problem(name, kind, w, g, p) for w, g in SINGLES + BUNDLES for p in (0.0, 0.1)]
        found += [Problem(name, kind, w, g) for kind in (TF32, FP32_INPUT) for w, g in [*SINGLES, (32, 3)]]
        found += [Problem(name, kind, w) for kind in (FP16, BF16_ADAPTERS) for w in (16, 128)]
        found += [Problem(name, FP32_INPUT, w, dropout=0.1) for w in (16, 128)]
        found += [Problem(name, kind, w, dropout=0.1, shape=RAGGED) for kind in (BF16, FP32) for w in (16, 64)]
    found += [Problem("shrink", BF16, w, dropout=p, flag="AUGMENT") for w, _ in SINGLES for p in (0.0, 0.1)]
    found += [Problem("shrink", FP32, w, flag="AUGMENT") for w, _ in SINGLES]
    found += [Problem("input_backward", BF16, w, flag=f) for w in (16, 128) for f in ("no NEEDS_DX", "no NEEDS_DA")]
    for name, flags in (("expand", ("HAS_BIAS", "HAS_OUTPUT")), ("output_backward", ("no NEEDS_D",))):
        found += [Problem(name, kind, w, g) for kind in (BF16, FP32) for w, g in BUNDLES]
        found += [Problem(name, BF16, w, flag=flag) for w, _ in SINGLES for flag in ("", *flags)]
        found += [Problem(name, kind, w) for kind in (FP32, TF32) for w, _ in SINGLES]
        found += [Problem(name, kind, w) for kind in (FP16, BF16_ADAPTERS) for w in (16, 128)]
        found += [Problem(name, kind, w, shape=RAGGED) for kind in (BF16, FP32) for w in (16, 64)]
    for name in ("reduce_hidden", "reduce_rows"):
        found += [Problem(name, kind, w, g) for kind in (BF16, FP32) for w, g in SINGLES + BUNDLES]
    found += [Problem("reduce_hidden", flag="no NEEDS_DG"), Problem("reduce_rows", BF16_ADAPTERS)]
    found += [Problem("write_behind", BF16, w, g) for w, g in SINGLES + BUNDLES]
    found += [Problem("write_behind", kind, 128) for kind in (FP32, FP16, BF16_ADAPTERS)]
    found += [Problem("move_rows", flag=f"UNIT={unit}") for unit in (1, 2, 4, 8)]
    found += [Problem(name, FP32, flag=flag) for name in ("adam", "adaptive") for flag in ("", "HAS_SEEN")]
    return found


def call(problem: Problem, rank: int | None = None, scaling: float = 2.0) -> None:
    """Calls the launcher of a problem, which launches one kernel. ``rank``: by default all of the rank tile."""
    CALLS[problem.kernel](problem, _tensors(problem, rank), scaling)


def _tensors(problem: Problem, rank: int | None) -> SimpleNamespace:
    kind, width, sharing, (tokens, features) = problem.kind, problem.width, problem.sharing, problem.shape
    rank = width if rank is None else rank
    columns = sharing * width
    return SimpleNamespace(
        x=torch.empty(tokens, features, dtype=kind.input),
        dys=[torch.empty(tokens, features, dtype=kind.products)] * sharing,
        rows=[torch.empty(rank, features, dtype=kind.adapters) for _ in range(sharing)],
        gates=[torch.ones(rank) for _ in range(sharing)],
        bs=[torch.empty(rank, features, dtype=kind.adapters)] * sharing,
        bias=torch.empty(features, dtype=kind.products),
        h=torch.empty(tokens, columns, dtype=kind.products),
        seed=torch.zeros(1, dtype=torch.int64),
        weights=[torch.empty(features, features + columns, dtype=kind.products)] * sharing,
        wide=torch.empty(tokens, features + columns, dtype=kind.products),
        parts=torch.empty(4, tokens, columns),
        p=torch.empty(8 * sharing, tokens, width),
        d=torch.empty(8, width, sharing * features),
        da=torch.empty(8, columns, features),
        dg=torch.empty(-(-tokens // 32), columns),
    )


def _shrink(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    single_launch.shrink(
        t.x,
        t.rows,
        t.gates,
        dtype=problem.kind.products,
        dropout=problem.dropout,
        seed=t.seed if problem.dropout else None,
        augment=problem.flag == "AUGMENT",
        precision=problem.kind.precision,
    )


def _expand(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    base = {"HAS_BIAS": (BIAS, t.bias), "HAS_OUTPUT": (OUTPUT, t.dys[0])}.get(problem.flag)
    single_launch.expand(
        t.parts,
        t.gates,
        t.bs,
        [scaling] * problem.sharing,
        dtype=problem.kind.products,
        bases=None if base is None else [base[1]] * problem.sharing,
        kinds=None if base is None else [base[0]] * problem.sharing,
        precision=problem.kind.precision,
    )


def _output_backward(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    needs_d = problem.flag != "no NEEDS_D"
    single_launch.output_backward(t.dys, t.h, t.gates, t.bs, needs_d=needs_d, precision=problem.kind.precision)


def _input_backward(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    single_launch.input_backward(
        t.x,
        t.h,
        t.rows,
        t.gates,
        dropout=problem.dropout,
        seed=t.seed if problem.dropout else None,
        needs_dx=problem.flag != "no NEEDS_DX",
        needs_da=problem.flag != "no NEEDS_DA",
        precision=problem.kind.precision,
    )


def _reduce_hidden(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    tiles, needs_dg = [8] * problem.sharing, problem.flag != "no NEEDS_DG"
    single_launch.reduce_hidden(t.p, tiles, t.h, t.gates, [scaling] * problem.sharing, needs_dg=needs_dg)


def _reduce_rows(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    outputs, scalings = [problem.shape.features] * problem.sharing, [scaling] * problem.sharing
    sizes = {"tokens": problem.shape.tokens, "dtype": problem.kind.adapters}
    single_launch.reduce_rows(t.da, t.d, t.dg, t.gates, outputs, scalings, **sizes)


def _write_behind(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    single_launch.write_behind(t.parts, t.gates, t.bs, [scaling] * problem.sharing, t.weights, t.wide)


def _move_rows(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    unit = int(problem.flag.removeprefix("UNIT="))
    dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float32}[unit]
    ranks = len(t.gates[0])
    # Rows of float32 with an even length move by eight bytes, with an odd length by four.
    rows = torch.empty(ranks, 4096 if unit == 8 else 4095, dtype=dtype)
    rank_compaction.move_rows_many([rows] * 2, [range(ranks)] * 2, [0.0] * 2)


def _gates(problem: Problem, t: SimpleNamespace, vectors: int) -> list[torch.Tensor]:
    ranks = 100 * len(t.gates[0])
    state = [torch.ones(ranks) for _ in range(vectors)]
    seen = [torch.ones(ranks, dtype=torch.bool)] if problem.flag == "HAS_SEEN" else []
    return [*state, torch.zeros(1, dtype=torch.int64), *seen]


def _adam(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    gate_step.adam_gate_step(*_gates(problem, t, 5), lr=0.01 * scaling, l1=0.1, l2=0.0)


def _adaptive(problem: Problem, t: SimpleNamespace, scaling: float) -> None:
    gate_step.adaptive_gate_step(*_gates(problem, t, 5), lr=0.01 * scaling, l1=2.0, horizon=50.0)


CALLS: dict[str, Callable[..., None]] = {
    "shrink": _shrink,
    "expand": _expand,
    "output_backward": _output_backward,
    "input_backward": _input_backward,
    "reduce_hidden": _reduce_hidden,
    "reduce_rows": _reduce_rows,
    "write_behind": _write_behind,
    "move_rows": _move_rows,
    "adam": _adam,
    "adaptive": _adaptive,
}
