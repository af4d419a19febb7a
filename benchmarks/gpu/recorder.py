"""A pytest plugin that writes each test's outcome as a line of JSON at once: a killed run leaves its outcomes, too.

``--record FILE``: tests that the file names already are not run again. ``--shard I/N``: every N-th test from the I-th
on. ``--few N``: the first N of each file. A process whose CUDA context is broken ends itself, with exit code
`POISONED`: later tests in it would fail for that reason alone.
"""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu.processes import poisoned

__all__ = ["POISONED", "read"]

POISONED = 70
LONGEST = 3000  # characters of a failure that are kept: the last ones say what went wrong


def read(path: Path) -> list[dict]:
    """The lines of a record. One that was cut off as its writer was killed is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def pytest_addoption(parser):
    group = parser.getgroup("recorder")
    group.addoption("--record", type=Path)
    group.addoption("--shard", default="0/1")
    group.addoption("--few", type=int, default=0)


def pytest_configure(config):
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(config.option))


class Recorder:
    def __init__(self, options) -> None:
        self.seen = {line["test"] for line in read(options.record) if line["event"] == "start"}
        self.file = options.record.open("a")
        self.shard, self.shards = map(int, options.shard.split("/"))
        self.few = options.few
        self.reports: list[pytest.TestReport] = []

    def write(self, event: str, **more) -> None:
        self.file.write(json.dumps({"event": event, **more}) + "\n")
        self.file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        counts: dict[str, int] = collections.Counter()
        chosen = []
        for item in items:
            file = item.nodeid.split("::", 1)[0]
            counts[file] += 1
            if not self.few or counts[file] <= self.few:
                chosen.append(item)
        # All of them, not the shard's alone: one shard that never gets here must not make the rest look complete.
        self.write("collected", tests=[item.nodeid for item in chosen])
        items[:] = [item for item in chosen[self.shard :: self.shards] if item.nodeid not in self.seen]

    def pytest_collectreport(self, report):
        if report.failed:
            self.write("broken", file=report.nodeid, why=report.longreprtext[-LONGEST:])

    def pytest_runtest_logstart(self, nodeid):
        self.reports.clear()
        self.write("start", test=nodeid)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)
        if report.when != "teardown":
            return
        failed = [r for r in self.reports if r.failed]
        outcome = "failed" if failed else "skipped" if any(r.skipped for r in self.reports) else "passed"
        why = failed[0].longreprtext[-LONGEST:] if failed else ""
        self.write("end", test=report.nodeid, outcome=outcome, why=why)
        if failed and poisoned():
            os._exit(POISONED)
