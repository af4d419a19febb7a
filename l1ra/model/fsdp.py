"""Arguments of ``torch.distributed.fsdp.fully_shard`` with which a reallocation gathers nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from l1ra.layers.adapted_model import find_adapters
from l1ra.processes.group import world_size

__all__ = ["fsdp"]


def fsdp(model: nn.Module, processes: int | None = None) -> dict[str, Any]:
    """Keyword arguments for ``fully_shard`` by which adapters are split along their features.

    Without them ``fully_shard`` splits A and B along their ranks, and ranks move as well, but each reallocation gathers
    all adapters with their optimizer state in every process. With them each process holds some columns of all ranks,
    and moves its own.

    Example::

        controller = l1ra.patch(model, budget=448, total_steps=1000, reserve=32)
        for layer in model.model.layers:
            fully_shard(layer, **l1ra.fsdp(model))
        fully_shard(model, **l1ra.fsdp(model))

    Args:
        model: a patched model.
        processes: the number among which ``fully_shard`` splits, if it is not that of torch.distributed. A and B whose
            features it does not divide are split along their ranks.

    Raises:
        ValueError: the model has no adapter; or A and B have another dtype than the gates, which ``fully_shard`` does
            not take.
    """
    from torch.distributed.tensor import Shard

    layers = [layer for _, layer in find_adapters(model)]
    if not layers:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) before fully_shard.")
    if mixed := next((layer for layer in layers if layer.lora_A.dtype != layer.gate.dtype), None):
        raise ValueError(
            f"the adapters are {mixed.lora_A.dtype} and their gates {mixed.gate.dtype}, and fully_shard takes one. "
            'Pass adapter_dtype="float32" to l1ra.patch, and MixedPrecisionPolicy(param_dtype=torch.bfloat16) to '
            "fully_shard to compute in bfloat16; or call model.bfloat16() after l1ra.patch: the controller has copies "
            "of the gates in float32."
        )
    count = world_size() if processes is None else processes
    split = {id(param) for layer in layers for param in (layer.lora_A, layer.lora_B) if param.shape[1] % count == 0}
    return {"shard_placement_fn": lambda param: Shard(1) if id(param) in split else None}
