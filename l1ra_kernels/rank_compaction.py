"""Rank compaction: the kept rows of many tensors move to their new places in one launch.

    dst[i, :] = src[sources[i], :]      or `fill` where sources[i] is -1

for every tensor of a table. Rows are strings of bits: no dtype is looked at, NaN payloads and -0.0 stay what they are.
In place (dst = src) it needs ``sources[i] >= i``, rising: a row that is read has then never been written before, and
each program walks the rows of its own columns alone. No temporary, no atomics, and what is left out is never read.

Dimensions: r rows before, rows after; ``length`` units of `UNIT` bytes a row, the largest unit that divides every
address, stride and row of the table. One program: a stripe of `BLOCK` units of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from l1ra_kernels.launch import launch

__all__ = ["compact_rows_", "move_rows_many"]

BLOCK = 1024
WARPS = 4
JOB = 8  # numbers of a job
LARGEST_UNIT = 8  # bytes; also the period of the bit pattern of a fill


@triton.jit(do_not_specialize=["stripes"])
def _move_rows(
    p_jobs,  # (tensors, 8) int64: addresses of src and dst, their row strides, length, rows, first source, fill
    p_sources,  # (sum of distinct rows,) int64
    stripes,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TYPE: tl.constexpr = tl.int64 if UNIT == 8 else tl.int32 if UNIT == 4 else tl.int16 if UNIT == 2 else tl.int8
    i_program = tl.program_id(0).to(tl.int64)
    p_job = p_jobs + i_program // stripes * 8
    start = i_program % stripes * BLOCK
    length = tl.load(p_job + 4)
    if start < length:
        o_unit = start + tl.arange(0, BLOCK)
        m_unit = o_unit < length
        p_src = tl.load(p_job).to(tl.pointer_type(TYPE)) + o_unit
        p_dst = tl.load(p_job + 1).to(tl.pointer_type(TYPE)) + o_unit
        s_src = tl.load(p_job + 2)
        s_dst = tl.load(p_job + 3)
        rows = tl.load(p_job + 5)
        p_source = p_sources + tl.load(p_job + 6)
        # Eight bytes of repeated elements: the units of a row take their parts of it in turn.
        b_fill = (tl.load(p_job + 7) >> (o_unit % (8 // UNIT) * (8 * UNIT))).to(TYPE)
        for i in range(rows):
            source = tl.load(p_source + i)
            b_row = b_fill
            if source >= 0:
                b_row = tl.load(p_src + source * s_src, mask=m_unit)
            tl.store(p_dst + i * s_dst, b_row, mask=m_unit)


@torch.no_grad()
def move_rows_many(tensors: Sequence[Tensor], sources: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Tensor]:
    """See :func:`l1ra_kernels.state_ops.move_rows_many`; all tensors on one device."""
    tensors = [rows if _dense(rows) else rows.contiguous() for rows in tensors]
    moved = [rows.new_empty((len(source), *rows.shape[1:])) for rows, source in zip(tensors, sources, strict=True)]
    patterns = [_pattern(rows.dtype, float(fill).hex()) for rows, fill in zip(tensors, fills, strict=True)]
    _launch(tensors, moved, sources, patterns)
    return moved


@torch.no_grad()
def compact_rows_(tensors: Sequence[Tensor], keeps: Sequence[Sequence[int]]) -> None:
    """See :func:`l1ra_kernels.state_ops.compact_rows_`; all tensors on one device."""
    dense = [rows if _dense(rows) else rows.contiguous() for rows in tensors]
    sources = [(*keep, *[-1] * (rows.shape[0] - len(keep))) for rows, keep in zip(tensors, keeps, strict=True)]
    _launch(dense, dense, sources, [0] * len(dense))
    for rows, compacted in zip(tensors, dense, strict=True):
        if rows is not compacted:
            rows.copy_(compacted)
    torch.autograd.graph.increment_version(list(tensors))  # autograd can't see what is written through addresses


def _dense(rows: Tensor) -> bool:
    """Whether each row is one string of memory; the stride between rows may be any."""
    if rows.is_contiguous():
        return True
    size = 1
    for length, stride in zip(reversed(rows.shape[1:]), reversed(rows.stride()[1:]), strict=True):
        if length != 1 and stride != size:
            return False
        size *= length
    return True


@lru_cache(maxsize=64)
def _pattern(dtype: torch.dtype, fill: str) -> int:
    """The bits of ``fill`` repeated to eight bytes. It comes in hexadecimal, by which -0.0 is not 0.0 to the cache."""
    element = torch.full((1,), float.fromhex(fill), dtype=dtype)
    if element.element_size() > LARGEST_UNIT:
        raise ValueError(f"rows of {dtype} can't be moved: one element is more than {LARGEST_UNIT} bytes.")
    return element.repeat(LARGEST_UNIT // element.element_size()).view(torch.int64).item()


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """As int64. From pinned memory, which is not used again before the copy is done: from any other the host waits."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _launch(
    src: Sequence[Tensor], dst: Sequence[Tensor], sources: Sequence[Sequence[int]], patterns: Sequence[int]
) -> None:
    first, flat = {}, []
    for source in map(tuple, sources):
        if source not in first:
            first[source] = len(flat)
            flat.extend(source)
    jobs, unit = [], LARGEST_UNIT
    for old, new, source, pattern in zip(src, dst, sources, patterns, strict=True):
        if new.numel() == 0:
            continue
        size = new.element_size()
        in_bytes = (
            old.data_ptr(),
            new.data_ptr(),
            old.stride(0) * size,
            new.stride(0) * size,
            new.numel() // new.shape[0] * size,
        )
        unit = math.gcd(unit, *in_bytes)
        jobs.append((*in_bytes, new.shape[0], first[tuple(source)], pattern))
    if not jobs:
        return
    # Addresses stay in bytes; strides and lengths are counted in units.
    table = [(*job[:2], *(n // unit for n in job[2:5]), *job[5:]) for job in jobs]
    stripes = max(triton.cdiv(job[4], BLOCK) for job in table)
    numbers = _on_device([*chain.from_iterable(table), *flat], src[0].device)
    launch(
        _move_rows,
        (len(table) * stripes,),
        numbers,
        numbers[JOB * len(table) :],
        stripes,
        UNIT=unit,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
