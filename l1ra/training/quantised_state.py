"""Reading and writing optimizer state, also where bitsandbytes stores it in 8 bits.

The ``state1`` and ``state2`` of bitsandbytes have the parameter's shape and hold codes. Beside each are a map from
codes to values and the largest value of each block. A block may span several rows, so moving rows quantises all blocks
again, as each step of the optimizer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COMPANIONS", "is_quantised", "read_values", "write_values"]

COMPANIONS = ("qmap1", "absmax1", "qmap2", "absmax2")
BLOCK = 256


def is_quantised(state: dict, name: str) -> bool:
    """Whether the tensor ``state[name]`` holds codes of bitsandbytes."""
    codes, largest = state[name], state.get(_beside("absmax", name))
    return codes.dtype == torch.uint8 and largest is not None and largest.shape == (-(-codes.numel() // BLOCK),)


def read_values(state: dict, name: str) -> Tensor:
    """The values of ``state[name]``: the tensor itself, or float32 values of the same shape in place of codes."""
    if not is_quantised(state, name):
        return state[name]
    from bitsandbytes.functional import dequantize_blockwise

    largest, code = state[_beside("absmax", name)], state[_beside("qmap", name)]
    return dequantize_blockwise(state[name], absmax=largest, code=code, blocksize=BLOCK)


def write_values(state: dict, name: str, values: Tensor) -> None:
    """Store ``values``, of any number of rows, in ``state[name]``."""
    if not is_quantised(state, name):
        _store(state, name, values)
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, blocks = quantize_blockwise(values, code=state[_beside("qmap", name)], blocksize=BLOCK)
    _store(state, name, codes)
    _store(state, _beside("absmax", name), blocks.absmax)


def _beside(part: str, name: str) -> str:
    return part + name.removeprefix("state")


def _store(state: dict, name: str, values: Tensor) -> None:
    # In place if the shape is the same: a captured CUDA graph has the address.
    if values.shape == state[name].shape:
        state[name].copy_(values)
    else:
        state[name] = values
