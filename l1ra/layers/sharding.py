"""Tensors of which each process holds a part, as ``torch.distributed.fsdp.fully_shard`` (FSDP 2) makes them.

The parameters of a sharded model, their gradients and their optimizer state are DTensors. What changes the rows of
adapters works on plain tensors: ``gathered.gathered`` puts them in place of the DTensors for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.tensor_lists import copy_all_, grouped, views

__all__ = [
    "Columns",
    "Part",
    "columns_of",
    "first_writes",
    "group_of",
    "is_sharded",
    "part_of",
    "sum_over_columns",
    "wholes",
    "with_all_rows",
    "write_rows",
]

if distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
else:
    DTensor = ()


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return isinstance(tensor, DTensor)


class Part(NamedTuple):
    """What this process holds of a tensor.

    Attributes:
        tensor: shares the memory of the tensor.
        start: the index of its first element in the whole, along ``dim``.
        dim: the dimension along which the whole is split.
    """

    tensor: Tensor
    start: int
    dim: int

    def of(self, whole: Tensor) -> Tensor:
        """The same part of ``whole``, a plain tensor of the shape of the whole."""
        if whole.shape == self.tensor.shape:  # a scalar has no dimension to be split along
            return whole
        return whole.narrow(self.dim, self.start, self.tensor.shape[self.dim])


def part_of(tensor: Tensor) -> Part | None:
    """What this process holds of a DTensor, None if it is split along several dimensions.

    A plain tensor is its own part.
    """
    if not is_sharded(tensor):
        return Part(tensor.detach(), 0, 0)
    shards = [(i, p.dim) for i, p in enumerate(tensor.placements) if type(p) is Shard]
    if len(shards) > 1 or any(type(p) not in (Shard, Replicate) for p in tensor.placements):
        return None
    local = tensor.detach().to_local()
    if not shards:
        return Part(local, 0, 0)
    ((mesh_dim, dim),) = shards
    size, count = tensor.shape[dim], tensor.device_mesh.size(mesh_dim)
    chunk = -(-size // count)  # as torch.chunk splits
    return Part(local, min(size, chunk * tensor.device_mesh.get_local_rank(mesh_dim)), dim)


@torch.no_grad()
def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as plain ones. All processes that hold parts must call this alike.

    One reduction gathers all DTensors of one kind: each process adds its parts to zeros. A plain tensor is returned
    itself.
    """
    found = list(tensors)
    sharded = [i for i, tensor in enumerate(found) if is_sharded(tensor)]
    for (mesh, dims, dtype), alike in grouped([found[i] for i in sharded], _kind).items():
        chosen = [sharded[k] for k in alike]
        some = [found[i].detach() for i in chosen]
        if dims is None:
            whole = [_on_mesh(tensor).full_tensor() for tensor in some]
        else:
            shapes = [tensor.shape for tensor in some]
            flat = torch.zeros(sum(shape.numel() for shape in shapes), dtype=dtype, device=mesh.device_type)
            whole = views(flat, shapes)
            parts = [part_of(tensor) for tensor in some]
            copy_all_([part.of(w) for part, w in zip(parts, whole, strict=True)], [part.tensor for part in parts])
            for dim in dims:
                distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, tensor in zip(chosen, whole, strict=True):
            found[i] = tensor.to(found[i].device)
    return found


def _kind(tensor: Tensor) -> tuple[Any, tuple[int, ...] | None, torch.dtype]:
    """DTensors of one kind are gathered together: their mesh, its dimensions along which they are split (None: not as
    :func:`part_of` knows it), their dtype."""
    split = part_of(tensor) is not None
    dims = tuple(i for i, p in enumerate(tensor.placements) if type(p) is Shard) if split else None
    return tensor.device_mesh, dims, tensor.dtype


def _on_mesh(tensor: Any) -> Any:
    # With CPU offload the parts are on the CPU, and the processes communicate through GPUs.
    kind = tensor.device_mesh.device_type
    return tensor if tensor.device.type == kind else tensor.to(kind)


