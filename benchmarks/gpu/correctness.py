"""The kernels' own tests, and whole trainings, both by pytest. No kernel is timed whose tests have not passed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.files import ROOT
from benchmarks.gpu import pytest_runs, required_tests

__all__ = ["TRAININGS", "correctness", "trainings"]

LEAST_WORKERS, MOST_WORKERS = 8, 14
FEW = 1
TRAININGS = "tests/end_to_end/test_circumstances.py"

Say = Callable[[str], None]
Save = Callable[[dict[str, Any]], None]


def correctness(options: dict[str, Any], seconds: float, folder: Path, say: Say, save: Save) -> dict[str, Any]:
    """The tests that figures depend on, or those in ``options["tests"]``; see :func:`pytest_runs.run`."""
    return tests(options, options["tests"] or list(required_tests.ORDER), [], seconds, folder, say, save)


def trainings(options: dict[str, Any], seconds: float, folder: Path, say: Say, save: Save) -> dict[str, Any]:
    """Whole trainings under every circumstance, or a few of them in a tiny run."""
    path = options["trainings"]
    if not (ROOT / path).exists():
        say(f"  left out: there is no {path}")
        return {"outcome": "left out", "why": f"there is no {path}"}
    return tests(options, [path], [] if options["tiny"] else ["--every-circumstance"], seconds, folder, say, save)


def workers() -> int:
    """On a GPU the tests wait for the compiler, which runs on the CPU; each process takes half a GB of the GPU."""
    return max(LEAST_WORKERS, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def tests(
    options: dict[str, Any],
    paths: list[str],
    arguments: list[str],
    seconds: float,
    folder: Path,
    say: Say,
    save: Save,
) -> dict[str, Any]:
    request = pytest_runs.Request(
        paths,
        seconds,
        folder,
        options["device"],
        workers=workers() if options["device"] == "cuda" else 1,
        few=FEW if options["tiny"] else 0,
        arguments=arguments,
    )
    found = pytest_runs.run(request, say, save)
    say(
        f"  {found['outcome']}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, "
        f"{found['unfinished']} not run to an end, in {found['seconds']} s"
    )
    for test in found["running when time ran out"]:
        say(f"  running when time ran out: {test}")
    return found
