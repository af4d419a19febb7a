"""Which processes train the adapters together, and whether ranks can move there.

Every process holds a replica of the adapters, or a part of each, and all must move the same ranks. Gradients are
averaged, so that all processes compute the same decisions. The decision of the first process is broadcast all the same:
a single rank that differs would let the replicas diverge.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from l1ra.layers.base_layers import tensor_of
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.sharding import group_of, is_sharded, part_of
from l1ra.layers.zero import ZeroOptimizer
from l1ra.processes.group import ReplicaGroup, world_size

__all__ = [
    "CannotMoveRanks",
    "adapters_are_flat",
    "adapters_are_sharded",
    "check_gates_apart",
    "clear_unused_gradients",
    "join",
]


class CannotMoveRanks(Exception):
    """Ranks can't move in this distributed training. The message is the end of a sentence."""


def adapters_are_flat(layers: Iterable[L1RALinear]) -> bool:
    """Whether FSDP 1 holds adapters as parts of flat tensors, so that they can't be read."""
    return world_size() > 1 and any(layer.is_flat for layer in layers)


def check_gates_apart(model: nn.Module, layers: Iterable[L1RALinear], optimizer: Optimizer) -> None:
    """Check that ``optimizer``, which holds no adapter, does not hold them within flat parameters.

    Args:
        model: contains ``layers``.

    Raises:
        RuntimeError: FSDP 1 has made flat parameters of them, and the optimizer moves the gates.
    """
    if world_size() == 1 or all(isinstance(tensor_of(layer, "gate"), nn.Parameter) for layer in layers):
        return
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if any(id(param) in held for param in model.parameters()):
        raise RuntimeError(
            "FullyShardedDataParallel has put the gates of the adapters into the flat parameters that the optimizer "
            "moves, where they can't be kept as they are: pass use_orig_params=True, or take "
            "torch.distributed.fsdp.fully_shard in its place."
        )


def adapters_are_sharded(layers: Iterable[L1RALinear]) -> bool:
    """Whether adapters are sharded by FSDP 2."""
    return any(is_sharded(param) for layer in layers for param in (layer.lora_A, layer.gate, layer.lora_B))


def join(
    adapters: Mapping[str, L1RALinear],
    gates: Tensor,
    optimizers: Sequence[Optimizer],
    same: Mapping[str, Any],
    beside_shards: ReplicaGroup | None,
    zero: ZeroOptimizer | None,
) -> ReplicaGroup:
    """The group of processes that train these adapters together.

    Nothing is sent before this process knows that it is in such a group.

    Args:
        adapters: by name.
        gates: the master gates of all ranks, ``(R,)``.
        optimizers: those that have stepped the adapters.
        same: the values that must be equal in all processes, by name.
        beside_shards: the group, if the adapters lie beside the shards of FSDP 2.
        zero: DeepSpeed's optimizer, within its step, if it holds the adapters.

    Raises:
        CannotMoveRanks: there is no such group, or ranks can't move in it. The processes of a group all raise it.
        ReplicasDiffer: the processes hold different adapters. All of them raise it.
    """
    layers = list(adapters.values())
    if zero is not None:
        group = _group_of_zero(layers, zero)
    elif beside_shards is not None:
        group = beside_shards.group
    elif any(layer.is_flat for layer in layers):
        raise CannotMoveRanks(
            "FullyShardedDataParallel (FSDP 1) holds the adapters as parts of flat tensors. Take "
            "torch.distributed.fsdp.fully_shard in its place"
        )
    elif adapters_are_sharded(layers):
        group = _group_of_shards(layers)
    else:
        group = _group_of_replicas(layers)
    if _any_is_part(optimizers):
        raise CannotMoveRanks(
            "ZeroRedundancyOptimizer gives each process a part of the adapters. Take a plain optimizer"
        )
    replicas = ReplicaGroup(group, layers[0].lora_A.device)
    if zero is None:
        replicas.check_alike(adapters, gates)
        same = {**same, "the adapters' parameters that optimizers hold": _held_parameters(adapters, optimizers)}
    _compare(replicas, same)
    return replicas


def _group_of_zero(layers: Sequence[L1RALinear], zero: ZeroOptimizer) -> Any:
    _check_reserve("DeepSpeed", layers)
    if why := zero.why_fixed():
        raise CannotMoveRanks(why)
    return zero.group


def _group_of_replicas(layers: Sequence[L1RALinear]) -> Any:
    wrapper = _wrapper_of(layers)
    _check_reserve("DistributedDataParallel", layers)
    if wrapper._join_config.enable:
        raise CannotMoveRanks("under Join processes stop at different steps. Give all of them as many batches")
    if _averages_weights(wrapper):
        raise CannotMoveRanks(
            "post_localSGD_hook lets the replicas differ until their weights are averaged. Register another "
            "communication hook, or none"
        )
    return wrapper.process_group


def _check_reserve(engine: str, layers: Sequence[L1RALinear]) -> None:
    if any(layer.reserve is None for layer in layers):
        raise CannotMoveRanks(
            f"{engine} needs tensors that keep their shapes. Pass reserve=<rows> to l1ra.patch, to begin with four "
            "times the mean rank"
        )