class Columns(NamedTuple):
    """The columns of a tensor ``(rows, columns)`` that this process holds.

    Attributes:
        at: their indices.
        group: the processes that hold the others.
        device: on which these processes communicate.
    """

    at: slice
    group: Any
    device: torch.device


def columns_of(tensor: Tensor) -> Columns | None:
    """The columns that this process holds, if the DTensor is split by columns: it has all rows then."""
    if not is_sharded(tensor) or tensor.dim() != 2 or (part := part_of(tensor)) is None or part.dim != 1:
        return None
    mesh = tensor.device_mesh
    mesh_dim = next(i for i, placement in enumerate(tensor.placements) if type(placement) is Shard)
    at = slice(part.start, part.start + part.tensor.shape[1])
    return Columns(at, mesh.get_group(mesh_dim), torch.device(mesh.device_type))


@torch.no_grad()
def sum_over_columns(matrices: Sequence[Tensor], columns: Sequence[Columns | None]) -> list[Tensor]:
    """Sums over the processes of matrices that each has computed from its own columns, in one reduction.

    Args:
        matrices: of one dtype on one device.
        columns: from which each was computed; None: from all of them, so that it is returned as it is.
    """
    found = list(matrices)
    parts = grouped(columns, lambda part: part and (part.group, part.device))
    for kind, chosen in parts.items():
        if kind is not None:
            group, device = kind
            flat = torch.cat([matrices[i].reshape(-1) for i in chosen]).to(device)
            distributed.all_reduce(flat, group=group)
            for i, total in zip(chosen, views(flat, [matrices[i].shape for i in chosen]), strict=True):
                found[i] = total.to(matrices[i].device)
    return found


def with_all_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Plain tensors with all rows: of a DTensor that is split by columns those of this process, of others the whole."""
    own = [part_of(tensor).tensor if columns_of(tensor) else None for tensor in tensors]
    others = iter(wholes([tensor for tensor, part in zip(tensors, own, strict=True) if part is None]))
    return [next(others) if part is None else part for part in own]


def write_rows(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy back what :func:`with_all_rows` has returned, or another tensor of that shape."""
    by_columns, others = [], []
    for tensor, value in zip(tensors, values, strict=True):
        if columns_of(tensor) is None:
            others.append((tensor, value))
        elif (own := part_of(tensor).tensor).data_ptr() != value.data_ptr():
            by_columns.append((own, value))
    copy_all_([own for own, _ in by_columns], [value for _, value in by_columns])
    _write_wholes([tensor for tensor, _ in others], [value for _, value in others])


@torch.no_grad()
def _write_wholes(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy to each tensor its value, a plain tensor of the whole; of a DTensor each process copies its own part."""
    targets, sources = [], []
    for tensor, value in zip(tensors, values, strict=True):
        part = part_of(tensor)
        if part is None:
            mesh, placements = tensor.device_mesh, tensor.placements
            value = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()
            part = Part(tensor.detach().to_local(), 0, 0)
        targets.append(part.tensor)
        sources.append(part.of(value))
    copy_all_(targets, sources)


def group_of(mesh: Any) -> Any:
    """The group of all processes of a device mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    everyone = mesh.size() == distributed.get_world_size()
    return distributed.group.WORLD if everyone else mesh._flatten().get_group()


@contextmanager
def first_writes(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Within the block: whether this process is to write what all of them have gathered.

    If one of ``tensors`` is sharded, or partitioned by ZeRO stage 3, it is the first of the processes that hold it, for
    which the others wait.

    Raises:
        RuntimeError: in all processes but the first, if the block has raised an error there.
    """
    tensors = list(tensors)
    mesh = next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)
    if mesh is None and not any(map(is_partitioned, tensors)):
        yield True
        return
    group = distributed.group.WORLD if mesh is None else group_of(mesh)
    first = distributed.get_rank(group) == 0
    failed: list[str | None] = [None]
    try:
        yield first
    except BaseException as error:
        failed = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        distributed.broadcast_object_list(failed, distributed.get_global_rank(group, 0), group)
    if failed[0] is not None:
        raise RuntimeError(f"the process that writes has failed: {failed[0]}")
