"""Which kinds of projection and which depths have the ranks, found from the modules' names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Adapter", "Place", "ProjectionRanks", "places", "rank_grid", "ranks_by_depth", "ranks_by_projection"]


class Place(NamedTuple):
    """Where a module stands. Outside of any numbered block, ``block`` is None and ``projection`` the whole name."""

    block: int | None
    projection: str


class Adapter(Protocol):
    """What is asked of an adapter here; ``reporting.table.ReportRow`` has it."""

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
    """All adapters of one kind of projection.

    Attributes:
        layers: how many there are.
        mean_rank, mean_initial_rank: over these layers, now and at the start.
        share_of_ranks, share_of_params: of all ranks and of all adapter parameters of the model, now, 0 to 1.
    """

    layers: int
    mean_rank: float
    mean_initial_rank: float
    share_of_ranks: float
    share_of_params: float


def places(names: Iterable[str]) -> dict[str, Place]:
    """Module names cut into block number and projection.

    The block is the first part of a name that is a number. The projection is what stands behind it, or before it if
    nothing does (``layers.3`` is a ``layers``); with what stands before it too, where there are several stacks of
    blocks, such as an encoder and a decoder.

    Args:
        names: all of a model's adapters: one name alone does not tell how many stacks there are.
    """
    cut = {name: re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", name) for name in names}
    stacks = {match[1] for match in cut.values() if match}
    found = {}
    for name, match in cut.items():
        if match is None:
            found[name] = Place(None, name)
            continue
        stack, number, inner = match.groups()
        parts = [inner] if inner and len(stacks) == 1 else [part for part in (stack, inner) if part]
        found[name] = Place(int(number), ".".join(parts) or "layer")
    return found


def ranks_by_projection(adapters: Iterable[Adapter]) -> dict[str, ProjectionRanks]:
    """Projection -> what its adapters have, in the order of the model."""
    adapters = list(adapters)
    where = places(adapter.name for adapter in adapters)
    kinds: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        kinds.setdefault(where[adapter.name].projection, []).append(adapter)
    ranks = sum(adapter.rank for adapter in adapters)
    params = sum(adapter.params for adapter in adapters)
    return {
        projection: ProjectionRanks(
            layers=len(alike),
            mean_rank=sum(a.rank for a in alike) / len(alike),
            mean_initial_rank=sum(a.initial_rank for a in alike) / len(alike),
            share_of_ranks=sum(a.rank for a in alike) / ranks,
            share_of_params=sum(a.params for a in alike) / params,
        )
        for projection, alike in kinds.items()
    }


def ranks_by_depth(ranks: Mapping[str, int]) -> dict[int | None, int]:
    """Block number -> sum of its ranks, first to last; at the end, under None, what is outside of blocks, if anything.

    Blocks of the same number in several stacks count together.

    Args:
        ranks: module name -> rank.
    """
    sums: dict[int | None, int] = {}
    for name, place in places(ranks).items():
        sums[place.block] = sums.get(place.block, 0) + ranks[name]
    return dict(sorted(sums.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[int], list[str], dict[tuple[int, str], int]]:
    """The ranks as a map, block by projection.

    Args:
        ranks: module name -> rank.

    Returns:
        The block numbers and the projections in order, and the rank of each pair. A module outside of any numbered
        block has number -1.
    """
    cells = {
        (-1 if place.block is None else place.block, place.projection): ranks[name]
        for name, place in places(ranks).items()
    }
    return sorted({key[0] for key in cells}), list(dict.fromkeys(key[1] for key in cells)), cells
