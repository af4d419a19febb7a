"""Rank compaction: copy rows of many tensors to new positions in one launch.

    dst[i, :] = src[sources[i], :]      or `fill` where sources[i] is -1

Reads the kept rows of each src (r, ...); writes each dst (rows, ...). Rows are copied as bits, whatever the dtype, so
that NaN payloads and -0.0 are preserved. Rows that are not kept are not read.

The copy may be in place (dst = src) if ``sources`` is ascending with ``sources[i] >= i``: then a row is read before it
is overwritten, because each program copies the rows of its own columns one after another. Neither a temporary tensor
nor atomics are needed.

A row is copied in units of `UNIT` bytes, the largest unit that divides every address, stride and row size of all
tensors. It has ``length`` units. One program copies a stripe of `BLOCK` units of all rows of one tensor.
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
JOB = 8  # int64 numbers per tensor in the table p_jobs
LARGEST_UNIT = 8  # bytes; also the size of the repeated bit pattern of `fill`


@triton.jit(do_not_specialize=["stripes"])
def _move_rows(
    p_jobs,  # (tensors, 8) int64: addresses of src and dst, row strides of src and dst, length, rows, offset in
    # p_sources, bit pattern of fill
    p_sources,  # int64, `sources` of all tensors; equal ones are stored once
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
        # The fill value is repeated to eight bytes. Each unit of a row takes its own part of the eight bytes.
        b_fill = (tl.load(p_job + 7) >> (o_unit % (8 // UNIT) * (8 * UNIT))).to(TYPE)
        for i in range(rows):
            source = tl.load(p_source + i)
            b_row = b_fill
            if source >= 0:
                b_row = tl.load(p_src + source * s_src, mask=m_unit)
            tl.store(p_dst + i * s_dst, b_row, mask=m_unit)


@torch.no_grad()
def move_rows_many(tensors: Sequence[Tensor], sources: Sequence[Sequence[int]], fills: Sequence[float]) -> list[Tensor]:
    """See :func:`l1ra_kernels.state_ops.move_rows_many`. All tensors must be on one device."""
    tensors = [rows if _dense(rows) else rows.contiguous() for rows in tensors]
    moved = [rows.new_empty((len(source), *rows.shape[1:])) for rows, source in zip(tensors, sources, strict=True)]
    patterns = [_pattern(rows.dtype, float(fill).hex()) for rows, fill in zip(tensors, fills, strict=True)]
    _launch(tensors, moved, sources, patterns)
    return moved


@torch.no_grad()
def compact_rows_(tensors: Sequence[Tensor], keeps: Sequence[Sequence[int]]) -> None:
    """See :func:`l1ra_kernels.state_ops.compact_rows_`. All tensors must be on one device."""
    dense = [rows if _dense(rows) else rows.contiguous() for rows in tensors]
    sources = [(*keep, *[-1] * (rows.shape[0] - len(keep))) for rows, keep in zip(tensors, keeps, strict=True)]
    _launch(dense, dense, sources, [0] * len(dense))
    for rows, compacted in zip(tensors, dense, strict=True):
        if rows is not compacted:
            rows.copy_(compacted)
    torch.autograd.graph.increment_version(list(tensors))  # autograd does not see writes through addresses


def _dense(rows: Tensor) -> bool:
    """Whether each row is contiguous in memory. The stride between rows is arbitrary."""
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
    """The bits of ``fill`` in ``dtype``, repeated to eight bytes.

    ``fill`` is a hexadecimal string, because the cache would treat -0.0 and 0.0 as the same key.
    """
    element = torch.full((1,), float.fromhex(fill), dtype=dtype, device="cpu")
    if element.element_size() > LARGEST_UNIT:
        raise ValueError(f"rows of {dtype} can't be moved: one element is more than {LARGEST_UNIT} bytes.")
    return element.repeat(LARGEST_UNIT // element.element_size()).view(torch.int64).item()


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """An int64 tensor on ``device``.

    The copy is from pinned memory, because the host would wait for a copy from pageable memory. PyTorch does not reuse
    the pinned memory before the copy is complete.
    """
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


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
    # Addresses are in bytes, strides and lengths in units.
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
