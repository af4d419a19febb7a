"""Format rows of cells as text in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned_columns"]


def aligned_columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """One line of text for each row, with two spaces between columns.

    Args:
        rows: cells; all rows have the same number of columns.
        left: indices of the left-aligned columns. The others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
