"""Text in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned_columns"]


def aligned_columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """A line of text for each row; the columns whose numbers are in ``left`` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
