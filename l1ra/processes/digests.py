"""Checksums of adapters, by which processes compare their replicas."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from l1ra.layers.adapted_model import abbreviated
from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.sharding import is_sharded
from l1ra.layers.tensor_lists import batches, grouped, transferred

__all__ = ["ReplicasDiffer", "check_alike", "digests", "fingerprint"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
COPIES = 4  # temporary tensors of as many elements as the tensors of a batch have


class ReplicasDiffer(RuntimeError):
    """The processes of a data-parallel training hold different adapters."""


def digests(adapters: Mapping[str, L1RALinear], gates: Tensor) -> list[dict[str, object]]:
    """For each adapter what must be equal in all processes: its rank, and checksums of its gates and parameters.

    Adapters with the same bits have the same checksums. The tensors are read where they are, by a few ops for many of
    them, and one transfer brings all checksums of a device to the host. Of sharded parameters each process holds
    another part: they have none.

    Args:
        adapters: by name.
        gates: the master gates of all ranks, ``(R,)``.
    """
    params = [getattr(layer, name) for layer in adapters.values() for name in ADAPTER_PARAMETERS]
    whole = [param for param in params if not (is_sharded(param) or is_partitioned(param))]
    sums = dict(zip(map(id, whole), _checksums(whole), strict=True))
    masters = iter(gates.tolist())
    found = []
    for layer in adapters.values():
        own = {name: sums.get(id(getattr(layer, name))) for name in ADAPTER_PARAMETERS}
        # The text of a float is exact, and the same for each NaN.
        own["gate"] = own["gate"], zlib.crc32(repr(list(itertools.islice(masters, layer.rank))).encode())
        found.append({"rank": layer.rank, **own})
    return found


def fingerprint(found: Sequence[Mapping[str, object]]) -> bytes:
    """32 bytes that are the same in processes with the same :func:`digests`, and in no others."""
    return hashlib.sha256(repr(found).encode()).digest()


def check_alike(names: Collection[str], found: Sequence[Sequence[Mapping[str, object]]]) -> None:
    """Check that the :func:`digests` of all processes are equal.

    Args:
        names: of the adapters.
        found: for each process the digests of these adapters.

    Raises:
        ReplicasDiffer: they are not. The message names the adapters, what differs, and in which processes.
    """
    wrong = []
    for name, parts in zip(names, zip(*found, strict=True), strict=True):
        where: dict[tuple[int, ...], list[str]] = {}
        for part, first in parts[0].items():
            if odd := tuple(number for number, own in enumerate(parts) if own[part] != first):
                where.setdefault(odd, []).append(part)
        wrong += [f"{name} ({', '.join(part)} in {_processes(odd)})" for odd, part in where.items()]
    if wrong:
        raise ReplicasDiffer(
            f"the adapters of these processes are not those of process 0: {abbreviated(wrong)}. Change adapters in all "
            "processes alike, before DistributedDataParallel is constructed or after it; run the last backward before "
            "each step outside of no_sync(); and let all processes resume from one checkpoint."
        )


def _processes(numbers: Collection[int]) -> str:
    return f"{'process' if len(numbers) == 1 else 'processes'} {abbreviated([str(number) for number in numbers])}"


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    """A checksum of the bits of each tensor: its elements as integers, weighted by their positions, modulo 2**64."""
    if not tensors:
        return []
    order, sums = [], []
    # Vectors apart: a batch has room for many more of them.
    for alike in grouped(tensors, lambda tensor: (tensor.device, tensor.dtype, tensor.dim())).values():
        for chosen in batches(alike, COPIES * max(tensors[i].numel() for i in alike)):
            order += chosen
            sums.append(_weighted_sums([tensors[i].detach() for i in chosen]))
    values = torch.cat(transferred(sums, torch.device("cpu"))).tolist()
    return [value for _, value in sorted(zip(order, values, strict=True))]


def _weighted_sums(tensors: Sequence[Tensor]) -> Tensor:
    """``(n,)`` int64 for n tensors of one dtype on one device."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    running = flat.view(INTEGERS[flat.element_size()]).to(torch.int64)
    running *= torch.arange(1, 2 * len(flat), 2, device=flat.device)  # a product with an odd number keeps all bits
    running = running.cumsum(0)
    ends = [end - 1 for end in itertools.accumulate(tensor.numel() for tensor in tensors)]
    return torch.diff(running[torch.tensor(ends, device=flat.device)], prepend=running.new_zeros(1))
