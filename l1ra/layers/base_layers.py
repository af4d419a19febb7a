"""The frozen layers that can be adapted, and what of them the kernels may use directly."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = [
    "allow_packing",
    "base_features",
    "bnb_kind",
    "check_gradient",
    "dense_weight",
    "fallback_reason",
    "has_own_forward",
    "is_conv1d",
    "main_tensor",
    "prevent_packing",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where layers that are no nn.Linear keep their quantised weight: GPTQ and AWQ, HQQ, compressed-tensors, AQLM; others
# (BitNet, EETQ, HIGGS) call it "weight" all the same.
PACKED = ("qweight", "W_q", "weight_packed", "codes")
REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a Linear with its weight transposed."""
    return any(map(_is_conv1d_class, type(module).__mro__))


def _is_conv1d_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def has_own_forward(base: nn.Module) -> bool:
    """Whether the class of ``base`` does not compute as ``nn.Linear`` and ``Conv1D`` do."""
    plain = next((cls for cls in type(base).__mro__ if cls is nn.Linear or _is_conv1d_class(cls)), None)
    return plain is None or type(base).forward is not plain.forward


def bnb_kind(module: nn.Module) -> str:
    """Of a linear layer of bitsandbytes ``"4-bit"`` or ``"8-bit"``, "" of any other module."""
    kinds = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}
    found = (kinds.get(cls.__name__, "") for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes."))
    return next(filter(None, found), "")


def base_features(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a layer that can be adapted, None for any other.

    Besides an ``nn.Linear`` and a ``Conv1D`` it may be any module that says its sizes (``in_features`` and
    ``out_features``, or GPTQ's ``infeatures`` and ``outfeatures``) and holds a quantised weight.
    """
    # Attention modules read this class's weight without calling it: an adapter on it would do nothing.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or _linear_by_inheritance_only(module):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    own = {**module._buffers, **module._parameters}
    weight = own.get("weight")
    if any(own.get(name) is not None for name in PACKED) or (weight is not None and weight.dtype not in FLOATS):
        for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            sizes = tuple(getattr(module, name, None) for name in names)
            if all(isinstance(size, int) for size in sizes):
                return sizes
    return None


def _linear_by_inheritance_only(module: nn.Module) -> bool:
    """Whether a model of transformers makes something else of ``nn.Linear``, such as a router that returns scores."""
    forward = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return forward.__module__.startswith("transformers.models.") and forward.__name__ != "FalconLinear"


def main_tensor(base: nn.Module) -> Tensor:
    """The weight, or of a quantised layer without one whichever tensor comes first: it tells the device."""
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, Tensor) else next(itertools.chain(base.parameters(), base.buffers()))


def dense_weight(base: nn.Module) -> Tensor:
    """The weight as ``(out_features, in_features)``."""
    return base.weight.t() if is_conv1d(base) else base.weight


def prevent_packing(base: nn.Module) -> bool:
    """Keep bitsandbytes from packing a 4-bit weight anew when it is first evaluated on a CPU with AVX512-BF16.

    No gradient passes the packed weight, and unpacking rounds its scales.

    Returns:
        Whether it would have done so.

    Raises:
        ValueError: it is packed already.
    """
    if getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has packed the weight of the {type(base).__name__} for inference on this CPU when the model "
            "was evaluated, and no gradient passes it: load the model anew, and evaluate it when it is patched."
        )
    repacks = bool(getattr(base, REPACKS, False))
    if repacks:
        setattr(base, REPACKS, False)
    return repacks


def allow_packing(base: nn.Module) -> None:
    """Undo a :func:`prevent_packing` that has returned True."""
    setattr(base, REPACKS, True)


def check_gradient(base: nn.Module, x: Tensor, output: Tensor) -> None:
    """Raise a RuntimeError if ``output`` of ``base`` has no gradient where its input ``x`` needs one.

    Some kernels for quantised weights have no backward, and cut the layers before them off without a word.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if wanted and not output.requires_grad:
        raise RuntimeError(
            f"no gradient passes the {type(base).__name__}, so that the layers before it would learn nothing: load the "
            "model with kernels that have a backward."
        )


def fallback_reason(base: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Why the product with the weight has to be left to ``base`` itself for such an input; "" if it need not."""
    kind = type(base).__name__
    if type(base) is not nn.Linear and not (kind == "Conv1D" and is_conv1d(base)):
        return f"a {kind} has a forward of its own"
    weight, bias = getattr(base, "weight", None), base.bias
    if weight is None:
        return "it has no weight of its own"
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
    # The meta device has no autocast. torch.compile can't trace is_autocast_available, which says so, in torch 2.11.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        lowered = torch.get_autocast_dtype(kind)
        return "" if lowered == dtype else f"autocast makes {_name(lowered)} of its {_name(dtype)} input"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
