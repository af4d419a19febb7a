"""Registers, spills and instructions of every compiled kernel, on a machine without a GPU.

    python -m benchmarks.compiled [--arch sm_80 ...] [--only shrink ...] [--csv FILE]

The real launchers are called with CPU tensors of real shapes, and each launch is compiled instead of launched: with the
specialisations that the same tensors would bring about on a GPU. One row for each kernel and configuration: registers,
spills, stack, shared memory and its limit, tensor-core instructions, async copies.

The file keeps the rows of other versions of triton, and those of kernels and architectures that --only and --arch leave
out; the others are replaced.

A second run takes the kernels from triton's cache, .cache/triton unless TRITON_CACHE_DIR says where.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.every_launch import CALLS, RAGGED, SHORT, Problem, call, problems
from l1ra_kernels import configs
from l1ra_kernels.launch import redirected

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Architecture(NamedTuple):
    """A target of the compiler and what one block may take of it."""

    target: GPUTarget
    shared: int  # bytes
    tiles: str  # its name in configs.TILES


def _nvidia(capability: int, shared: int) -> Architecture:
    return Architecture(GPUTarget("cuda", capability, 32), shared * 1024, f"sm_{capability}")


ARCHITECTURES = {
    "sm_80": _nvidia(80, 163),
    "sm_86": _nvidia(86, 99),
    "sm_89": _nvidia(89, 99),
    "sm_90": _nvidia(90, 227),
    "sm_100": _nvidia(100, 227),
    "sm_120": _nvidia(120, 99),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * 1024, "default"),
}
USUAL = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_MEMORY = 512  # columns of sm_100


class _Driver:
    """Stands in for triton's driver: says which GPU it is, and nothing else."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # kernels are cached by device: one for each target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def set_environment() -> None:
    """Triton's settings, where none were made."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is anyway; some versions warn where it isn't said


class Launch(NamedTuple):
    """A compiled kernel and the constants that it was launched with."""

    kernel: Any  # triton's JITFunction
    compiled: Any
    meta: dict[str, Any]


@contextmanager
def compiling_for(name: str) -> Iterator[list[Launch]]:
    """Within the block, launches are compiled for an architecture, and gathered in the list.

    Nothing can be launched afterwards: triton's driver is not put back.
    """
    set_environment()
    launches: list[Launch] = []

    def instead(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launches.append(Launch(kernel, kernel.warmup(*args, grid=grid, **meta), meta))

    architecture = ARCHITECTURES[name]
    driver.set_active(_Driver(architecture.target))
    with redirected(instead), patch.object(configs, "architecture", lambda device: architecture.tiles):
        yield launches


@dataclass
class Resources:
    """The resources of a compiled kernel; on AMD, registers are vector registers and tensor cores matrix cores."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int  # bytes a thread
    shared: int  # bytes
    tensor_memory: int  # columns
    tensor_cores: str  # instruction and how often it stands in the code, the same below
    async_copies: str
    instructions: int


def resources(compiled: Any) -> Resources:
    """Read from the machine code."""
    return _read_amd(compiled) if "amdgcn" in compiled.asm else _read_nvidia(compiled)


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, for NVIDIA GPUs."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _tool(compiled, "cuobjdump", "-res-usage")).groups()
    return int(registers), int(stack)


