"""Merging an adapter into the weight of a frozen layer, quantised or not, and restoring the weight exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from l1ra.layers.base_layers import FLOATS, bnb_kind, has_own_forward
from l1ra.layers.precision import widest_float
from l1ra.layers.sharding import is_sharded

__all__ = [
    "OriginalWeight",
    "Rounding",
    "add_to_weight",
    "check_mergeable",
    "restore_weight",
    "weight_with",
    "why_not_exactly_mergeable",
]


@dataclass(frozen=True)
class Rounding:
    """The rounding error of merging into quantised weights, as sums of squares over their elements.

    The roundings of several layers can be added. ``str()`` gives the text of a warning.

    Attributes:
        kind: ``"4-bit"``, ``"8-bit"`` or ``"4-bit and 8-bit"``.
        error: sum of squares of the difference between the quantised and the exact merged weight.
        change: sum of squares of the change by the adapter.
        weight: sum of squares of the exact merged weight.
    """

    kind: str
    error: float
    change: float
    weight: float

    def __add__(self, other: Rounding) -> Rounding:
        kind = self.kind if other.kind in self.kind else f"{self.kind} and {other.kind}"
        return Rounding(kind, self.error + other.error, self.change + other.change, self.weight + other.weight)

    def __str__(self) -> str:
        error, change = ((part / self.weight) ** 0.5 if self.weight else 0.0 for part in (self.error, self.change))
        return (
            f"merged into {self.kind} weights: quantising them again changes them by {error:.2%} of their norm, the "
            f"adapters by {change:.2%}. The outputs differ by about as much now. unmerge() restores the original bits, "
            "and l1ra.export_peft keeps the adapters apart."
        )


@dataclass(frozen=True)
class OriginalWeight:
    """A weight before the merge.

    Attributes:
        weight: a copy, or for a quantised weight the original Parameter.
        state: for an 8-bit weight ``CB`` and ``SCB`` of the state of its layer.
    """

    weight: Tensor
    state: tuple[Tensor | None, ...] = ()


def check_mergeable(base: nn.Module, name: str = "the adapter") -> None:
    """Check that an adapter can be merged into the weight of ``base``.

    Args:
        name: name of the adapter, for the message.

    Raises:
        TypeError: it can't; the message says why.
    """
    if computed := _computed_weight(base):
        raise TypeError(
            f"{name} can't be merged: its weight is computed by {computed} for its base_layer makes it a plain one. "
            "Call it to merge, or keep the adapters apart: l1ra.export_peft(model, directory)."
        )
    if is_sharded(base._parameters.get("weight")):
        raise TypeError(
            f"{name} can't be merged: its weight is a DTensor, of which each process holds a part. Write the adapters "
            "with controller.save(folder) in all processes, and merge them in a fresh model: l1ra.load(model, folder), "
            "l1ra.merge(model)."
        )
    reason = _why_not_mergeable(base)
    if reason:
        raise TypeError(
            f"{name} can't be merged: {reason}. Load the model in a floating-point dtype to merge, or keep the "
            "adapters apart: l1ra.export_peft(model, directory)."
        )


def why_not_exactly_mergeable(base: nn.Module) -> str:
    """Why :func:`weight_with` can't add to the weight of ``base``; empty if it can."""
    kind = bnb_kind(base)
    return f"its weight is quantised ({kind})" if kind else _why_not_mergeable(base)


def _computed_weight(base: nn.Module) -> str:
    """What computes the weight of ``base`` from other parameters, and the function that ends it; "" if nothing does."""
    if parametrize.is_parametrized(base, "weight"):
        kinds = ", ".join(type(each).__name__.strip("_") for each in base.parametrizations["weight"])
        return f"the parametrization {kinds}; torch.nn.utils.parametrize.remove_parametrizations"
    if any(isinstance(hook, BasePruningMethod) for hook in base._forward_pre_hooks.values()):
        return "pruning; torch.nn.utils.prune.remove"
    if "weight_g" in base._parameters:
        return "weight_norm; torch.nn.utils.remove_weight_norm"
    if "weight_orig" in base._parameters:
        return "spectral_norm; torch.nn.utils.remove_spectral_norm"
    return ""


