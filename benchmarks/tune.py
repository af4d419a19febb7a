"""Tunes the kernels' tiles on the GPU at hand, and prints the row of ``l1ra_kernels.configs.TILES`` to paste.

For each kernel and rank tile, every tile of a grid takes the place of the table's entry, and the real launcher runs
with it. A tile that can't be launched, or whose result differs from that of the present one, is named and left out; the
others are timed in turn, with cold caches. The present tile stays unless another one is clearly faster. Compiling takes
most of the time: about a minute for a kernel and rank tile.

    python -m benchmarks.tune                                            # everything, for 16-bit numbers
    python -m benchmarks.tune --kernel shrink expand --rank-tile 16 32 --in-features 2048 --out-features 8192
    python -m benchmarks.tune --dtype fp32
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run               # without a GPU: tiny sizes, times nothing
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.statistics import ratios, spread
from benchmarks.common.tables import spread_text
from benchmarks.gpu.bench import Bench, WrongResult
from benchmarks.gpu.kernels import Operands, operands, single
from benchmarks.gpu.sizes import Shape
from benchmarks.gpu.timing import Budget, Work, interleave
from benchmarks.layer import TypedBench
from l1ra_kernels import choice, configs
from l1ra_kernels.configs import Tile

__all__ = ["grid", "main", "row", "tune", "using_tile"]

# tf32 has no table of its own: it runs with the tiles of float32.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Relative difference from the present tile's result: sums are taken in another order, and rounded.
BOUNDS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5, "tf32": 2e-3}
ROUNDS, SHOWN = 20, 5
LARGE, TINY = (8192, 4096, 4096), (40, 72, 80)


def _shrink(bench: Bench, o: Operands, precision: str) -> tuple[Tensor, ...]:
    return (single(bench, "shrink")(o.x, (o.a,), (o.gate,), precision=precision)[0],)


def _expand(bench: Bench, o: Operands, precision: str) -> tuple[Tensor, ...]:
    parts, dtype = o.h.float()[None], o.y.dtype
    return tuple(single(bench, "expand")(parts, (o.gate,), (o.b,), (2.0,), dtype=dtype, precision=precision)[0])


def _output_backward(bench: Bench, o: Operands, precision: str) -> tuple[Tensor, ...]:
    return single(bench, "output_backward")((o.dy,), o.h, (o.gate,), (o.b,), precision=precision)[:2]


def _input_backward(bench: Bench, o: Operands, precision: str) -> tuple[Tensor, ...]:
    return single(bench, "input_backward")(o.x, o.h, (o.a,), (o.gate,), precision=precision)


KERNELS: dict[str, Callable[[Bench, Operands, str], tuple[Tensor, ...]]] = {
    "shrink": _shrink,
    "expand": _expand,
    "output_backward": _output_backward,
    "input_backward": _input_backward,
}
# Tokens, features, warps, stages.
GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "shrink": ((32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4)),
    "expand": ((32, 64, 128), (64, 128, 256), (4, 8), (1, 2, 3)),
    "output_backward": ((16, 32, 64), (64, 128, 256, 512), (4, 8), (2, 3, 4)),
    "input_backward": ((16, 32, 64), (64, 128, 256, 512), (4, 8), (2, 3, 4)),
}
TINY_GRID = ((16, 32), (32,), (4,), (2,))


def table(dtype: torch.dtype, device: torch.device) -> dict[str, dict[int, Tile]]:
    """The table that the launchers read on ``device``."""
    half, single = configs.TILES.get(configs.architecture(device), (configs.HALF, configs.SINGLE))
    return half if dtype.itemsize == 2 else single


@contextmanager
def using_tile(kernel: str, width: int, tile: Tile, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the block, the launcher of ``kernel`` takes ``tile`` for the rank tile ``width``."""
    entries = table(dtype, device)[kernel]
    before, entries[width] = entries[width], tile
    try:
        yield
    finally:
        entries[width] = before


