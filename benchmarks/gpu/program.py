"""The sections in their order, what ends the program, and its exit code.

Exit codes: 0, all of it was measured; 1, something was wrong (then nothing more was timed) or broke; 2, there is
nothing to measure on.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, correctness, environment, kernel_times, linears, reallocation, step, table, writeup
from benchmarks.gpu.bench import ROOT, SEED, Bench, Wrong
from benchmarks.gpu.timing import Budget

__all__ = ["SECTIONS", "main"]

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": environment.run,
    "correctness": correctness.run,
    "ceilings": ceilings.run,
    "kernels": kernel_times.run,
    "linears": linears.run,
    "step": step.run,
    "reallocation": reallocation.run,
}
ALWAYS = ("environment", "correctness")
# Seconds for all sections together, however much of it one of them is allowed.
TOTAL = 520


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description="Correctness, then speed and memory, on a GPU, in under 9 minutes. Results: benchmarks/results/.",
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--skip-correctness", action="store_true", help="time what nobody has tested; the results say so"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to find bugs of this program, also on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--tests", type=Path, default=Path("tests/kernels"), help="what the correctness section runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; the exit code."""
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. On a CPU, `--tiny --device cpu` tries this program out.", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.tiny:
        print("Timings of a CPU would say nothing about the kernels: pass --tiny with --device cpu.", file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.manual_seed(SEED)
    bench = Bench(torch.device(options.device), options.tiny, options.tests)
    chosen = [name for name in SECTIONS if name in ALWAYS or not options.only or name in options.only]
    out = options.out or default_folder(bench, chosen)
    bench.results["command"] = command(options)
    bench.results["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if not bench.cuda:
        bench.say("CPU and tiny sizes: this tries the program out, its timings mean nothing.")
    try:
        for name in chosen:
            section(bench, name, options.skip_correctness, TOTAL - (time.monotonic() - start))
            writeup.unfinished(bench, out, f"running, or killed after section {name}")
    except Wrong as wrong:
        bench.say(f"\nSTOPPED: {wrong}")
        writeup.unfinished(bench, out, f"stopped: {wrong}")
        bench.say(f"What was found before is in {shown(out / writeup.UNFINISHED)}.")
        return 1
    bench.results["failed"] = bench.failed
    bench.results["seconds"] = round(time.monotonic() - start, 1)
    bench.say("\nwrite-up")
    for path in writeup.finished(bench, out):
        bench.say(f"  {shown(path)}")
    bench.say("\n" + table.summary(bench.results))
    for line in bench.failed:
        bench.say(f"FAILED: {line}")
    bench.say(f"{time.monotonic() - start:.0f} s in all")
    return 1 if bench.failed else 0


def command(options: argparse.Namespace) -> str:
    """How to run the same again; without the folder of the results, which says nothing about them."""
    words = ["python3 -m benchmarks.gpu"]
    words += ["--only", *options.only] if options.only else []
    words += ["--skip-correctness"] if options.skip_correctness else []
    words += ["--tiny"] if options.tiny else []
    words += ["--device", options.device] if options.device != "cuda" else []
    return " ".join(words)


def section(bench: Bench, name: str, skip_correctness: bool, left: float) -> None:
    """Run one section within its time and the seconds left; what breaks is noted, so that the others still run.

    Raises:
        Wrong: a result is.
    """
    bench.say(f"\n{name}")
    if name == "correctness" and skip_correctness:
        bench.results[name] = "skipped"
        bench.say("  skipped: nobody knows whether what follows is right")
        return
    if left <= 0:
        bench.say("  left out: no time left")
        bench.failed.append(f"{name}: left out, no time left")
        return
    bench.budget = Budget(min(bench.sizes.seconds[name], left))
    try:
        bench.results[name] = SECTIONS[name](bench)
    except Wrong:
        raise
    except Exception as error:
        # Nothing may be timed on the word of tests that could not be run.
        if name == "correctness":
            raise Wrong(f"the kernel tests could not be run: {type(error).__name__}: {error}") from error
        traceback.print_exc()
        bench.failed.append(f"{name}: {type(error).__name__}: {error}")
        bench.clock.release()
    if bench.cuda:
        # Read while the card is still warm: a card that throttles shows here.
        bench.results.setdefault("card_after", {})[name] = environment.nvidia_smi()
    bench.say(f"  ({name}: {bench.budget.spent:.0f} of {bench.budget.seconds:.0f} s)")


def default_folder(bench: Bench, chosen: list[str]) -> Path:
    """One folder a device; a run of some sections has one of its own, so that it replaces no full one."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in bench.device_name.lower()).split())
    parts = [slug, *(["tiny"] if bench.tiny else [])]
    if len(chosen) < len(SECTIONS):
        parts += ["only", *(name for name in chosen if name not in ALWAYS)]
    return ROOT / "benchmarks" / "results" / "-".join(parts)


def shown(path: Path) -> Path:
    """Relative to the repository where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