def _why_not_mergeable(base: nn.Module) -> str:
    # remove_parametrizations leaves some frozen weights as buffers.
    kind, weight = bnb_kind(base), base._parameters.get("weight", base._buffers.get("weight"))
    if kind == "4-bit" and weight.quant_state is None:
        return "its weight is not quantised yet"
    if kind == "8-bit" and weight.dtype != torch.int8:
        return "it quantises its floating-point weight anew at each call"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device"
    if kind:
        return ""
    if has_own_forward(base):
        return f"a {type(base).__name__} has a forward of its own"
    if weight is None:
        return "it has no weight of its own"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return ""


@torch.no_grad()
def add_to_weight(base: nn.Module, delta: Tensor) -> tuple[OriginalWeight, Rounding | None]:
    """Add ``delta`` to the weight of ``base``, in place.

    The sum is computed in the wider of the two dtypes and rounded once. A 4-bit or 8-bit weight of bitsandbytes is
    dequantised, and the sum is quantised with the same settings.

    Args:
        delta: in the shape of the weight, or ``(out_features, in_features)`` for a quantised weight.

    Returns:
        The original weight for :func:`restore_weight`, and the rounding error of a quantised weight, None for any other
        weight.

    Raises:
        TypeError: nothing can be added to the weight, see :func:`check_mergeable`.
    """
    check_mergeable(base)
    kind, old = bnb_kind(base), base.weight
    if not kind:
        original = OriginalWeight(old.detach().clone())
        old.copy_(weight_with(base, delta))
        return original, None
    original = OriginalWeight(old) if kind == "4-bit" else OriginalWeight(old, (base.state.CB, base.state.SCB))
    exact = _dequantised(old, base)
    exact = exact + delta.to(exact.dtype)
    new = _quantised_like(old, exact)
    error, change, weight = (
        part.to(widest_float(part.device)).square().sum().item()
        for part in (_dequantised(new, base) - exact, delta, exact)
    )
    base.weight = new
    if kind == "4-bit":
        new.module, base.quant_state = base, new.quant_state
    return original, Rounding(kind, error, change, weight)


@torch.no_grad()
def weight_with(base: nn.Module, delta: Tensor) -> Tensor:
    """The floating-point weight of ``base`` plus ``delta``, computed in the wider of the two dtypes and rounded once.

    Returns:
        A new tensor in the shape and dtype of the weight.
    """
    wide = torch.promote_types(delta.dtype, base.weight.dtype)
    return (base.weight.to(wide) + delta.to(wide)).to(base.weight.dtype)


@torch.no_grad()
def restore_weight(base: nn.Module, original: OriginalWeight) -> None:
    """Undo :func:`add_to_weight`: the weight has its original bits again."""
    kind, device = bnb_kind(base), base.weight.device
    if not kind:
        base.weight.copy_(original.weight)
        return
    base.weight = original.weight if original.weight.device == device else original.weight.to(device)
    if kind == "4-bit":
        base.quant_state = base.weight.quant_state
    else:
        base.state.CB, base.state.SCB = (None if part is None else part.to(device) for part in original.state)


def _dequantised(weight: nn.Parameter, base: nn.Module) -> Tensor:
    """``weight``, in the format of ``base``, as ``(out_features, in_features)`` float32."""
    from bitsandbytes import functional

    if bnb_kind(base) == "4-bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    # bitsandbytes moves the scales from the weight to the state of the layer at the first call of the layer.
    return functional.int8_vectorwise_dequant(weight.data, base.state.SCB if weight.SCB is None else weight.SCB)


def _quantised_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """``values``, ``(out_features, in_features)``, quantised with the settings of ``old`` and on its device."""
    if hasattr(old, "quant_state"):
        settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        new = type(old)(values.to(old.quant_state.dtype), **{name: getattr(old, name) for name in settings})
    else:
        # Int8Params.to quantises a floating-point weight only if it is on the CPU.
        new = type(old)(values.cpu(), requires_grad=False, has_fp16_weights=False)
    return new.to(old.device)
