"""Tile sizes of the kernels, as tables: architecture -> kernel -> rank tile -> tile.

Architectures that are not listed use the default table. The tiles were chosen by the compiler's output, see
benchmarks/results/compiled.csv: no spilled registers, pipelined loads. On a GPU, ``python -m benchmarks.tune`` measures
tiles and prints a row for ``TILES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["RANK_TILES", "Tile", "architecture", "rank_tile", "splits", "tile"]

# A rank tile is the size of the kernels' rank dimension. Ranks with the same rank tile use the same compiled kernel.
RANK_TILES = (16, 32, 64, 128)
# Number of multiprocessors that is assumed if there is no GPU: in the interpreter and in the cross-compiler.
PROCESSORS = 132
WAVES = 4  # the largest number of waves into which a sum is split
FULL = 0.94  # share of the last wave's slots that is good enough


@dataclass(frozen=True)
class Tile:
    """The tile of one kernel.

    Attributes:
        tokens, features: the size of the block that a program processes in one iteration.
        warps: ``num_warps``.
        stages: ``num_stages``, the depth of the software pipeline of loads.
        tall: accumulate the gradients of A and B as (features, ranks) instead of (ranks, features). The tensor cores of
            sm_90 and later then take both factors from shared memory, which saves registers. On sm_80 it costs some.
        blocks: programs that a multiprocessor runs at a time, as registers and shared memory allow on an sm_90. With
            two or more, one computes while another one waits for memory.
    """

    tokens: int
    features: int
    warps: int = 4
    stages: int = 3
    tall: bool = False
    blocks: int = 2


# Tiles for 2-byte dtypes. In shrink and input_backward the key is the sum of the rank tiles of all layers that share
# the input; a sum that is no key uses the next larger rank tile. The tables "..._general" are for launches that need
# more registers: shrink that copies x too, input_backward with dropout or an input of another dtype than the products,
# output_backward with features that are no multiple of 16.
HALF: dict[str, dict[int, Tile]] = {
    "shrink": {
        16: Tile(128, 64, 8, 4),
        32: Tile(128, 64, 8, 4),
        48: Tile(128, 64, 8, 4),
        64: Tile(64, 64, 8, 4),
        128: Tile(64, 64, 8, 3),
    },
    "shrink_general": {
        16: Tile(128, 64, 8, 4),
        32: Tile(64, 128, 8, 3),
        48: Tile(128, 64, 8, 4),
        64: Tile(64, 64, 8, 4),
        128: Tile(64, 64, 8, 3),
    },
    "expand": {
        16: Tile(64, 128, 8, 2, blocks=3),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 2),
        128: Tile(64, 128, 8, 1, blocks=1),
    },
    "output_backward": {
        16: Tile(32, 512, 4, 3, tall=True),
        32: Tile(32, 512, 8, 3, tall=True),
        64: Tile(32, 256, 8, 3, blocks=1),
        128: Tile(32, 64, 8, 3),
    },
    "output_backward_general": {
        16: Tile(32, 512, 8, 3, blocks=1),
        32: Tile(32, 512, 8, 3, blocks=1),
        64: Tile(32, 256, 8, 3, blocks=1),
        128: Tile(32, 64, 8, 3),
    },
    "input_backward": {
        16: Tile(64, 128, 4, 4, tall=True),
        32: Tile(64, 128, 4, 4, tall=True),
        48: Tile(64, 128, 4, 4, tall=True),
        64: Tile(64, 128, 4, 3, tall=True),
        128: Tile(64, 64, 8, 3, tall=True),
    },
    "input_backward_general": {
        16: Tile(16, 128, 8, 6),
        32: Tile(32, 256, 8, 3, blocks=1),
        64: Tile(32, 128, 8, 3, blocks=1),
        128: Tile(32, 64, 8, 3, blocks=1),
    },
}
# Tiles for float32. Its products run on the CUDA cores, or on the tensor cores as tf32, and need twice the registers.
SINGLE: dict[str, dict[int, Tile]] = {
    "shrink": {
        16: Tile(32, 64, 4, 3),
        32: Tile(32, 32, 4, 3),
        64: Tile(32, 32, 8, 3),
        128: Tile(32, 32, 8, 2),
    },
    "expand": {
        16: Tile(64, 128, 8, 1),
        32: Tile(64, 64, 8, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(32, 32, 8, 1),
    },
    "output_backward": {
        16: Tile(32, 128, 8, 3),
        32: Tile(32, 64, 8, 3),
        64: Tile(16, 64, 8, 3),
        128: Tile(16, 32, 8, 2),
    },
    "input_backward": {
        16: Tile(32, 64, 8, 3),
        32: Tile(32, 32, 8, 3),
        64: Tile(16, 32, 8, 2),
        128: Tile(16, 32, 4, 2),
    },
}
# sm_80 has no warp-group matrix instructions, which take their factors from shared memory.
HALF_80: dict[str, dict[int, Tile]] = {
    "shrink": {
        16: Tile(64, 128, 8, 4),
        32: Tile(64, 128, 4, 4, blocks=1),
        64: Tile(64, 64, 8, 4),
        128: Tile(32, 64, 8, 3),
    },
    "expand": {
        16: Tile(64, 256, 8, 1),
        32: Tile(64, 256, 8, 1, blocks=1),
        64: Tile(64, 128, 8, 1),
        128: Tile(64, 128, 8, 1, blocks=1),
    },
    "output_backward": {
        16: Tile(32, 512, 8, 3, blocks=1),
        32: Tile(32, 512, 8, 3, blocks=1),
        64: Tile(32, 256, 8, 3, blocks=1),
        128: Tile(32, 64, 8, 3, blocks=1),
    },
    "input_backward": {
        16: Tile(16, 128, 8, 6),
        32: Tile(32, 256, 8, 3, blocks=1),
        64: Tile(32, 128, 8, 3, blocks=1),
        128: Tile(32, 32, 8, 3, blocks=1),
    },
}
# GPUs with 99 KB of shared memory per thread block; sm_80 has 163 KB, sm_90 227 KB.
HALF_SMALL = {
    **HALF_80,
    "shrink": {
        16: Tile(64, 128, 8, 3),
        32: Tile(64, 64, 8, 3),
        64: Tile(64, 64, 8, 3),
        128: Tile(64, 64, 8, 2),
    },
    "output_backward": {**HALF_80["output_backward"], 32: Tile(32, 512, 8, 2)},
}
for _tiles in (SINGLE, HALF_80, HALF_SMALL):
    for _kernel in ("shrink", "output_backward", "input_backward"):
        _tiles[f"{_kernel}_general"] = _tiles[_kernel]
# architecture -> (tiles for 2-byte dtypes, tiles for float32)
TILES: dict[str, tuple[dict, dict]] = {
    "sm_80": (HALF_80, SINGLE),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), (HALF_SMALL, SINGLE)),
}


def rank_tile(rank: int) -> int:
    """The smallest rank tile that is at least ``rank``.

    Raises:
        ValueError: ``rank`` is above the largest rank tile.
    """
    for width in RANK_TILES:
        if rank <= width:
            return width
    raise ValueError(f"rank {rank} does not fit a rank tile: cut it into pieces of {RANK_TILES[-1]} first.")


@lru_cache
def architecture(device: torch.device) -> str:
    """The architecture of an NVIDIA GPU, e.g. ``"sm_90"``; ``"default"`` for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of ``kernel`` for products in ``dtype`` and a rank dimension of size ``width``."""
    half, single = TILES.get(architecture(device), (HALF, SINGLE))
    tiles = (half if dtype.itemsize == 2 else single)[kernel]
    return tiles[width] if width in tiles else tiles[rank_tile(width)]


@lru_cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; ``PROCESSORS`` for other devices."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(
    blocks: int, tiles: int, device: torch.device, *, resident: int = 2, most: int | None = None
) -> tuple[int, int]:
    """Divide the ``blocks`` over which a kernel sums into splits, each summed by programs of its own.

    A split more occupies more multiprocessors, but leaves more partial sums. The smallest number of splits is chosen
    that keeps the multiprocessors occupied to the end: with ``resident`` programs on each, the programs fill whole
    waves to at least ``FULL``, or as far as possible within ``WAVES`` waves. The result depends on shapes and the
    device only, so sums are taken in the same order in every run.

    Args:
        blocks: the number of blocks of tokens or features that are summed.
        tiles: the number of programs for each split.
        resident: programs that a multiprocessor runs at a time, ``Tile.blocks``.
        most: the largest number of splits; None: ``blocks``.

    Returns:
        The number of blocks of each split but the last, which may have fewer, and the number of splits.
    """
    if blocks == 0 or tiles == 0:
        return max(1, blocks), min(1, blocks)
    slots = resident * processors(device)
    most = max(1, min(blocks, most or blocks, max(1, WAVES * slots // max(1, tiles))))
    best, best_filled = 1, 0.0
    for count in range(1, most + 1):
        run = -(-blocks // count)
        if -(-blocks // run) != count:
            continue  # rounding leaves fewer splits
        # The share of the time of all waves in which a slot is busy. Each split takes as long as the longest one.
        filled = tiles * blocks / run / (slots * -(-tiles * count // slots))
        if filled > best_filled + 1e-9:
            best, best_filled = count, filled
        if best_filled >= FULL:
            break
    run = -(-blocks // best)
    return run, -(-blocks // run)
