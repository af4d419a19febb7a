"""Merge all adapters of a model into the base weights, and restore the base weights (``unmerge``)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import reduce
from operator import add

from torch import nn

from l1ra.layers.adapted_model import check_whole, find_adapters
from l1ra.layers.linear import L1RALinear
from l1ra.layers.merged_weight import check_mergeable

__all__ = ["merge", "unmerge"]


def merge(model: nn.Module) -> nn.Module:
    """Add each adapter to its base weight, in place. Until :func:`unmerge` the model computes with these weights alone.

    Either all adapters are merged or none. The original weights are kept in memory beside the merged ones;
    ``l1ra.unpatch(model, merge=True)`` drops the original weights and the adapters.

    Floating-point weights are rounded once, to their own dtype. 4-bit and 8-bit weights of bitsandbytes are dequantised
    and quantised again with their own settings; a ``UserWarning`` states the error.

    Example::

        l1ra.merge(model)
        logits = model(input_ids).logits  # without the cost of the adapters

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no adapter, or an adapted weight is also used by another module. The model is
            unchanged.
        RuntimeError: an adapter is merged already, or disabled, or a part of a flat tensor of FSDP 1. The model is
            unchanged.
        TypeError: an adapter can't be added to its weight, e.g. a weight of GPTQ, AWQ or torchao. The model is
            unchanged.
    """
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    check_whole(adapters)
    _check_not_tied(model, adapters)
    for name, layer in adapters.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged already: call l1ra.unmerge(model) first.")
        check_mergeable(layer.base_layer, name)
    done, errors = [], []
    try:
        for layer in adapters.values():
            error = layer.merge_without_warning()
            done.append(layer)
            if error is not None:
                errors.append(error)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if errors:
        warnings.warn(str(reduce(add, errors)), stacklevel=2)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Restore the original weights of all merged adapters, in place and bit for bit.

    Example::

        l1ra.unmerge(model)
        model.train()

    Returns:
        ``model``.

    Raises:
        RuntimeError: no adapter is merged.
    """
    merged = [layer for _, layer in find_adapters(model) if layer.merged]
    if not merged:
        raise RuntimeError("no adapter of the model is merged: call l1ra.merge(model) first.")
    for layer in merged:
        layer.unmerge()
    return model


def _check_not_tied(model: nn.Module, adapters: dict[str, L1RALinear]) -> None:
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for param in module._parameters.values():
            owners[id(param)].append(name)
    for name, layer in adapters.items():
        own = f"{name}.base_layer" if name else "base_layer"
        others = [owner for owner in owners[id(layer.base_layer._parameters.get("weight"))] if owner != own]
        if others:
            raise ValueError(
                f"{name} shares its weight with {', '.join(others)}, which the merge would change as well: give {name} "
                "a copy of the weight first, or use l1ra.export_peft."
            )
