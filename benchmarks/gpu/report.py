"""Results as files: JSON with everything, Markdown to quote, a picture if matplotlib is installed."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_text
from benchmarks.gpu import plots, tables

__all__ = ["FILES", "as_json", "clean", "finished"]

MADE_FROM_RESULTS = ("table.md", "pictures.png")
FILES = ("log.txt", "results.json", *MADE_FROM_RESULTS)


def clean(folder: Path) -> None:
    """Delete the tables of an earlier run: should this one end early, they would be taken for its own."""
    for name in MADE_FROM_RESULTS:
        (folder / name).unlink(missing_ok=True)


def finished(results: dict[str, Any], folder: Path, say: Callable[[str], None]) -> tuple[list[Path], list[str]]:
    """Write tables and pictures; the paths of all files of the run, and what could not be written."""
    clean(folder)
    makers: dict[str, Callable[[], None]] = {
        "table.md": lambda: write_text(folder / "table.md", tables.markdown(results)),
        "pictures.png": lambda: picture(results, folder, say),
    }
    broken = []
    for name, make in makers.items():
        try:
            make()
        except Exception as error:  # the other file is made nevertheless
            say(traceback.format_exc())
            broken.append(f"{name}: {type(error).__name__}: {error}")
    return [folder / name for name in FILES if (folder / name).exists()], broken


def picture(results: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    temporary = folder / f".{os.getpid()}.png"
    try:
        if why := plots.draw(results, temporary):
            say(f"  no picture: {why}")
        else:
            temporary.replace(folder / "pictures.png")
    finally:
        temporary.unlink(missing_ok=True)


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1, default=str) + "\n"