def grid(kernel: str, present: Tile, tiny: bool) -> list[Tile]:
    """The present tile, and all others to try."""
    sizes = itertools.product(*(TINY_GRID if tiny else GRIDS[kernel]))
    tiles = [Tile(*numbers, tall=present.tall, blocks=present.blocks) for numbers in sizes]
    return list(dict.fromkeys([present, *tiles]))


def show(tile: Tile) -> str:
    numbers = [tile.tokens, tile.features, tile.warps, tile.stages]
    others = [
        f"{name}={getattr(tile, name)}" for name in ("tall", "blocks") if getattr(tile, name) != getattr(Tile, name)
    ]
    return f"Tile({', '.join([*map(str, numbers), *others])})"


class Candidate:
    """A kernel at one rank tile, run with any tile."""

    def __init__(self, bench: Bench, kernel: str, shape: Shape, dtype: str) -> None:
        self.bench, self.kernel, self.width, self.dtype = bench, kernel, shape.rank, dtype
        self.operands = operands(bench, shape)
        self.present = table(bench.dtype, bench.device)[kernel][self.width]

    def run(self, tile: Tile) -> tuple[Tensor, ...]:
        precision = "tf32" if self.dtype == "tf32" else "ieee"
        with using_tile(self.kernel, self.width, tile, self.bench.dtype, self.bench.device):
            return KERNELS[self.kernel](self.bench, self.operands, precision)

    def result(self, tile: Tile) -> list[Tensor]:
        """The result in float64, partial sums added up. Memory that was not written is NaN."""
        with _poisoned():
            found = self.run(tile)
        return [t.double().sum(0) if t.dim() == 3 else t.double() for t in found]

    def right(self, among: Iterable[Tile]) -> tuple[list[Tile], dict[Tile, str]]:
        """The tiles that can be launched and give the present one's result; the others, with their faults.

        Raises:
            WrongResult: the present tile's own result is not finite.
        """
        expected = self.result(self.present)
        if not all(t.isfinite().all() for t in expected):
            raise WrongResult(
                f"{self.kernel}, rank tile {self.width}: {show(self.present)}, now in use, has no finite result."
            )
        right, wrong = [], {}
        for tile in among:
            try:
                found = self.result(tile)
            except Exception as error:  # not enough shared memory or registers, or the compiler gives up
                if self.bench.cuda:
                    torch.cuda.synchronize()  # raises again where the device is lost: then nothing more can be tried
                wrong[tile] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            error = max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
            if error <= BOUNDS[self.dtype] and all(t.isfinite().all() for t in found):
                right.append(tile)
            else:
                wrong[tile] = f"its result differs by {error:.1e}"
        return right, wrong


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory holds NaN: what a launch leaves unwritten can't be an earlier one's right result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def best(times: dict[Tile, list[float]], present: Tile) -> Tile:
    """The fastest tile, if at least 80 % of its rounds beat the present one's; else the present one."""
    fastest = min(times, key=lambda tile: spread(times[tile])["median"])
    return fastest if ratios(times[fastest], times[present])["p80"] < 0 else present


def tune(bench: Bench, kernel: str, shape: Shape, dtype: str, rounds: int) -> Tile:
    """Find the tile for ``kernel`` at the rank tile ``shape.rank``, and print why; a tiny run times nothing."""
    candidate = Candidate(bench, kernel, shape, dtype)
    present = candidate.present
    tiles, wrong = candidate.right(grid(kernel, present, bench.tiny))
    bench.say(f"{kernel}, rank tile {shape.rank}: {len(tiles)} tiles are right, {len(wrong)} left out")
    for tile, reason in wrong.items():
        bench.say(f"  left out: {show(tile)}: {reason}")
    if bench.tiny:
        return present
    works = {show(tile): Work({"kernel": lambda tile=tile: candidate.run(tile)}) for tile in tiles}
    samples = interleave(bench.clock, works, rounds, Budget(math.inf))
    times = {tile: [s.total for s in samples[show(tile)]] for tile in tiles}
    chosen = best(times, present)
    ordered = sorted(times, key=lambda tile: spread(times[tile])["median"])
    for tile in dict.fromkeys([*ordered[:SHOWN], present]):
        ms, over = spread([1e3 * time for time in times[tile]]), ratios(times[tile], times[present])
        marks = [mark for mark, is_it in (("present", tile == present), ("taken", tile == chosen)) if is_it]
        bench.say(f"  {show(tile):26s} {spread_text(ms, '.1f')} us  {spread_text(over, '+.1f')} %  {', '.join(marks)}")
    bench.clock.release()
    return chosen


