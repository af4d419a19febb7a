"""Bundles: adapters that share an input and are computed by the same launches.

All adapters of a bundle have the same rank tile and the same dtypes, and the sum of their rank tiles is at most the
largest rank tile. A rank above the largest rank tile is split into pieces, which are bundled like separate adapters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch

from l1ra_kernels.configs import RANK_TILES, rank_tile

__all__ = ["LARGEST_RANK_TILE", "MAX_BUNDLE", "Bundle", "Piece", "bundles_of", "three"]

LARGEST_RANK_TILE = RANK_TILES[-1]
MAX_BUNDLE = 3  # the largest number of adapters in a bundle

T = TypeVar("T")


class Piece(NamedTuple):
    """The ranks from ``rows[0]`` to ``rows[1]`` of the adapter of layer number ``layer``; None stands for all ranks."""

    layer: int
    rows: tuple[int, int] | None


class Bundle(NamedTuple):
    """What the launches of a bundle depend on, besides their tensors.

    Attributes:
        device: of all tensors.
        kind: dtypes of all tensors and the divisibility of their addresses, see ``PreparedLaunch``.
        dtype: of the products.
        input: the dtype of x.
        precision: ``input_precision`` of ``tl.dot``, ``"ieee"`` or ``"tf32"``.
        tokens, features: M and K.
        x_stride: from one row of x to the next.
        width: R, the rank tile of every adapter.
        ranks: of each adapter.
        outputs: N of each adapter.
        scalings: s of each adapter.
        dropout: probability that an element of x is dropped.
    """

    device: torch.device
    kind: Hashable
    dtype: torch.dtype
    input: torch.dtype
    precision: str
    tokens: int
    features: int
    x_stride: int
    width: int
    ranks: tuple[int, ...]
    outputs: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float

    @property
    def adapters(self) -> int:
        """G, the number of adapters."""
        return len(self.ranks)

    @property
    def columns(self) -> int:
        """``G * R``, the number of columns of H and Q."""
        return self.adapters * self.width

    def columns_of(self, tile: int, used: Sequence[bool] | None = None) -> list[int]:
        """For each adapter the number of tiles of ``tile`` output features; 0 for adapters that are not ``used``."""
        used = [True] * self.adapters if used is None else used
        return [-(-n // tile) if use else 0 for n, use in zip(self.outputs, used, strict=True)]


def three(values: Sequence[T], fill: T | None = None) -> tuple[T, ...]:
    """``values`` of up to three adapters as three, as the kernels take them; ``fill``, by default the first, is
    repeated."""
    missing = MAX_BUNDLE - len(values)
    return (*values, *[values[0] if fill is None else fill] * missing) if missing else tuple(values)


def bundles_of(ranks: Sequence[int], kinds: Sequence[Hashable]) -> list[tuple[int, list[Piece]]]:
    """The rank tile and the pieces of each bundle.

    Args:
        ranks: of each layer.
        kinds: of each layer; only layers of the same kind share a bundle.
    """
    bundles: list[tuple[int, list[Piece]]] = []
    last: Hashable = None
    for layer, (rank, kind) in enumerate(zip(ranks, kinds, strict=True)):
        for start in range(0, max(rank, 1), LARGEST_RANK_TILE):
            stop = min(start + LARGEST_RANK_TILE, rank)
            piece = Piece(layer, None if rank <= LARGEST_RANK_TILE else (start, stop))
            width = rank_tile(stop - start)
            if bundles and kind == last:
                widest = max(width, bundles[-1][0])
                if len(bundles[-1][1]) < MAX_BUNDLE and (len(bundles[-1][1]) + 1) * widest <= LARGEST_RANK_TILE:
                    bundles[-1] = (widest, [*bundles[-1][1], piece])
                    continue
            bundles.append((width, [piece]))
            last = kind
    return bundles
