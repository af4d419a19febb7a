"""Markdown tables and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["markdown_table", "spread_text"]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first ``left`` columns are aligned to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def spread_text(values: Mapping[str, float], digits: str) -> str:
    """``median (p20 to p80)``, each number in the format ``digits``."""
    return f"{values['median']:{digits}} ({values['p20']:{digits}} to {values['p80']:{digits}})"
