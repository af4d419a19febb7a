"""Frozen layers that can be adapted: how they are recognised, and whether the kernels can use their weight."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = [
    "FLOATS",
    "TENSOR_PARALLEL",
    "allow_packing",
    "base_features",
    "bnb_kind",
    "check_gradient",
    "dense_weight",
    "element_count",
    "fallback_reason",
    "has_own_forward",
    "is_conv1d",
    "is_partitioned",
    "is_tensor_parallel",
    "main_tensor",
    "prevent_packing",
    "tensor_of",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Names of the quantised weight in layers other than nn.Linear: GPTQ and AWQ, HQQ, compressed-tensors, AQLM. BitNet,
# EETQ and HIGGS name it "weight".
QUANTISED_WEIGHTS = ("qweight", "W_q", "weight_packed", "codes")
# Why an adapter can't be computed beside such a layer, for messages.
TENSOR_PARALLEL = (
    "under tensor parallelism (parallelize_module, tp_plan) each process computes a part of the layer, from a part of "
    "its input or of its output"
)
PACKS_ON_CPU = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' Linear4bit


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, a linear layer with a weight ``(in_features, out_features)``."""
    return any(map(_is_conv1d_class, type(module).__mro__))


def _is_conv1d_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def has_own_forward(base: nn.Module) -> bool:
    """Whether the class of ``base`` has another forward than ``nn.Linear`` or ``Conv1D``."""
    plain = next((cls for cls in type(base).__mro__ if cls is nn.Linear or _is_conv1d_class(cls)), None)
    return plain is None or type(base).forward is not plain.forward


def bnb_kind(module: nn.Module) -> str:
    """``"4-bit"`` or ``"8-bit"`` for a quantised linear layer of bitsandbytes, ``""`` for any other module."""
    kinds = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}
    found = (kinds.get(cls.__name__, "") for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes."))
    return next(filter(None, found), "")


def base_features(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a module that can be adapted, None for any other module.

    An ``nn.Linear`` and a ``Conv1D`` can be adapted, and so can a module that has a quantised weight and the attributes
    ``in_features`` and ``out_features`` (GPTQ: ``infeatures`` and ``outfeatures``).
    """
    # nn.MultiheadAttention reads the weight of this class without calling the module: an adapter would have no effect.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or _overrides_forward(module):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    tensors = {**module._buffers, **module._parameters}
    weight = tensors.get("weight")
    quantised = weight is not None and weight.dtype not in FLOATS
    if quantised or any(tensors.get(name) is not None for name in QUANTISED_WEIGHTS):
        for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
            sizes = tuple(getattr(module, name, None) for name in names)
            if all(isinstance(size, int) for size in sizes):
                return sizes
    return None


def _overrides_forward(module: nn.Module) -> bool:
    """Whether a transformers model derives another operation from ``nn.Linear``, such as a router that returns scores.

    ``FalconLinear`` overrides the forward, but computes what ``nn.Linear`` computes.
    """
    forward = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return forward.__module__.startswith("transformers.models.") and forward.__name__ != "FalconLinear"


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether the layer was divided among processes by torch's ``parallelize_module`` or transformers' ``tp_plan``.

    The weights of FSDP 2 are divided too, but are whole while the layer is computed.
    """
    own = vars(module)
    by_transformers = own.get("_hf_tp_plan") is not None or getattr(own.get("forward"), "__name__", "") == "tp_forward"
    return by_transformers or "_distribute_module_applied" in own


def main_tensor(base: nn.Module) -> Tensor:
    """The weight of ``base``, or its first parameter or buffer if it has none: it tells the device of the layer."""
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, Tensor) else next(itertools.chain(base.parameters(), base.buffers()))


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of ``module``, which may be None.

    For the code that runs at each forward: it avoids the search of ``nn.Module.__getattr__``. In a replica of
    ``nn.DataParallel``, parameters are plain attributes.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


def is_partitioned(param: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 has partitioned ``param``: it may be empty outside of the forward."""
    return hasattr(param, "ds_id")


def element_count(param: Tensor) -> int:
    """The number of elements of ``param``, also if it is partitioned."""
    return param.ds_numel if is_partitioned(param) else param.numel()


def dense_weight(base: nn.Module) -> Tensor:
    """The weight of a plain layer as ``(out_features, in_features)``, without a copy."""
    weight = tensor_of(base, "weight")
    return weight.t() if type(base) is not nn.Linear and is_conv1d(base) else weight


def prevent_packing(base: nn.Module) -> bool:
    """Keep bitsandbytes from repacking a 4-bit weight when it is first evaluated on a CPU with AVX512-BF16.

    No gradient passes through a repacked weight, and unpacking it rounds its scales.

    Returns:
        Whether bitsandbytes would have repacked it.

    Raises:
        ValueError: the weight has been repacked already.
    """
    if getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has packed the weight of the {type(base).__name__} for inference on this CPU when the model "
            "was evaluated, and no gradient passes through it: load the model anew, and patch it before evaluating it."
        )
    would_pack = bool(getattr(base, PACKS_ON_CPU, False))
    if would_pack:
        setattr(base, PACKS_ON_CPU, False)
    return would_pack


def allow_packing(base: nn.Module) -> None:
    """Undo a call of :func:`prevent_packing` that returned True."""
    setattr(base, PACKS_ON_CPU, True)


def check_gradient(base: nn.Module, x: Tensor, output: Tensor) -> None:
    """Check that ``output``, the result of ``base(x)``, is differentiable if ``x`` requires a gradient.

    Some kernels for quantised weights have no backward. The layers before them would silently not be trained.

    Raises:
        RuntimeError: ``x`` requires a gradient, but ``output`` does not.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if wanted and not output.requires_grad:
        raise RuntimeError(
            f"no gradient passes through the {type(base).__name__}, so the layers before it would not be trained: load "
            "the model with kernels that have a backward."
        )


def fallback_reason(base: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels can't compute the product with the weight, so that the forward of ``base`` has to.

    Args:
        base: the base layer.
        device, dtype: of the input.

    Returns:
        The reason in words, ``""`` if the kernels can compute it.
    """
    cls = type(base)
    if cls is not nn.Linear and not (cls.__name__ == "Conv1D" and is_conv1d(base)):
        return f"a {cls.__name__} has a forward of its own"
    weight, bias = tensor_of(base, "weight"), tensor_of(base, "bias")
    if weight is None:
        return "it has no weight of its own"
    if type(weight) not in (nn.Parameter, Tensor) or weight.ndim != 2:
        return f"its weight is a {type(weight).__name__} of shape {tuple(weight.shape)}"
    if "forward" in base.__dict__:
        return "its forward was replaced"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "its base layer has hooks"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its base layer is trained"
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return f"its input is {_name(dtype)}, its weight {_name(weight.dtype)}"
    if weight.device != device:
        return f"its input is on {device}, its weight on {weight.device}"
    kind = device.type
    # The meta device has no autocast. torch.compile can't trace torch.amp.is_autocast_available (torch 2.11).
    if kind != "meta" and torch.is_autocast_enabled(kind):
        lowered = torch.get_autocast_dtype(kind)
        return "" if lowered == dtype else f"autocast makes {_name(lowered)} of its {_name(dtype)} input"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
