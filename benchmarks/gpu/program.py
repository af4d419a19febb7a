"""The sections in their order, the most valuable first, and the program's exit code.

This process only supervises: it has the clock, the log and results.json. Each section is a process of its own, because
an illegal address in one kernel ends every later use of the GPU in its process, and because a process that hangs can be
killed; what it had written by then stays.

Exit codes: 0, all of it was measured; 1, something of ours was wrong, broke or ran out of time; 2, there is nothing to
measure on, or the options don't fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.run import USUAL_SECONDS, CannotRun, Run
from benchmarks.gpu.sizes import SECTIONS

__all__ = ["main"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description="Correctness, then speed and memory, on a GPU, in under 10 minutes. Results: benchmarks/results/.",
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--skip-correctness", action="store_true", help="time kernels without testing them; the results say so"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to find bugs of this program, also on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=USUAL_SECONDS, help="after which it ends in any case")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run that ended early, by its options")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="what the correctness section runs")
    parser.add_argument("--trainings", metavar="FILE", help="what the trainings section runs")
    parser.add_argument("--commit", metavar="TEXT", help="the commit, where there is no .git to tell it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; the exit code."""
    options = arguments(argv)
    if options.device == "cpu" and not options.tiny and not options.resume:
        print("Timings of a CPU would say nothing about the kernels: pass --tiny with --device cpu.", file=sys.stderr)
        return 2
    try:
        with Run(options) as run:
            return run.all()
    except CannotRun as reason:
        print(reason, file=sys.stderr)
        return 2
