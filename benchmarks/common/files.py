"""The repository's folder, and files that are written as a whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["RESULTS", "ROOT", "write_text"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write_text(path: Path, text: str) -> None:
    """Write a temporary file beside ``path`` and rename it: a reader finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
