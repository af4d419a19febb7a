"""Records of runs as JSON lines: one run a row, one file a task or case.

``pandas.read_json(file, lines=True)`` reads such a file, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_text

__all__ = ["Record", "RecordStore"]

Record = dict[str, Any]
Key = tuple[Any, ...]


class RecordStore:
    """The records in a folder.

    A file is replaced as a whole, under a lock on the folder. So a record is complete or missing, and none is lost when
    several processes add records at the same time or one of them is killed.

    Args:
        folder: of the files ``<first key>.jsonl``; it need not exist.
        keys: the fields that identify a run. Rows are sorted by them; the first one names the file.
    """

    def __init__(self, folder: Path, keys: tuple[str, ...]) -> None:
        self.folder, self.keys = folder, keys

    def read_all(self) -> list[Record]:
        """All records, by file, then by key."""
        files = sorted(self.folder.glob("*.jsonl"), key=lambda file: file.stem)
        return [record for file in files for record in self._rows(file).values()]

    def get(self, *key: Any) -> Record | None:
        """The record with these values of ``keys``; None if there is none. It is shared: don't change it."""
        return self._rows(self._file(key)).get(key)

    def add(self, record: Record) -> None:
        """Store a record; it replaces one with the same key."""
        key = tuple(record[name] for name in self.keys)
        file = self._file(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            rows = _read(file, self.keys) if file.exists() else {}
            rows[key] = record
            lines = [
                json.dumps(rows[key], separators=(",", ":"), ensure_ascii=False) for key in sorted(rows, key=_order)
            ]
            write_text(file, "\n".join(lines) + "\n")

    def _file(self, key: Key) -> Path:
        return self.folder / f"{key[0]}.jsonl"

    def _rows(self, file: Path) -> dict[Key, Record]:
        try:
            found = file.stat()
        except FileNotFoundError:
            return {}
        return _cached(file, self.keys, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=16)
def _cached(file: Path, keys: tuple[str, ...], version: tuple[int, ...]) -> dict[Key, Record]:
    # A program asks for many records between two changes of a file: ``version`` tells whether it has changed.
    return _read(file, keys)


def _read(file: Path, keys: tuple[str, ...]) -> dict[Key, Record]:
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {tuple(row[name] for name in keys): row for row in rows}


def _order(key: Key) -> tuple[Any, ...]:
    # None comes before numbers, with which it can't be compared.
    return tuple((value is not None, value) for value in key)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
