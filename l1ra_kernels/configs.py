"""Tile sizes, as plain tables: kernel -> rank tile -> tile, for each architecture.

An architecture that has no row takes the default. The rows were chosen by what the compiler makes of them, as
benchmarks/results/compiled.csv shows it: no spilled register, pipelined loads. On a GPU, ``python -m benchmarks.tune``
measures tiles and prints a row to paste into ``TILES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["RANK_TILES", "Tile", "architecture", "cut", "rank_tile", "tile"]

# A rank tile is the width of the kernels' rank dimension: a rank that changes within it recompiles nothing.
RANK_TILES = (16, 32, 64, 128)
# Processors to fill where there is no device to ask: the interpreter and the cross-compiler.
PROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """Tokens and features that one step of a program works on, its warps, and the depth of its pipeline of loads."""

    tokens: int
    features: int
    warps: int = 4
    stages: int = 3


# The sum of the rank tiles of all layers that share an input stands for the rank in shrink and input_backward.
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
# float32 takes its products from the plain units (or tf32) and twice the registers.
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
# Without the warp-group products of later GPUs, two layers of 64 ranks with dropout take more registers than there are.
HALF_80 = {**HALF, "input_backward": {**HALF["input_backward"], 128: Tile(32, 32, 8, 3)}}
# Cards whose blocks have 99 KB of shared memory, not 163 or 227.
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
# architecture -> (tiles for 2-byte numbers, tiles for float32)
TILES: dict[str, tuple[dict, dict]] = {
    "sm_80": (HALF_80, SINGLE),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), (HALF_SMALL, SINGLE)),
}


def rank_tile(rank: int) -> int:
    """The smallest rank tile that holds ``rank``.

    Raises:
        ValueError: none does.
    """
    for width in RANK_TILES:
        if rank <= width:
            return width
    raise ValueError(f"rank {rank} does not fit a rank tile: cut it into pieces of {RANK_TILES[-1]} first.")


@lru_cache
def architecture(device: torch.device) -> str:
    """``"sm_90"`` and the like; ``"default"`` where the device is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of ``kernel`` for products in ``dtype`` and a rank dimension of ``width``."""
    half, single = TILES.get(architecture(device), (HALF, SINGLE))
    return (half if dtype.itemsize == 2 else single)[kernel][rank_tile(width)]


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cut(tokens: int, block: int, columns: int, device: torch.device) -> tuple[int, int]:
    """How ``tokens`` are cut into streams, each summed by one program: ``(tokens a stream, streams)``.

    With ``columns`` tiles of features, enough streams to fill the device; more would only add partial sums.
    A function of shape and device alone, so that sums are taken in the same order in every run.
    """
    blocks = -(-tokens // block)
    wanted = max(1, min(blocks, -(-processors(device) // columns)))
    run = block * max(1, -(-blocks // wanted))
    return run, -(-tokens // run)