def row(device: torch.device, dtype: torch.dtype, tuned: dict[tuple[str, int], Tile]) -> str:
    """The row of ``configs.TILES``: the table in use with the tuned entries in it, and the other dtypes' as it is."""
    name = configs.architecture(device)
    half, single = configs.TILES.get(name, (configs.HALF, configs.SINGLE))
    mine = half if dtype.itemsize == 2 else single
    new = {k: {width: tuned.get((k, width), tile) for width, tile in tiles.items()} for k, tiles in mine.items()}
    halves = (new, single) if mine is half else (half, new)
    return f'    "{name}": (\n' + "".join(f"        {_literal(t)},\n" for t in halves) + "    ),\n"


def _literal(tiles: dict[str, dict[int, Tile]]) -> str:
    for name in ("HALF", "SINGLE"):
        if tiles == getattr(configs, name):
            return name
    lines = ["{"]
    for kernel, entries in tiles.items():
        lines += [f'            "{kernel}": {{']
        lines += [f"                {width}: {show(tile)}," for width, tile in entries.items()]
        lines += ["            },"]
    return "\n".join([*lines, "        }"])


def obstacle(dry_run: bool) -> str:
    """Why nothing can be tuned here, "" if it can."""
    if dry_run:
        if choice.interpreting():
            return ""
        return "A dry run needs Triton's interpreter: TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run"
    if not torch.cuda.is_available():
        return "There is no GPU to tune for. To try the program without one: TRITON_INTERPRET=1 and --dry-run."
    if choice.interpreting():
        return "TRITON_INTERPRET is set: the interpreter's times say nothing about a GPU. Unset it."
    return choice.obstacle(torch.device("cuda"))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    p.add_argument("--rank-tile", nargs="+", type=int, choices=configs.RANK_TILES, default=list(configs.RANK_TILES))
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="bf16 and fp16 share a table, fp32 and tf32 too")
    p.add_argument("--tokens", type=int, help=f"default {LARGE[0]}")
    p.add_argument("--in-features", type=int, help=f"of shrink and input_backward, default {LARGE[1]}")
    p.add_argument("--out-features", type=int, help=f"of expand and output_backward, default {LARGE[2]}")
    p.add_argument("--rounds", type=int, default=ROUNDS, help="at least 3")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--dry-run", action="store_true", help="in Triton's interpreter: a small grid at tiny sizes, no times"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    reason = obstacle(arguments.dry_run)
    if reason:
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    # Products of raw bf16 are wrong in the interpreter.
    dtype = "fp16" if arguments.dry_run and arguments.dtype == "bf16" else arguments.dtype
    bench = TypedBench(device, arguments.dry_run, seed=arguments.seed, products=DTYPES[dtype])
    torch.manual_seed(bench.seed)
    given: tuple[Any, ...] = (arguments.tokens, arguments.in_features, arguments.out_features)
    sizes = [g or usual for g, usual in zip(given, TINY if arguments.dry_run else LARGE, strict=True)]
    bench.say(f"{bench.device_name}, {configs.architecture(device)}, {dtype}, {Shape(*sizes, 0)}".replace(" r=0", ""))
    tuned = {}
    try:
        for kernel, width in itertools.product(arguments.kernel, arguments.rank_tile):
            tuned[kernel, width] = tune(bench, kernel, Shape(*sizes, width), dtype, arguments.rounds)
    except WrongResult as wrong:
        print(wrong, file=sys.stderr)
        return 1
    if arguments.dry_run:
        bench.say("A dry run: nothing was timed, and the row holds the tiles that are there already.")
    print(row(device, bench.dtype, tuned), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
