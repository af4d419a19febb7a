"""Adding to the weight of a frozen layer, and giving it back bit for bit. Quantised weights are rounded anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l1ra.layers.base_layers import FLOATS, bnb_kind, has_own_forward
from l1ra.layers.precision import widest_float

__all__ = ["OriginalWeight", "Rounding", "add_to_weight", "check_mergeable", "restore_weight"]


@dataclass(frozen=True)
class Rounding:
    """What rounding to a quantised weight did, as sums of squares, which add up over layers.

    Attributes:
        kind: ``"4-bit"``, ``"8-bit"`` or both.
        error: of the rounded weight less the one that was to be stored.
        change: of the change that was to be made.
        weight: of the weight that was to be stored.
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
            f"merged into {self.kind} weights: rounding them anew changes them by {error:.2%} of their norm, the "
            f"adapters by {change:.2%}. So much do the outputs differ now; unmerge() gives the old bits back, and "
            "l1ra.export_peft keeps the adapters apart."
        )


@dataclass(frozen=True)
class OriginalWeight:
    """A weight as it was before something was added: a copy of it, or of quantised ones the very objects."""

    weight: Tensor
    state: tuple[Tensor | None, ...] = ()


def check_mergeable(base: nn.Module, name: str = "the adapter") -> None:
    """Raise a TypeError if nothing can be added to the weight of ``base``, whose adapter is called ``name``."""
    why = _obstacle(base)
    if why:
        raise TypeError(
            f"{name} can't be merged: {why}. Load the model in a floating-point dtype to merge, or keep the adapters "
            "apart: l1ra.export_peft(model, directory)."
        )


def _obstacle(base: nn.Module) -> str:
    kind, weight = bnb_kind(base), base._parameters.get("weight")
    if kind == "4-bit" and weight.quant_state is None:
        return "its weight is not quantised yet"
    if kind == "8-bit" and weight.dtype != torch.int8:
        return "it quantises its floating-point weight anew at each call"
    if kind:
        return "the weight is on the meta device" if weight.is_meta else ""
    if has_own_forward(base):
        return f"a {type(base).__name__} has a forward of its own"
    if weight is None:
        return "it has no weight of its own"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return ""


@torch.no_grad()
def add_to_weight(base: nn.Module, delta: Tensor) -> tuple[OriginalWeight, Rounding | None]:
    """Add ``delta``, in the layout of the weight, in the wider dtype of the two, and round once.

    A 4-bit or 8-bit weight of bitsandbytes is dequantised for that and quantised anew with the settings it had.

    Returns:
        What :func:`give_back` needs; what rounding did to a quantised weight, None for any other.

    Raises:
        TypeError: as :func:`check_mergeable`.
    """
    check_mergeable(base)
    kind, old = bnb_kind(base), base.weight
    if not kind:
        kept = OriginalWeight(old.detach().clone())
        wide = torch.promote_types(delta.dtype, old.dtype)
        old.copy_(old.to(wide) + delta.to(wide))
        return kept, None
    kept = OriginalWeight(old) if kind == "4-bit" else OriginalWeight(old, (base.state.CB, base.state.SCB))
    wanted = _dequantised(old, base)
    wanted = wanted + delta.to(wanted.dtype)
    new = _quantised_like(old, wanted)
    error, change, weight = (
        part.to(widest_float(part.device)).square().sum().item() for part in (_dequantised(new, base) - wanted, delta, wanted)
    )
    base.weight = new
    if kind == "4-bit":
        new.module, base.quant_state = base, new.quant_state
    return kept, Rounding(kind, error, change, weight)


@torch.no_grad()
def restore_weight(base: nn.Module, kept: OriginalWeight) -> None:
    """Undo :func:`add_to_weight`, bit for bit."""
    kind, device = bnb_kind(base), base.weight.device
    if not kind:
        base.weight.copy_(kept.weight)
        return
    base.weight = kept.weight if kept.weight.device == device else kept.weight.to(device)
    if kind == "4-bit":
        base.quant_state = base.weight.quant_state
    else:
        base.state.CB, base.state.SCB = (None if part is None else part.to(device) for part in kept.state)


def _dequantised(weight: nn.Parameter, base: nn.Module) -> Tensor:
    """``weight`` of ``base`` as ``(out_features, in_features)``, float32."""
    from bitsandbytes import functional

    if bnb_kind(base) == "4-bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    # The scales move from the weight to the state of the layer at its first call.
    return functional.int8_vectorwise_dequant(weight.data, base.state.SCB if weight.SCB is None else weight.SCB)


def _quantised_like(old: nn.Parameter, wanted: Tensor) -> nn.Parameter:
    if hasattr(old, "quant_state"):
        settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        new = type(old)(wanted.to(old.quant_state.dtype), **{name: getattr(old, name) for name in settings})
    else:
        # Only what comes from the CPU is quantised.
        new = type(old)(wanted.cpu(), requires_grad=False, has_fp16_weights=False)
    return new.to(old.device)
