"""Markdown tables and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.common.statistics import Interval

__all__ = ["interval_text", "markdown_table", "spread_text"]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first ``left`` columns are aligned to the left, the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def interval_text(interval: Interval | None) -> str:
    """``mean (low to high)``; empty without an interval."""
    if interval is None:
        return ""
    ends = "" if interval.low is None else f" ({interval.low:.3g} to {interval.high:.3g})"
    return f"{interval.mean:.4g}{ends}"


def spread_text(values: Mapping[str, float], digits: str) -> str:
    """``median (p20 to p80)``, each number in the format ``digits``."""
    return f"{values['median']:{digits}} ({values['p20']:{digits}} to {values['p80']:{digits}})"