def _tool(compiled: Any, *command: str) -> str:
    """What one of triton's tools says of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / command[0], *command[1:], file.name], capture_output=True, text=True).stdout


def _read_nvidia(compiled: Any) -> Resources:
    registers, stack = registers_and_stack(compiled)
    code = _tool(compiled, "nvdisasm", "-c")
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code)
    return Resources(
        registers,
        lines.count("STL"),
        lines.count("LDL"),
        stack,
        compiled.metadata.shared,  # all of it: triton asks for no static part
        getattr(compiled.metadata, "tmem_size", None) or 0,
        _tally(line for line in lines if line.endswith("MMA")),
        _tally(line for line in lines if line in ("LDGSTS", "UTMALDG", "UBLKCP")),
        len(lines),
    )


def _read_amd(compiled: Any) -> Resources:
    code = compiled.asm["amdgcn"]
    lines = re.findall(r"^\t([a-z]\w+)", code, re.MULTILINE)
    return Resources(
        int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        sum(line.startswith("scratch_store") for line in lines),
        sum(line.startswith("scratch_load") for line in lines),
        int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        compiled.metadata.shared,
        0,
        _tally(line for line in lines if "mfma" in line),
        _tally(line for line in lines if "load" in line and "lds" in line),
        len(lines),
    )


def _tally(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return " ".join(f"{name}:{counts[name]}" for name in sorted(counts))


COLUMNS = [
    *("kernel", "architecture", "products", "adapters", "input", "rank_tile", "sharing", "dropout", "flags", "shape"),
    *("tokens", "features", "warps", "stages", *(f.name for f in fields(Resources)), "shared_limit", "triton", "error"),
]


def row(name: str, problem: Problem) -> dict[str, Any]:
    """One line of the table; ``error`` says why there is no kernel."""
    kind = problem.kind
    known = {
        "kernel": problem.kernel,
        "architecture": name,
        "products": kind.name,
        "adapters": SHORT[kind.adapters],
        "input": SHORT[kind.input],
        "rank_tile": problem.width,
        "sharing": problem.sharing,
        "dropout": problem.dropout,
        "flags": problem.flag,
        "shape": "ragged" if problem.shape == RAGGED else "regular",
        "shared_limit": ARCHITECTURES[name].shared,
        "triton": triton.__version__,
    }
    with compiling_for(name) as launches:
        try:
            call(problem)
        except Exception as error:  # of any type; the next kernel may still compile
            return {**known, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    (launch,) = launches
    meta = launch.meta
    tile = {"tokens": meta.get("BM", ""), "features": meta.get("BN", meta.get("BK", meta.get("BLOCK", "")))}
    options = launch.compiled.metadata
    values = dict(zip(COLUMNS[14:], astuple(resources(launch.compiled)), strict=False))
    return {**known, **tile, "warps": options.num_warps, "stages": options.num_stages, **values}


def faults(row: dict[str, Any]) -> list[str]:
    """The faults of a line of the table, in words."""
    if row.get("error"):
        return [row["error"]]
    found = []
    if row["spill_stores"] or row["spill_loads"]:
        found.append(f"{row['spill_stores']} spilling stores, {row['spill_loads']} loads")
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, {row['shared_limit']} are the limit")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{row['tensor_memory']} columns of tensor memory, {TENSOR_MEMORY} are the limit")
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=USUAL, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CALLS, default=list(CALLS), metavar="KERNEL", help="these kernels")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    return parser.parse_args()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a table; only rows of the same triton, architecture and kernel give way."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            replaced = {_place(row) for row in rows}
            kept = [row for row in csv.DictReader(file) if _place(row) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=_order))


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["triton"], row["architecture"], row["kernel"]


def _order(row: dict[str, Any]) -> tuple[list[int], int, int]:
    version = [int(part) for part in re.findall(r"\d+", row["triton"])]
    return version, list(ARCHITECTURES).index(row["architecture"]), list(CALLS).index(row["kernel"])


def main() -> int:
    arguments = _arguments()
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: there is nothing to compile. Unset it.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for name in arguments.arch:
        for problem in problems():
            if problem.kernel not in arguments.only:
                continue
            rows.append(row(name, problem))
            shown = {k: v for k, v in rows[-1].items() if k not in ("triton", "shared_limit") and v not in ("", 0, 0.0)}
            print(" ".join(f"{k}={v}" if k in COLUMNS[10:] else str(v) for k, v in shown.items()), flush=True)
            for fault in faults(rows[-1]):
                print("    !", fault, flush=True)
    if arguments.csv:
        write(arguments.csv, rows)
    wrong = sum(bool(faults(row)) for row in rows)
    print(f"{len(rows)} kernels with triton {triton.__version__}, {wrong} with a fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
