"""Put adapters into a model, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from l1ra.allocation.costs import check_budget, rank_cap, rank_cost
from l1ra.allocation.plan import spread_evenly
from l1ra.config import L1RAConfig
from l1ra.integrations import save_pretrained
from l1ra.layers.adapted_model import controller_of, find_adapters
from l1ra.layers.base_layers import base_features
from l1ra.layers.linear import L1RALinear
from l1ra.layers.padded_weight import PaddedWeight, padding_pays_off
from l1ra.layers.shared_input import share_inputs
from l1ra.model.merge import merge as merge_adapters
from l1ra.model.targets import describe_unadapted, optional_submodule, saved_modules, select_targets
from l1ra.training.controller import RankController

__all__ = ["check_unpatched", "patch", "unpatch"]

UNDO = "_l1ra_undo"
QUANTISED = "is_quantized"  # of transformers' models
SEVERAL = (
    "For several side by side, train one after the other, write each with l1ra.export_peft, and load them with "
    "PeftModel.load_adapter."
)


def patch(
    model: nn.Module,
    budget: int,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    preset: str | None = None,
    config: L1RAConfig | None = None,
    auto: bool = True,
    **overrides: Any,
) -> RankController:
    """Freeze ``model`` and put adapters under a rank budget into it, in place.

    The model's output does not change by a bit. Nothing else needs to be called: the controller hears the steps of
    whichever torch optimizer trains the model.

    Args:
        model: any module; a transformers model as a rule.
        budget: what all adapters' ranks together may cost: the sum of the ranks, or with ``budget_unit="params"``
            the number of adapter parameters. Spread evenly at first.
        target_modules: as in PEFT: ``"all-linear"`` (every linear layer, quantised ones too, but the output head and
            what shares its weight with another module), a regular expression for the whole name, or a list of names or
            their last components.
        modules_to_save: names of modules to train in full, e.g. a new head. None: the head of a transformers model for
            classification or question answering; ``[]``: none.
        preset: ``"default"`` or ``"reference"``, in place of ``config``.
        config: settings; ``overrides`` replace single fields of it (see ``L1RAConfig``).
        auto: listen to optimizers; with False call ``controller.step(optimizer)`` after each step.

    Returns:
        The controller, which the model holds too.

    Raises:
        ValueError, TypeError: the message says what to write instead; the model is untouched.
        RuntimeError: ``strict`` is set and an adapter would run as plain PyTorch; the model is untouched.
    """
    check_unpatched(model)
    if preset is not None and config is not None:
        raise ValueError("pass preset or config, not both: L1RAConfig.from_preset(preset) makes a config.")
    config = L1RAConfig.from_preset(preset or "default") if config is None else config
    if not isinstance(config, L1RAConfig):
        raise TypeError(
            f"config must be an L1RAConfig, not {type(config).__name__}; a preset's name goes into preset=."
        )
    if "adapter_name" in overrides:
        raise TypeError(f"adapter_name: a model has one set of adapters, without a name. {SEVERAL}")
    config = config.replace(**overrides)
    check_budget(budget)
    saved = saved_modules(model, modules_to_save)
    targets = select_targets(model, target_modules, saved)
    left = describe_unadapted(model, saved) if target_modules == "all-linear" else ""
    sizes = [base_features(module) for module in targets.values()]
    caps = [rank_cap(*size, config) for size in sizes]
    low = next((i for i, cap in enumerate(caps) if cap < config.min_rank), None)
    if low is not None:
        raise ValueError(f"min_rank {config.min_rank} is above the largest rank of {list(targets)[low]}, {caps[low]}.")
    costs = [rank_cost(*size, config) for size in sizes]
    ranks = spread_evenly(budget, costs, caps)
    if min(ranks) < config.min_rank:
        need = config.min_rank * sum(costs)
        raise ValueError(
            f"a budget of {budget} can't give every adapter min_rank {config.min_rank}: write {need} or more."
        )

    # Built before the model is touched: whatever fails, fails here.
    required = [(p, p.requires_grad) for p in model.parameters()]
    generator = torch.Generator().manual_seed(config.seed)
    swaps: list[tuple[nn.Module, str, nn.Module, L1RALinear]] = []
    adapters: dict[int, L1RALinear] = {}
    try:
        for module, size, rank in zip(targets.values(), sizes, ranks, strict=True):
            adapters[id(module)] = L1RALinear.from_linear(
                module,
                rank=rank,
                alpha=config.alpha,
                rank_stabilized=config.rank_stabilized,
                scale_with_rank=config.scale_with_rank,
                dropout=config.dropout,
                init=config.init,
                adapter_dtype=config.dtype,
                reserve=None if config.reserve is None else min(config.reserve, *size),
                generator=generator,
            )
        # A layer that is shared between parents is replaced in all of them.
        for layer in adapters.values():
            path = layer.kernel_path()
            if config.strict and not path.fused:
                raise RuntimeError(f"strict=True, but the adapters would run as plain PyTorch: {path.reason}.")
            layer.strict = config.strict
            if config.augment and type(layer.base_layer) is nn.Linear:
                layer.padded_weight = (
                    PaddedWeight() if padding_pays_off(layer.in_features, layer.out_features) else None
                )
        for parent in model.modules():
            for name, child in parent._modules.items():
                if id(child) in adapters:
                    swaps.append((parent, name, child, adapters[id(child)]))
        for parent, name, _, adapter in swaps:
            parent._modules[name] = adapter
        model.requires_grad_(False)
        for layer in adapters.values():
            for param in (layer.lora_A, layer.gate, layer.lora_B):
                param.requires_grad_(True)
        for module in saved.values():
            module.requires_grad_(True)
        share_inputs(model, adapters.values())
        controller = RankController(model, budget, config=config, auto=auto)
    except BaseException:
        for layer in adapters.values():
            layer.restore_base()
        _restore(swaps, required)
        raise
    hook = _let_gradients_through(model)
    undo = _Undo(swaps, required, hook, getattr(model, QUANTISED, False))
    if undo.quantised:
        # transformers.Trainer refuses quantised models whose adapters it does not know.
        setattr(model, QUANTISED, False)
    object.__setattr__(model, UNDO, undo)
    save_pretrained.override(model)
    if left:
        warnings.warn(left, stacklevel=2)
    return controller


def unpatch(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Give the original modules back, the very objects, with the ``requires_grad`` they had; the adapters are dropped.

    Modules in ``modules_to_save`` keep what they have learned.

    Args:
        merge: keep the adapters' effect in the weights, as :func:`l1ra.merge` puts it there, if it has not been called
            already. Otherwise the weights are those before :func:`patch`, bit for bit.

    Returns:
        ``model``.

    Raises:
        ValueError: the model was not patched.
        ValueError, RuntimeError, TypeError: with ``merge``, as :func:`l1ra.merge`; the model stays patched.
    """
    undo = getattr(model, UNDO, None)
    if undo is None:
        raise ValueError("the model was not patched by l1ra.patch, or has been unpatched already.")
    adapters = [layer for _, layer in find_adapters(model)]
    if merge and not all(layer.merged for layer in adapters):
        merge_adapters(model)
    for layer in adapters:
        layer.restore_base(keep_merged=merge)
    controller = controller_of(model)
    if controller is not None:
        controller.close()
    _restore(undo.swaps, undo.required)
    if undo.hook is not None:
        undo.hook.remove()
    if undo.quantised:
        setattr(model, QUANTISED, True)
    save_pretrained.restore(model)
    object.__delattr__(model, UNDO)
    return model


