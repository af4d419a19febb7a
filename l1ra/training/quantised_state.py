"""What an optimizer keeps under a name, as numbers to read and write: also where bitsandbytes keeps 8 bits of each.

Its ``state1`` and ``state2`` have the parameter's shape and hold codes; beside each are a map from codes to numbers and
the largest number of each block. Blocks run on over the rows: a move of rows rounds all of them anew, as each step of
the optimizer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BESIDE", "in_blocks", "read", "write"]

BESIDE = ("qmap1", "absmax1", "qmap2", "absmax2")
BLOCK = 256


def in_blocks(state: dict, name: str) -> bool:
    """Whether ``state[name]``, a tensor, holds codes of bitsandbytes' blocks."""
    codes, largest = state[name], state.get(_beside("absmax", name))
    return codes.dtype == torch.uint8 and largest is not None and largest.shape == (-(-codes.numel() // BLOCK),)


def read(state: dict, name: str) -> Tensor:
    """The numbers of ``state[name]``: the tensor itself, or float32 ones of its shape in place of codes."""
    if not in_blocks(state, name):
        return state[name]
    from bitsandbytes.functional import dequantize_blockwise

    largest, code = state[_beside("absmax", name)], state[_beside("qmap", name)]
    return dequantize_blockwise(state[name], absmax=largest, code=code, blocksize=BLOCK)


def write(state: dict, name: str, values: Tensor) -> None:
    """Let ``state[name]`` hold ``values``, of any number of rows."""
    if not in_blocks(state, name):
        _put(state, name, values)
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, blocks = quantize_blockwise(values, code=state[_beside("qmap", name)], blocksize=BLOCK)
    _put(state, name, codes)
    _put(state, _beside("absmax", name), blocks.absmax)


def _beside(part: str, name: str) -> str:
    return part + name.removeprefix("state")


def _put(state: dict, name: str, values: Tensor) -> None:
    # Memory stays where the number of rows does: a captured graph holds its address.
    if values.shape == state[name].shape:
        state[name].copy_(values)
    else:
        state[name] = values
