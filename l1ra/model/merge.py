"""All adapters of a model into their weights, and out again: every one of them or none."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import reduce
from operator import add

from torch import nn

from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.linear import L1RALinear
from l1ra.layers.merged_weight import check_mergeable

__all__ = ["merge", "unmerge"]


def merge(model: nn.Module) -> nn.Module:
    """Add each adapter into its base weight; then the model computes with these weights alone, until :func:`unmerge`.

    The weights that were there are kept beside the merged ones; ``l1ra.unpatch(model, merge=True)`` drops them, and the
    adapters. Floating-point weights are rounded once, to their own dtype. 4-bit and 8-bit weights of bitsandbytes are
    dequantised, and quantised anew with their own settings, with a ``UserWarning`` that states the error.

    Returns:
        ``model``.

    Raises:
        ValueError: no adapter, or a weight that another module has too; the model is untouched.
        RuntimeError: an adapter is merged already, or disabled; the model is untouched.
        TypeError: a weight to which nothing can be added, as GPTQ's, AWQ's or torchao's; the model is untouched.
    """
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    _refuse_tied(model, adapters)
    for name, layer in adapters.items():
        if layer.merged:
            raise RuntimeError(f"{name} is merged already: call l1ra.unmerge(model) first.")
        check_mergeable(layer.base_layer, name)
    done, roundings = [], []
    try:
        for layer in adapters.values():
            rounding = layer.merge_without_warning()
            done.append(layer)
            if rounding is not None:
                roundings.append(rounding)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if roundings:
        warnings.warn(str(reduce(add, roundings)), stacklevel=2)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give the weights of all merged adapters back, bit for bit.

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


def _refuse_tied(model: nn.Module, adapters: dict[str, L1RALinear]) -> None:
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for param in module._parameters.values():
            owners[id(param)].append(name)
    for name, layer in adapters.items():
        own = f"{name}.base_layer" if name else "base_layer"
        others = [owner for owner in owners[id(layer.base_layer._parameters.get("weight"))] if owner != own]
        if others:
            raise ValueError(
                f"{name} has its weight in common with {', '.join(others)}, which the merge would change as well: give "
                "it a copy of its own first, or use l1ra.export_peft."
            )