def check_unpatched(model: nn.Module) -> None:
    """Refuse a model that has adapters already, L1RA's or PEFT's.

    Raises:
        TypeError, ValueError: ``model`` is no module, or has adapters; the message says what to pass instead.
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


class _Undo:
    """What :func:`unpatch` needs."""

    def __init__(self, swaps: list, required: list, hook: RemovableHandle | None, quantised: bool) -> None:
        self.swaps, self.required, self.hook, self.quantised = swaps, required, hook, quantised


def _restore(swaps: list, required: list) -> None:
    for parent, name, original, _ in swaps:
        parent._modules[name] = original
    for param, flag in required:
        param.requires_grad_(flag)


def _checkpoints(model: nn.Module) -> bool:
    # transformers 5.2x renames the property, and warns at each use of the old name.
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))


def _let_gradients_through(model: nn.Module) -> RemovableHandle | None:
    """Make gradient checkpointing work, also the reentrant kind, which needs an input that requires a gradient.

    With frozen embeddings no input does; transformers mends that for PEFT models alone.
    """
    embeddings = optional_submodule(model, "get_input_embeddings")
    return None if embeddings is None else embeddings.register_forward_hook(_RequireGradient(model))


class _RequireGradient:
    """A forward hook, an object and not a closure: so that a copy or a pickle of the model has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (
            _checkpoints(self.model)
            and module.training
            and torch.is_grad_enabled()
            and isinstance(output, torch.Tensor)
        ):
            output.requires_grad_(True)
