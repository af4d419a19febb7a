"""Tile sizes of the kernels, as tables: architecture -> kernel -> rank tile -> tile.

Architectures that are not listed use the default table. The tiles were chosen by the compiler's output, see
benchmarks/results/compiled.csv: no spilled registers, pipelined loads. On a GPU, ``python -m benchmarks.tune`` measures
tiles and prints a row for ``TILES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["RANK_TILES", "Tile", "architecture", "rank_tile", "split_tokens", "tile"]

# A rank tile is the size of the kernels' rank dimension. Ranks with the same rank tile use the same compiled kernel.
RANK_TILES = (16, 32, 64, 128)
# Number of multiprocessors that is assumed if there is no GPU: in the interpreter and in the cross-compiler.
PROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """The tile of one kernel.

    Attributes:
        tokens, features: the size of the block that a program processes in one iteration.
        warps: ``num_warps``.
        stages: ``num_stages``, the depth of the software pipeline of loads.
    """

    tokens: int
    features: int
    warps: int = 4
    stages: int = 3


# Tiles for 2-byte dtypes. In shrink and input_backward the key is the sum of the rank tiles of all layers that share
# the input.
HALF: dict[str, dict[int, Tile]] = {
    "shrink": {
        16: Tile(64, 128, 8, 4),
        32: Tile(64, 128, 4, 4),
        64: Tile(64, 64, 8, 4),
        128: Tile(64, 64, 8, 3),
    },
    "expand": {
        16: Tile(64, 256, 8, 1),
        32: Tile(64, 256, 8, 1),
        64: Tile(64, 128, 8, 1),
        128: Tile(64, 128, 8, 1),
    },
    "output_backward": {
        16: Tile(32, 512, 8, 3),
        32: Tile(32, 512, 8, 3),
        64: Tile(32, 256, 8, 3),
        128: Tile(32, 64, 8, 3),
    },
    "input_backward": {
        16: Tile(16, 128, 8, 6),
        32: Tile(32, 256, 8, 3),
        64: Tile(32, 128, 8, 3),
        128: Tile(32, 64, 8, 3),
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
        32: Tile(64, 128, 8, 1),
        64: Tile(64, 64, 8, 1),
        128: Tile(64, 64, 8, 1),
    },
    "output_backward": {
        16: Tile(32, 128, 8, 3),
        32: Tile(32, 64, 8, 3),
        64: Tile(16, 64, 8, 3),
        128: Tile(16, 32, 8, 3),
    },
    "input_backward": {
        16: Tile(32, 64, 8, 3),
        32: Tile(32, 32, 8, 3),
        64: Tile(16, 32, 8, 3),
        128: Tile(16, 32, 4, 3),
    },
}
# sm_80 has no warp-group matrix instructions. Without them, the default tile for two layers of rank 64 with dropout
# needs more registers than there are.
HALF_80 = {**HALF, "input_backward": {**HALF["input_backward"], 128: Tile(32, 32, 8, 3)}}
# GPUs with 99 KB of shared memory per thread block; sm_80 has 163 KB, sm_90 227 KB.
HALF_SMALL = {
    **HALF_80,
    "shrink": {
        16: Tile(64, 128, 8, 3),
        32: Tile(64, 64, 8, 3),
        64: Tile(64, 64, 8, 3),
        128: Tile(64, 64, 8, 2),
    },
    "output_backward": {**HALF["output_backward"], 32: Tile(32, 512, 8, 2)},
}
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
    return (half if dtype.itemsize == 2 else single)[kernel][rank_tile(width)]


@lru_cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; ``PROCESSORS`` for other devices."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_tokens(tokens: int, block: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Divide ``tokens`` into splits. One program accumulates the partial sum of one split.

    There are as many splits as needed to occupy all multiprocessors with ``columns`` tiles of features. More splits
    would only add partial sums. The result depends on shapes and the device only, so that sums are accumulated in the
    same order in every run.

    Args:
        tokens: M.
        block: tokens per iteration of a program, ``Tile.tokens``.
        columns: the number of feature tiles.

    Returns:
        The number of tokens per split, and the number of splits.
    """
    blocks = -(-tokens // block)
    wanted = max(1, min(blocks, -(-processors(device) // columns)))
    run = block * max(1, -(-blocks // wanted))
    return run, -(-tokens // run)
