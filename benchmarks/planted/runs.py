"""Runs and their records: settings, results, versions and hardware."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.environment import git_commit, processor_name, versions
from benchmarks.common.files import ROOT
from benchmarks.common.records import RecordStore
from benchmarks.planted.cases import CASES
from benchmarks.planted.training import DRIVEN, Result, run

__all__ = ["Job", "load", "one_thread", "perform", "store"]

# A record of other ones is not the run that is asked for.
ASKED = ("case", "method", "label", "seed", "steps", "overrides", "problem")


@dataclass(frozen=True)
class Job:
    """A run that is asked for; ``label`` names its row in the tables, the method unless settings are overridden."""

    case: str
    method: str
    label: str
    seed: int
    steps: int
    overrides: dict[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """The fields that identify the run, in plain values, as they are read back from a file."""
        return json.loads(json.dumps({**asdict(self), "problem": CASES[self.case].settings()}))


def store(out: Path) -> RecordStore:
    """The records in ``out``: a file for each case."""
    return RecordStore(out, ("case", "label", "seed"))


def one_thread() -> None:
    """Initialise a worker process."""
    torch.set_num_threads(1)


def perform(job: Job, out: Path) -> dict[str, Any]:
    """Run it and write its record, which is returned."""
    # Before the run, while the files are those that were imported.
    where = surroundings()
    overrides = job.overrides if job.method in DRIVEN else {}
    result = run(job.method, job.seed, job.steps, job.case, **overrides)
    record = {**job.asked(), **outcome(result), **where}
    store(out).add(record)
    return record


def load(job: Job, out: Path) -> dict[str, Any] | None:
    """The record of the same run, if it is there already."""
    record = store(out).get(job.case, job.label, job.seed)
    if record is None:
        return None
    asked = job.asked()
    return record if {key: record.get(key) for key in ASKED} == {key: asked[key] for key in ASKED} else None


def outcome(result: Result) -> dict[str, Any]:
    """The fields of a result, and its properties."""
    # Where only planted layers have an adapter there is nothing to find.
    spread = len(result.ranks) == result.layers
    return {
        **asdict(result),
        "planted_share": result.planted_share if result.ranks else None,
        "placeable": result.placeable if spread else None,
        "placed": result.placed if spread else None,
        "coverage": result.coverage if spread else None,
    }


@functools.cache
def surroundings() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "versions": versions("torch", "transformers"),
        "hardware": {"processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "commit": git_commit(),
        "sources": sources(),
    }


def sources() -> str:
    """A fingerprint of the method's code: two records with different ones may come from different rules."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "l1ra").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
