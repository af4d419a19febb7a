"""Occupancy of every launch of a decoder layer's linears, on a machine without a GPU.

    python -m benchmarks.waves [--arch sm_90] [--rank 16] [--csv benchmarks/results/waves.csv]

The layers' own code runs with tensors without memory, and each launch is compiled instead of launched. For each launch:
programs; registers a thread and shared memory a block; how many blocks a multiprocessor runs at a time, as registers,
shared memory and warps allow; waves; and the busy share: of the launch's time, if each program takes as long as it has
tiles and there are as many slots as the grid was cut for.

The file keeps the rows of other versions of triton; the table that is printed has all versions side by side.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from benchmarks.common.tables import markdown_table
from benchmarks.compiled import Launch, compiling_for, registers_and_stack
from benchmarks.designs import busy_share, name_of, program_lengths
from benchmarks.roofline import MODELS
from l1ra_kernels import configs, gated_linear
from l1ra_kernels.layer import Layer

__all__ = ["SETTINGS", "STREAMING", "Limits", "markdown", "read", "rows"]

SETTINGS = (("Llama-3-8B", 8192), ("Llama-3-8B", 2048), ("Llama-3.2-1B", 8192))
PATHS = ("chain", "aug")
STREAMING = ("shrink", "expand", "output_backward", "input_backward")
PADDING = 128  # columns behind an augmented weight


class Limits(NamedTuple):
    """What a multiprocessor has, and how many of them a GPU has. A warp takes its registers from a quarter of them."""

    processors: int
    shared: int  # bytes
    warps: int = 64
    most: int = 32  # blocks
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that each block takes besides its own

    def blocks(self, registers: int, shared: int, warps: int) -> dict[str, int]:
        """How many blocks fit at a time, by resource."""
        a_warp = 32 * -(-registers // 8) * 8
        return {
            "by_registers": 4 * (self.registers // 4 // a_warp) // warps,
            "by_shared": self.shared // (shared + self.reserved),
            "by_warps": min(self.warps // warps, self.most),
        }


LIMITS = {
    "sm_80": Limits(108, 164 * 1024),
    "sm_90": Limits(132, 228 * 1024),
    "sm_100": Limits(148, 228 * 1024),
}


@contextmanager
def compiling(arch: str) -> Iterator[list[Launch]]:
    """As ``compiled.compiling_for``; launches are cut for the multiprocessors of a GPU of this architecture."""
    with compiling_for(arch) as launches, patch.object(configs, "processors", lambda device: LIMITS[arch].processors):
        yield launches


def run_group(tokens: int, inputs: int, outputs: tuple[int, ...], rank: int, path: str) -> None:
    """Forward and backward of linears that share x, on tensors without memory."""
    half, meta = {"dtype": torch.bfloat16, "device": "meta"}, {"device": "meta"}
    layers = []
    for n in outputs:
        wide = torch.empty(n, inputs + PADDING, **half)
        adapter = torch.empty(rank, inputs, **meta), torch.empty(rank, **meta), torch.empty(rank, n, **meta)
        layers.append(Layer(*adapter, 2.0, wide[:, :inputs], augmented=wide if path == "aug" else None))
    x = torch.empty(tokens, inputs, **half)
    ys, hidden = gated_linear.forward(x, layers, torch.bfloat16, 0.0, None)
    needs = [gated_linear.Needs(True, True, True)] * len(layers)
    gated_linear.backward(ys, x, hidden, layers, True, needs, 0.0, None)


def rows(arch: str, model: str, tokens: int, rank: int) -> list[dict[str, Any]]:
    """A row for each launch of a decoder layer; of path aug only those that chain has not."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in PATHS:
        setting = {"arch": arch, "model": model, "tokens": tokens, "rank": rank, "path": path}
        for group, inputs, outputs in MODELS[model]:
            with compiling(arch) as launches:
                run_group(tokens, inputs, outputs, rank, path)
                for launch in launches:
                    row = {"group": group, "kernel": name_of(launch.kernel), **_row(arch, launch)}
                    found.setdefault(tuple(row.values()), {**setting, **row, "triton": triton.__version__})
    return list(found.values())


