"""What a model holds: adapters and the controller that drives them, and what is trained besides."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor, nn

from l1ra.layers.base_layers import base_features
from l1ra.layers.linear import L1RALinear, find_adapters
from l1ra.layers.low_rank import PARTS

if TYPE_CHECKING:
    from l1ra.training.controller import RankController

__all__ = [
    "CONTROLLER",
    "SEVERAL",
    "carried_tensors",
    "check_plain",
    "controller_of",
    "listed",
    "trained_modules",
    "trained_tensors",
]

CONTROLLER = "_l1ra_controller"  # the attribute of a model
SEVERAL = (
    "For several side by side, train one after the other, write each with l1ra.export_peft, and load them with "
    "PeftModel.load_adapter."
)


def controller_of(model: nn.Module) -> RankController | None:
    """The controller that drives the adapters of ``model``, if there is one."""
    return getattr(model, CONTROLLER, None)


def check_plain(model: nn.Module) -> None:
    """Refuse what has adapters already, L1RA's or PEFT's.

    Raises:
        TypeError, ValueError: it is no module, or not a plain one; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}.")
    if controller_of(model) is not None or next(find_adapters(model), None) is not None:
        raise ValueError(
            f"the model is patched already: call l1ra.unpatch(model) first, or take a fresh one. {SEVERAL}"
        )
    for name, module in model.named_modules():
        if any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__):
            where = f"{name} is a" if name else "the model is a"
            raise ValueError(
                f"{where} PEFT {type(module).__name__}: pass the plain model, "
                "peft_model.merge_and_unload() with what PEFT's adapter has learned or peft_model.unload() without it."
            )


def listed(names: Collection[str]) -> str:
    """Names for a message, the first ones of many."""
    first = ", ".join(list(names)[:8])
    return first if len(names) <= 8 else f"{first} and {len(names) - 8} more"


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, adapters apart, with parameters of their own that are trained, by each of their names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, L1RALinear)
        and any(p is not None and p.requires_grad for p in module._parameters.values())
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes outside of the adapters, by names in the state dict, each tensor by its first one: the
    parameters that are trained, those of an adapted layer too, and buffers, such as a normalisation's statistics."""
    adapters = {f"{name}.{part}" for name, _ in find_adapters(model) for part in PARTS}
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in adapters}
    for name, module in model.named_modules():
        # Those of a linear layer are its quantised weight, which no training changes.
        if base_features(module) is None:
            for key, value in module._buffers.items():
                if value is not None and key not in module._non_persistent_buffers_set:
                    found[f"{name}.{key}" if name else key] = value
    return found


def carried_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes, by names in the state dict: the adapters, all rows of them, and what
    :func:`trained_tensors` finds."""
    adapters = {f"{name}.{p}": getattr(layer, p).detach() for name, layer in find_adapters(model) for p in PARTS}
    return {**adapters, **trained_tensors(model)}