def _compare(replicas: ReplicaGroup, same: Mapping[str, Any]) -> None:
    """
    Raises:
        CannotMoveRanks: a value differs between the processes. All of them raise it.
    """
    found = replicas.gather(dict(same))
    for name in same:
        values = [part[name] for part in found]
        if any(value != values[0] for value in values):
            told = " and ".join(dict.fromkeys(str(value) for value in values))
            raise CannotMoveRanks(f"its processes differ in {name}: {told}. Give all of them the same")


def _group_of_shards(layers: Sequence[L1RALinear]) -> Any:
    """The processes among which FSDP 2 has divided the adapters."""
    _check_reserve("fully_shard", layers)
    params = [param for layer in layers for param in (layer.lora_A, layer.gate, layer.lora_B)]
    meshes = {param.device_mesh if is_sharded(param) else None for param in params}
    if len(meshes) > 1:
        raise CannotMoveRanks(
            "some adapters are sharded and others are not, or among other processes. Call fully_shard after "
            "l1ra.patch, with the same mesh for all modules"
        )
    if any(part_of(param) is None for param in params):
        raise CannotMoveRanks("adapters are divided along several dimensions. Shard them by fully_shard alone")
    return group_of(meshes.pop())


# A wrapped model has no reference to its wrapper. torch reports each module that is put into another one, so wrappers
# are recorded when they are constructed, with the ids of the parameters that they contained, and whether they required
# a gradient: only such gradients are averaged.
_wrapped: WeakKeyDictionary[DistributedDataParallel, dict[int, bool]] = WeakKeyDictionary()


def _record_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and name == "module" and submodule is not None:
        averaged = {id(param) for param in module._delay_all_reduce_params}  # DDP itself lists them as ignored, too
        _wrapped[module] = {
            id(param): param.requires_grad
            for key, param in submodule.named_parameters()
            if key not in module.parameters_to_ignore or id(param) in averaged
        }


register_module_module_registration_hook(_record_wrapper)


def _wrapper_of(layers: Sequence[L1RALinear]) -> DistributedDataParallel:
    mine = {id(layer) for layer in layers}
    wrappers = [w for w in _wrapped if mine <= {id(module) for module in w.modules()}]
    if not wrappers:
        raise CannotMoveRanks(
            "no DistributedDataParallel holds the adapters, so that each process trains for itself, or something else "
            "averages the gradients, as DeepSpeed's stage 0 does: take stage 1. Wrap the model, and do it anew if its "
            "wrapper is a copy or was unpickled. A Trainer that has evaluated before it trains wraps no model: pass "
            "eval_on_start=True in place of calling evaluate() first"
        )
    params = [param for layer in layers for param in (layer.lora_A, layer.gate, layer.lora_B)]
    there = [w for w in wrappers if all(id(param) in _wrapped[w] for param in params)]
    if not there:
        raise CannotMoveRanks(
            "DistributedDataParallel was constructed before the adapters, or was told to ignore them, so that it does "
            "not average their gradients. Call l1ra.patch first, and let it ignore none of their parameters"
        )
    for wrapper in there:
        if all(_wrapped[wrapper][id(param)] for param in params if param.requires_grad):
            return wrapper
    raise CannotMoveRanks(
        "some adapters were frozen when DistributedDataParallel was constructed, so that it does not average their "
        "gradients. Construct it when all parameters to be trained require a gradient"
    )


def clear_unused_gradients(layers: Iterable[L1RALinear]) -> None:
    """Before a step: set the gradients of the reserved rows beyond the ranks to 0, where the gradients of ``layers``
    pass a communication hook of DistributedDataParallel.

    A hook that compresses gradients, such as PowerSGD, returns something else there. An optimizer would move these
    rows, and the rank could no longer be told from a saved adapter.
    """
    layers = list(layers)
    # A wrapper whose construction has failed has none.
    hooked = [ids for wrapper, ids in _wrapped.items() if getattr(wrapper, "_comm_hooks", ())]
    if any(id(layer.lora_A) in ids for ids in hooked for layer in layers):
        unused = [
            param.grad[layer.rank :]
            for layer in layers
            for param in (layer.lora_A, layer.lora_B)
            if layer.reserve is not None and param.grad is not None
        ]
        if unused:
            torch._foreach_zero_(unused)


def _averages_weights(wrapper: DistributedDataParallel) -> bool:
    """Whether the processes average their weights from time to time, in place of their gradients."""
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    return any(isinstance(state, PostLocalSGDState) for _, state in wrapper._comm_hooks)


def _held_parameters(adapters: Mapping[str, L1RALinear], optimizers: Sequence[Optimizer]) -> str:
    """The parameters of the adapters that the optimizers of this process hold, as a number and a checksum."""
    held = {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    names = [f"{n}.{part}" for n, a in adapters.items() for part in ADAPTER_PARAMETERS if id(getattr(a, part)) in held]
    return f"{len(names)} (checksum {zlib.crc32(' '.join(names).encode()):08x})"


def _any_is_part(optimizers: Iterable[Optimizer]) -> bool:
    """Whether a ZeroRedundancyOptimizer is among them. It steps the optimizer of its own part within its step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in optimizers)
