"""Everything that is printed, in a file too."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TextIO

__all__ = ["Log"]

LARGEST = 8 << 20  # characters: a section that prints without end must not fill the disk


class Log:
    """Lines go to stdout and to a file; those said before there was one follow when it is opened."""

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.early: list[str] = []
        self.size = 0

    def open(self, path: Path, append: bool) -> None:
        file = path.open("a" if append else "w", encoding="utf-8")
        file.write("".join(f"{line}\n" for line in self.early))
        file.flush()
        self.file = file

    def say(self, text: str) -> None:
        # Whoever read our stdout may have gone; the run goes on.
        with contextlib.suppress(OSError, ValueError):
            print(text, flush=True)
        self.size += len(text) + 1
        if self.size > LARGEST:
            return
        if self.file is None:
            self.early.append(text)
        else:
            with contextlib.suppress(OSError, ValueError):
                self.file.write(text + "\n")
                self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
