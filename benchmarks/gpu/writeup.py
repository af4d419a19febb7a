"""Results as files: JSON with everything, CSV for the tables, Markdown to quote, a picture where matplotlib is.

Each file is written aside and renamed, so that none is ever half there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import pictures, table

__all__ = ["FILES", "as_json", "clean", "finished", "replace"]

TABLES = ("linears.csv", "step.csv", "kernels.csv", "table.md", "pictures.png")
FILES = ("log.txt", "results.json", *TABLES)


def replace(path: Path, text: str) -> None:
    """Write a file as a whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Drop the tables of an earlier run: those of one that ends early would pass for its own."""
    for name in TABLES:
        (folder / name).unlink(missing_ok=True)


def finished(results: dict[str, Any], folder: Path, say: Callable[[str], None]) -> tuple[list[Path], list[str]]:
    """Write all tables and pictures; the paths written, and what could not be."""
    clean(folder)
    makers: dict[str, Callable[[], None]] = {
        "linears.csv": lambda: write(folder / "linears.csv", as_csv(linear_rows(results))),
        "step.csv": lambda: write(folder / "step.csv", as_csv(step_rows(results))),
        "kernels.csv": lambda: write(folder / "kernels.csv", as_csv(kernel_rows(results))),
        "table.md": lambda: write(folder / "table.md", table.markdown(results)),
        "pictures.png": lambda: picture(results, folder, say),
    }
    broken = []
    for name, make in makers.items():
        try:
            make()
        except Exception as error:  # one that can't be made must not take the others along
            say(traceback.format_exc())
            broken.append(f"{name}: {type(error).__name__}: {error}")
    return [folder / name for name in FILES if (folder / name).exists()], broken


def write(path: Path, text: str) -> None:
    if text:
        replace(path, text)


def picture(results: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    aside = folder / f".{os.getpid()}.png"
    try:
        if why := pictures.draw(results, aside):
            say(f"  no picture: {why}")
        else:
            aside.replace(folder / "pictures.png")
    finally:
        aside.unlink(missing_ok=True)


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
