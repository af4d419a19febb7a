"""Group ranks by projection and by depth (block number), which are parsed from the module names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Adapter", "Place", "ProjectionRanks", "places", "rank_grid", "ranks_by_depth", "ranks_by_projection"]


class Place(NamedTuple):
    """The position of a module in a model.

    Attributes:
        block: the number of its block; None if it is outside of numbered blocks.
        projection: its name within the block, e.g. ``"self_attn.q_proj"``; the whole name if ``block`` is None.
    """

    block: int | None
    projection: str


class Adapter(Protocol):
    """The attributes of an adapter that are read here. ``reporting.table.ReportRow`` has them."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def initial_rank(self) -> int: ...
    @property
    def params(self) -> int: ...


@dataclass(frozen=True)
class ProjectionRanks:
    """The ranks of all adapters with the same projection.

    Attributes:
        layers: the number of these adapters.
        mean_rank, mean_initial_rank: mean over these adapters, now and at the start.
        share_of_ranks, share_of_params: their share of all ranks and of all adapter parameters of the model, 0 to 1.
    """

    layers: int
    mean_rank: float
    mean_initial_rank: float
    share_of_ranks: float
    share_of_params: float


def places(names: Iterable[str]) -> dict[str, Place]:
    """Split module names into block number and projection.

    The block number is the first component of a name that is a number. The projection is the part of the name after the
    number. If there is none, it is the part before the number: ``layers.3`` has the projection ``layers``. If a model
    has several stacks of blocks, e.g. an encoder and a decoder, the projection contains both parts.

    Args:
        names: of all adapters of a model. From a single name, the number of stacks would be unknown.

    Returns:
        Module name -> place.
    """
    matches = {name: re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", name) for name in names}
    stacks = {match[1] for match in matches.values() if match}
    found = {}
    for name, match in matches.items():
        if match is None:
            found[name] = Place(None, name)
            continue
        stack, number, inner = match.groups()
        parts = [inner] if inner and len(stacks) == 1 else [part for part in (stack, inner) if part]
        found[name] = Place(int(number), ".".join(parts) or "layer")
    return found


def ranks_by_projection(adapters: Iterable[Adapter]) -> dict[str, ProjectionRanks]:
    """Projection -> the ranks of its adapters, in the order of the model."""
    adapters = list(adapters)
    place_of = places(adapter.name for adapter in adapters)
    groups: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        groups.setdefault(place_of[adapter.name].projection, []).append(adapter)
    ranks = sum(adapter.rank for adapter in adapters)
    params = sum(adapter.params for adapter in adapters)
    return {
        projection: ProjectionRanks(
            layers=len(group),
            mean_rank=sum(a.rank for a in group) / len(group),
            mean_initial_rank=sum(a.initial_rank for a in group) / len(group),
            share_of_ranks=sum(a.rank for a in group) / ranks,
            share_of_params=sum(a.params for a in group) / params,
        )
        for projection, group in groups.items()
    }


def ranks_by_depth(ranks: Mapping[str, int]) -> dict[int | None, int]:
    """Block number -> sum of the ranks in the block, in ascending order.

    Adapters outside of numbered blocks are summed under None, which comes last. If a model has several stacks of
    blocks, the blocks with the same number are summed together.

    Args:
        ranks: module name -> rank.
    """
    sums: dict[int | None, int] = {}
    for name, place in places(ranks).items():
        sums[place.block] = sums.get(place.block, 0) + ranks[name]
    return dict(sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[int], list[str], dict[tuple[int, str], int]]:
    """The ranks as a two-dimensional grid, block by projection.

    Args:
        ranks: module name -> rank.

    Returns:
        The block numbers in ascending order, the projections in the order of the model, and a dict ``(block number,
        projection) -> rank``. Modules outside of numbered blocks have the block number -1.
    """
    cells = {
        (-1 if place.block is None else place.block, place.projection): ranks[name]
        for name, place in places(ranks).items()
    }
    return sorted({key[0] for key in cells}), list(dict.fromkeys(key[1] for key in cells)), cells
