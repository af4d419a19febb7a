"""The kernels' own tests, in a process of their own. Nothing is timed unless they pass."""

from __future__ import annotations

import collections
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.bench import ROOT, Bench, Wrong

__all__ = ["run"]

WORKERS = 8
TAIL = 60


def run(bench: Bench) -> dict[str, Any]:
    """How many tests passed, and how many were skipped.

    Raises:
        Wrong: a test failed, none ran, the folder is missing, or time ran out. What was found is in
            ``bench.results["correctness"]``.
    """
    found: dict[str, Any] = {"tests": str(bench.tests), "outcome": "failed"}
    bench.results["correctness"] = found
    path = bench.tests if bench.tests.is_absolute() else ROOT / bench.tests
    if not path.exists():
        raise Wrong(f"there are no kernel tests in {bench.tests}: nothing is timed before they pass.")
    command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    if bench.cuda and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    found["command"] = " ".join(["python3", *command, str(bench.tests)])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.monotonic()
        code, tail = stream([sys.executable, *command, f"--junitxml={report}", str(path)], bench.budget.left)
        found |= {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}
        found |= counts(report)
    if code != 0:
        found["output"] = tail
        why = f"exceeded {bench.budget.seconds:.0f} s" if code is None else f"ended with exit code {code}"
        raise Wrong(f"the kernel tests {why}: nothing is timed.")
    if not found["passed"]:
        raise Wrong("no kernel test ran, all were skipped: nothing is timed.")
    found["outcome"] = "passed"
    bench.say(f"  {found['passed']} tests passed, {found['skipped']} skipped, in {found['seconds']} s")
    return found


def stream(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command, print its output as it comes; its exit code (None: stopped for time) and the last lines."""
    # A process group of its own: pytest's workers hold the pipe open, and have to go with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(1.0, seconds), stop)
    timer.start()
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    for line in process.stdout:
        tail.append(line)
        print("  |", line, end="", flush=True)
    process.wait()
    timer.cancel()
    return (None if late.is_set() else process.returncode), "".join(tail)


def counts(report: Path) -> dict[str, int]:
    """Tests that passed and were skipped, of a JUnit file; zeros if pytest did not get as far as writing one."""
    if not report.exists():
        return {"passed": 0, "skipped": 0}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    number = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "skipped", "failures", "errors")}
    return {
        "passed": number["tests"] - number["skipped"] - number["failures"] - number["errors"],
        "skipped": number["skipped"],
    }
