"""Runs test files with pytest in several processes, and collects the outcome of each test, also of a run cut short.

pytest-xdist may be missing. Besides, a process whose GPU context a kernel has broken is replaced here by a new one,
which goes on with the next test.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.files import ROOT
from benchmarks.gpu import processes
from benchmarks.gpu.recorder import POISONED, read

__all__ = ["Request", "run"]

MOST_FAILURES = 40
RESTARTS = 20
TAIL = 40  # lines of a process that died
FINE = (0, 1, 5)  # exit codes of pytest: passed, failed, nothing (left) to run
PAUSE = 0.2


@dataclass
class Request:
    """The tests to run.

    Attributes:
        seconds: after which all processes are killed.
        few: how many tests of each file, 0 for all.
    """

    paths: Sequence[str]
    seconds: float
    folder: Path
    device: str
    workers: int = 1
    few: int = 0
    arguments: Sequence[str] = ()

    @property
    def there(self) -> list[str]:
        return [path for path in self.paths if (ROOT / path).exists()]

    @property
    def shown(self) -> str:
        words = ["python3 -m pytest", *self.arguments, *self.paths]
        return " ".join(words) + (f"  (the first {self.few} of each file)" if self.few else "")


@dataclass
class Shard:
    """One pytest process after the other, and their common record."""

    request: Request
    number: int
    restarts: int = -1
    lines: list[dict] = field(default_factory=list)
    died: dict[str, str] = field(default_factory=dict)  # test -> how its process ended

    def __post_init__(self) -> None:
        stem = f"{self.request.paths[0].replace('/', '-')}-{self.number}"
        self.record = self.request.folder / f"{stem}.jsonl"
        self.printed = self.request.folder / f"{stem}.txt"
        self.begin()

    def begin(self) -> None:
        self.restarts += 1
        request = self.request
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder"]
        # Also files from elsewhere are run by this repository's settings; they have names only under a common root.
        root = os.path.commonpath([ROOT, *(ROOT / path for path in request.there)])
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", root, "--continue-on-collection-errors"]
        command += [f"--maxfail={MOST_FAILURES}"]
        command += ["--tb=short", "-o", f"faulthandler_timeout={max(5, int(request.seconds / 2))}"]
        command += [f"--record={self.record}", f"--shard={self.number}/{request.workers}", f"--few={request.few}"]
        with self.printed.open("w") as output:
            self.process = processes.start([*command, *request.arguments, *request.there], output, request.device)

    def look(self) -> None:
        self.lines = read(self.record)

    def running(self) -> str | None:
        """The test that has begun and not ended."""
        open_tests = [line for line in self.lines if line["event"] in ("start", "end")]
        if open_tests and open_tests[-1]["event"] == "start" and open_tests[-1]["test"] not in self.died:
            return open_tests[-1]["test"]
        return None

    def alive(self) -> bool:
        """Whether it still runs; a process that died is replaced, if it got anywhere."""
        # In this order: what a process writes before it ends is read after it was seen to have ended.
        code = self.process.poll()
        self.look()
        if code is None:
            return True
        test = self.running()
        if test is not None:
            self.died[test] = f"its process ended with exit code {code}:\n{self.tail()}"
        if code in FINE or self.restarts >= RESTARTS:
            return False
        if code != POISONED and test is None:
            return False
        self.begin()
        return True

    def tail(self) -> str:
        lines = self.printed.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL:])


def run(request: Request, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the tests; print and save outcomes meanwhile.

    Returns:
        ``files``: file -> how many passed, failed, were skipped, or did not come to an end; ``failures``: of each
        test its name and the last lines of its traceback; ``outcome``: "passed", "failed" or "unfinished".
    """
    start = time.monotonic()
    shards = [Shard(request, i) for i in range(request.workers)] if request.there else []
    told: set[str] = set()
    saved = start
    while True:
        late = time.monotonic() - start > request.seconds
        alive = [shard for shard in shards if shard.alive()]
        if late or not alive:
            break
        tell(shards, told, say)
        if time.monotonic() - saved > 5:
            save(summary(request, shards, [], time.monotonic() - start))
            saved = time.monotonic()
        time.sleep(PAUSE)
    for shard in alive:
        processes.kill(shard.process)
        shard.look()
    hanging = [test for shard in alive if (test := shard.running())]
    found = summary(request, shards, hanging, time.monotonic() - start)
    tell(shards, told, say)
    for shard in shards:
        if shard in alive or shard.process.returncode not in FINE or not shard.lines:
            say(f"  | the last lines of process {shard.number}, exit code {shard.process.returncode}:")
            for line in shard.tail().splitlines():
                say(f"  | {line}")
    save(found)
    return found


def tell(shards: list[Shard], told: set[str], say: Callable[[str], None]) -> None:
    for name, why in failures(shards).items():
        if name not in told:
            told.add(name)
            say(f"  FAILED {name}")
            for line in why.splitlines():
                say(f"  | {line}")


def failures(shards: list[Shard]) -> dict[str, str]:
    """Tests and files, with the reason."""
    found: dict[str, str] = {}
    for shard in shards:
        for line in shard.lines:
            if line["event"] == "broken":
                found[line["file"]] = line["why"]
            elif line["event"] == "end" and line["outcome"] == "failed":
                found[line["test"]] = line["why"]
        found |= shard.died
    return found


def summary(request: Request, shards: list[Shard], hanging: list[str], seconds: float) -> dict[str, Any]:
    outcomes: dict[str, str] = {}
    broken = failures(shards)
    for shard in shards:
        for line in shard.lines:
            if line["event"] == "collected":
                outcomes |= {test: outcomes.get(test, "unfinished") for test in line["tests"]}
    for shard in shards:
        outcomes |= {line["test"]: line["outcome"] for line in shard.lines if line["event"] == "end"}
    outcomes |= dict.fromkeys((name for name in broken if "::" in name), "failed")
    files: dict[str, dict[str, int]] = {}
    empty = dict.fromkeys(("passed", "failed", "skipped", "unfinished"), 0)
    for test, outcome in outcomes.items():
        files.setdefault(test.split("::", 1)[0], dict(empty))[outcome] += 1
    for file in (name for name in broken if "::" not in name):
        files.setdefault(file, dict(empty))["failed"] += 1
    for path in set(request.paths) - set(request.there):
        broken[path] = "there is no such file"
        files[path] = {**empty, "failed": 1}
    totals = {kind: sum(state[kind] for state in files.values()) for kind in empty}
    outcome = "failed" if broken else "passed" if totals["passed"] and not totals["unfinished"] else "unfinished"
    return {
        "command": request.shown,
        "outcome": outcome,
        **totals,
        "seconds": round(seconds, 1),
        "files": files,
        "failures": [{"test": test, "why": why} for test, why in broken.items()],
        "running when time ran out": hanging,
    }
