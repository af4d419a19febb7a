"""The frozen layers that can be adapted, and what of them the kernels may use directly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["base_features", "dense_weight", "foreign", "is_conv1d"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a Linear with its weight transposed."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def base_features(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a layer that can be adapted, None for any other."""
    # Attention modules read this class's weight without calling it: an adapter on it would do nothing.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or _linear_by_inheritance_only(module):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _linear_by_inheritance_only(module: nn.Module) -> bool:
    """Whether a model of transformers makes something else of ``nn.Linear``, such as a router that returns scores."""
    forward = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return forward.__module__.startswith("transformers.models.") and forward.__name__ != "FalconLinear"


def dense_weight(base: nn.Module) -> Tensor:
    """The weight as ``(out_features, in_features)``."""
    return base.weight.t() if is_conv1d(base) else base.weight


def foreign(base: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Why the product with the weight has to be left to ``base`` itself for such an input; "" if it need not."""
    kind = type(base).__name__
    if type(base) is not nn.Linear and not (kind == "Conv1D" and is_conv1d(base)):
        return f"a {kind} has a forward of its own"
    weight, bias = base.weight, base.bias
    if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2:
        return f"its weight is a {type(weight).__name__} of shape {tuple(weight.shape)}"
    if "forward" in base.__dict__:
        return "its forward was replaced"
    if base._forward_hooks or base._forward_pre_hooks:
        return "its base layer has hooks"
    if base._backward_hooks or base._backward_pre_hooks:
        return "its base layer has hooks"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its base layer is trained"
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return f"its input is {_name(dtype)}, its weight {_name(weight.dtype)}"
    if weight.device != device:
        return f"its input is on {device}, its weight on {weight.device}"
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        lowered = torch.get_autocast_dtype(kind)
        return "" if lowered == dtype else f"autocast makes {_name(lowered)} of its {_name(dtype)} input"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