_registers: dict[int, int] = {}  # by the identity of a compiled kernel


def _row(arch: str, launch: Launch) -> dict[str, Any]:
    kernel, compiled, _ = launch
    if id(compiled) not in _registers:
        _registers[id(compiled)], _ = registers_and_stack(compiled)
    registers = _registers[id(compiled)]
    shared, limits = compiled.metadata.shared, LIMITS[arch]
    allowed = limits.blocks(registers, shared, compiled.metadata.num_warps)
    blocks = min(allowed.values())
    lengths, cut_for = program_lengths(kernel), _tile_blocks(kernel)
    return {
        "programs": len(lengths),
        "registers": registers,
        "shared": shared,
        **allowed,
        "blocks": blocks,
        "cut_for": cut_for,
        "waves": round(len(lengths) / (blocks * limits.processors), 2),
        "busy": round(busy_share(lengths, (cut_for or blocks) * limits.processors), 3),
    }


def _tile_blocks(launch: Any) -> int | str:
    """``Tile.blocks`` of the kernel, for which its grid was cut."""
    name, meta = name_of(launch), launch.meta
    if name not in STREAMING:
        return ""
    width = meta["R"] * (meta["G"] if name in ("shrink", "input_backward") else 1)
    return configs.tile(name, width, torch.bfloat16, torch.device("cpu")).blocks


COLUMNS = [
    *("arch", "model", "tokens", "rank", "path", "group", "kernel", "programs", "registers", "shared"),
    *("by_registers", "by_shared", "by_warps", "blocks", "cut_for", "waves", "busy", "triton"),
]
SETTING = ("arch", "model", "tokens", "rank")
VALUES = ("programs", "registers", "shared", "blocks", "waves", "busy")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, new: list[dict[str, Any]]) -> None:
    """Put rows into the file in place of those of the same setting and version of triton."""
    place = ("triton", *SETTING)
    replaced = {tuple(str(row[name]) for name in place) for row in new}
    kept = [row for row in read(path) if tuple(row[name] for name in place) not in replaced] if path.exists() else []
    ordered = sorted([*kept, *new], key=lambda row: [int(part) for part in re.findall(r"\d+", row["triton"])])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each setting; where versions of triton differ, one value for each version."""
    found = [{name: str(value) for name, value in row.items()} for row in found]
    versions = list(dict.fromkeys(row["triton"] for row in found))
    text = []
    for setting in dict.fromkeys(tuple(row[name] for name in SETTING) for row in found):
        mine = [row for row in found if tuple(row[name] for name in SETTING) == setting]
        arch, model, tokens, rank = setting
        lines = []
        for launch in dict.fromkeys((row["path"], row["group"], row["kernel"]) for row in mine):
            same = [row for row in mine if (row["path"], row["group"], row["kernel"]) == launch]
            path, group, kernel = launch
            cells = [_beside([_cell(name, row) for row in same]) for name in VALUES]
            lines.append([f"{group}: {kernel}{', aug' if path == 'aug' else ''}", *cells])
        head = ["", "programs", "registers", "shared, KB", "blocks (registers, shared, warps)", "waves", "busy"]
        title = f"{model}, {tokens} tokens, rank {rank}, {arch}, triton {' / '.join(versions)}:"
        text.append(f"{title}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(text) + "\n"


def _cell(name: str, row: dict[str, str]) -> str:
    value = row[name]
    if name == "blocks":
        return f"{value} ({row['by_registers']}, {row['by_shared']}, {row['by_warps']})"
    if name == "shared":
        return f"{int(value) / 1024:.0f}"
    return f"{float(value):.0%}" if name == "busy" else value


def _beside(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=LIMITS, default="sm_90")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--csv", type=Path, help="put the rows into this file, and print all of it")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: there is nothing to compile. Unset it.", file=sys.stderr)
        return 2
    found = [row for setting in SETTINGS for row in rows(arguments.arch, *setting, arguments.rank)]
    if arguments.csv:
        write(arguments.csv, found)
        found = read(arguments.csv)
    print(markdown(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
