"""Where the ranks have gone: by projection, by depth, and as a share."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from l1ra.reporting.rank_map import Place, places

__all__ = ["by_depth", "by_projection", "share_behind"]

# Feed-forward layers, and the projection that leads out of attention, in BERT's and in Llama's names.
BEHIND = re.compile(r"(.*\.)?(mlp\.\w+|intermediate\.dense|attention\.output\.dense|output\.dense|o_proj)")


def by_projection(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Projection -> mean final rank over its layers and the runs."""
    return _means(records, lambda place: place.projection)


def by_depth(records: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Number of the layer -> mean final rank over its projections and the runs; -1: outside of any layer."""
    return dict(sorted(_means(records, lambda place: -1 if place.block is None else place.block).items()))


def _means(records: Iterable[dict[str, Any]], key: Callable[[Place], Any]) -> dict[Any, float]:
    found: dict[Any, list[int]] = {}
    for record in records:
        for name, place in places(record["ranks"]).items():
            found.setdefault(key(place), []).append(record["ranks"][name])
    return {place: statistics.fmean(ranks) for place, ranks in found.items()}


def share_behind(records: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Share of all ranks on feed-forward layers and attention's output; and what equal ranks would put there."""
    shares, uniform = [], []
    for record in records:
        chosen = [rank for name, rank in record["ranks"].items() if BEHIND.fullmatch(name)]
        shares.append(sum(chosen) / max(1, sum(record["ranks"].values())))
        uniform.append(len(chosen) / len(record["ranks"]))
    return statistics.fmean(shares), statistics.fmean(uniform)
