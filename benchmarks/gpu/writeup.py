"""Results as files: JSON with everything, CSV for the tables, Markdown to quote, pictures where matplotlib is.

Each file is written aside and renamed, so that none is ever half there. ``results.json`` is of a run that went through
all its sections; one that is under way or was stopped has ``unfinished.json``, and leaves the files of an earlier run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import pictures, table
from benchmarks.gpu.bench import Bench

__all__ = ["UNFINISHED", "finished", "unfinished"]

UNFINISHED = "unfinished.json"
FILES = ("results.json", "linears.csv", "step.csv", "kernels.csv", "table.md", "linears.png", "step.png", "kernels.png")


def unfinished(bench: Bench, folder: Path, why: str) -> None:
    """What there is so far, and why it is not all."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {**bench.results, "failed": bench.failed, "unfinished": why}
    aside = folder / f".{UNFINISHED}.{os.getpid()}"
    aside.write_text(as_json(results))
    aside.replace(folder / UNFINISHED)


def finished(bench: Bench, folder: Path) -> list[Path]:
    """Write all files, drop those of an earlier run that have no successor; the paths written."""
    results = bench.results
    folder.mkdir(parents=True, exist_ok=True)
    # On the same file system, for a rename can't cross into another.
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        texts = {
            "results.json": as_json(results),
            "linears.csv": as_csv(linear_rows(results)),
            "step.csv": as_csv(step_rows(results)),
            "kernels.csv": as_csv(kernel_rows(results)),
            "table.md": table.markdown(results),
        }
        for name, text in texts.items():
            if text:
                (aside / name).write_text(text)
        for name in pictures.draw(bench, aside):
            bench.say(f"  no picture: {name}")
        written = []
        for name in FILES:
            if (aside / name).exists():
                (aside / name).replace(folder / name)
                written.append(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(aside)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return written


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1, default=str) + "\n"


def as_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Columns as in the first row; empty without rows."""
    rows = list(rows)
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def spread_columns(name: str, values: dict[str, float] | None) -> dict[str, Any]:
    return {f"{name}_{key}": None if values is None else round(values[key], 5) for key in ("median", "p20", "p80")}


def linear_rows(results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for problem in results.get("linears", {}).get("tables", []):
        for row in problem["rows"]:
            yield {
                "device": table.device(results),
                "problem": problem["title"],
                **{key: problem[key] for key in ("linears", "M", "K", "N", "r")},
                "provider": row["provider"],
                "path": row["path"],
                "rounds": row["rounds"],
                **spread_columns("total_ms", row["total_ms"]),
                **spread_columns("forward_ms", row["forward_ms"]),
                **spread_columns("backward_ms", row["backward_ms"]),
                **spread_columns("host_ms", row["host_ms"]),
                **spread_columns("overhead_percent", row["overhead_percent"]),
                "peak_mib": row["peak_mib"],
            }


def step_rows(results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for model in results.get("step", {}).get("tables", []):
        for row in model["rows"]:
            yield {
                "device": table.device(results),
                **{key: model[key] for key in ("model", "batch", "sequence", "checkpointing", "rank")},
                "provider": row["provider"],
                "path": row["path"],
                "steps": row["step_ms"]["n"],
                **spread_columns("step_ms", row["step_ms"]),
                **spread_columns("tokens_per_s", row["tokens_per_s"]),
                **spread_columns("overhead_percent", row["overhead_percent"]),
                "peak_gib": row["peak_gib"],
                "trained_parameters": row["trained_parameters"],
            }


def kernel_rows(results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for row in results.get("kernels", {}).get("rows", []):
        yield {
            "device": table.device(results),
            **{key: row[key] for key in ("name", "shape", "bytes", "floor_ms")},
            **spread_columns("ms", row["ms"]),
            "gb_per_s": row["gb_per_s"],
            "copy_share": row["copy_share"],
        }
