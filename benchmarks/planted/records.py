"""One JSON file a run: what was asked for, what came out, and on what. Written aside and renamed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.environment import commit, processor, version
from benchmarks.planted.cases import CASES
from benchmarks.planted.run import DRIVEN, Result, run

__all__ = ["Job", "load", "one_thread", "perform", "read_all"]

ROOT = Path(__file__).resolve().parents[2]
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

    def path(self, out: Path) -> Path:
        """The file of its record."""
        return out / "runs" / self.case / f"{self.label}-{self.seed}.json"

    def asked(self) -> dict[str, Any]:
        """What makes it this run, in plain values: as it is read back from a file."""
        return json.loads(json.dumps({**asdict(self), "problem": CASES[self.case].settings()}))


def one_thread() -> None:
    """For a worker, before anything runs in it; here, since a new process can't find what is in ``__main__``."""
    torch.set_num_threads(1)


def perform(job: Job, out: Path) -> dict[str, Any]:
    """Run it and write its record, which is returned."""
    # Before the run, while the files are those that were imported.
    where = surroundings()
    overrides = job.overrides if job.method in DRIVEN else {}
    result = run(job.method, job.seed, job.steps, job.case, **overrides)
    record = {**job.asked(), **outcome(result), **where}
    path = job.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.unfinished")
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return record


def load(job: Job, out: Path) -> dict[str, Any] | None:
    """The record of the same run, if it is there already."""
    path = job.path(out)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    asked = job.asked()
    return record if {key: record.get(key) for key in ASKED} == {key: asked[key] for key in ASKED} else None


def read_all(out: Path) -> list[dict[str, Any]]:
    """Every record there is."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*/*.json"))]


def outcome(result: Result) -> dict[str, Any]:
    """The figures of a result, also those that are computed from others."""
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
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers")}},
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "commit": commit(),
        "sources": sources(),
    }


def sources() -> str:
    """A fingerprint of the method's code: two records with different ones may come from different rules."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "l1ra").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
