"""Insert adapters into a model (``patch``) and remove them again (``unpatch``)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from l1ra.allocation.costs import check_budget, rank_cap, rank_cost, rows_to_reserve
from l1ra.allocation.plan import spread_evenly
from l1ra.config import L1RAConfig
from l1ra.integrations import save_pretrained
from l1ra.layers.adapted_model import MERGED_FOR_GOOD, controller_of, find_adapters, optional_submodule
from l1ra.layers.base_layers import base_features
from l1ra.layers.linear import L1RALinear
from l1ra.layers.padded_weight import PaddedWeight, padding_pays_off
from l1ra.layers.sharding import is_sharded
from l1ra.layers.shared_input import share_inputs
from l1ra.model.drawn_anew import drawn_anew, forget, mark, outside_warning
from l1ra.model.merge import merge as merge_adapters
from l1ra.model.targets import saved_modules, select_targets, tensor_parallel_warning, unadapted_warning
from l1ra.processes.group import launched_processes
from l1ra.training.controller import RankController

__all__ = ["check_unpatched", "patch", "unpatch"]

ORIGINAL = "_l1ra_original"  # attribute of a patched model: its _OriginalState
QUANTISED = "is_quantized"  # attribute of transformers' models
SEVERAL_ADAPTERS_HINT = (
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
    """Freeze ``model`` and insert adapters under a rank budget, in place.

    The output of the model stays the same, bit for bit. Nothing else needs to be called: the controller registers hooks
    that run at each step of every torch optimizer that trains the adapters.

    Example::

        controller = l1ra.patch(model, budget=256, target_modules=["q_proj", "v_proj"], total_steps=1000)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: any module, usually a transformers model.
        budget: upper limit for the sum of all adapters' ranks, or with ``budget_unit="params"`` for the number of
            adapter parameters. At first the budget is spread evenly over the adapters.
        target_modules: as in PEFT. ``"all-linear"``: every linear layer, also quantised ones, except the output head
            and layers that share their weight with another module. Any other string: a regular expression that matches
            the whole module name. A list: module names or their last components.
        modules_to_save: names of modules to train in full, e.g. a new head. None: the head of a transformers model for
            classification or question answering, and the modules that ``from_pretrained`` drew anew because the
            checkpoint does not have them (known from transformers 5 on). ``[]``: no module.
        preset: ``"default"`` or ``"reference"``; can't be combined with ``config``.
        config: settings.
        auto: register hooks on optimizers. If False, call ``controller.step(optimizer)`` after each optimizer step.
        overrides: replace single fields of ``config``, such as ``total_steps`` (needed in a loop of your own),
            ``alpha``, ``dropout``, ``budget_unit`` or ``reserve``; see :class:`L1RAConfig`.

    Returns:
        The controller. The model holds a reference to it.

    Raises:
        ValueError, TypeError: an argument is invalid; the message says what to write instead. The model is unchanged.
        RuntimeError: ``strict`` is set and an adapter would run as plain PyTorch. The model is unchanged.
    """
    check_unpatched(model)
    _check_weights(model)
    config = _resolve_config(preset, config, overrides)
    check_budget(budget)
    saved = saved_modules(model, modules_to_save, target_modules)
    targets = select_targets(model, target_modules, saved)
    left_out = (unadapted_warning, tensor_parallel_warning) if target_modules == "all-linear" else ()
    messages = [warning(model, saved) for warning in left_out]
    if modules_to_save is None or saved:
        messages.append(outside_warning(model, targets, saved))
    ranks = _initial_ranks(targets, budget, config)
    if config.reserve is None and (count := launched_processes()) > 1:
        config = config.replace(reserve=rows_to_reserve(ranks, config))
        messages.append(
            f"this is one of {count} processes, where adapters must keep their shapes: each gets reserve="
            f"{config.reserve} rows, and no rank above. Pass reserve=<rows> to choose another number."
        )
    anew = list(drawn_anew(model).values())

    original = _OriginalState.of(model)
    adapters: list[L1RALinear] = []
    try:
        # All adapters are built before the model is changed, so that an error in between leaves it unchanged.
        for adapter in _build_adapters(targets, ranks, config):
            adapters.append(adapter)
        _check_devices(dict(zip(targets, adapters, strict=True)))
        for adapter in adapters:
            _configure_kernels(adapter, config)
        original.replace(model, {id(base): a for base, a in zip(targets.values(), adapters, strict=True)})
        _set_trainable(model, adapters, saved.values())
        share_inputs(model, adapters)
        controller = RankController(model, budget, config=config, auto=auto)
    except BaseException:
        for adapter in adapters:
            adapter.restore_base()
        original.restore_modules()
        raise
    original.hook = _register_checkpointing_hook(model)
    if original.quantised:
        # transformers.Trainer rejects quantised models unless it finds adapters of a library that it knows.
        setattr(model, QUANTISED, False)
    object.__setattr__(model, ORIGINAL, original)
    save_pretrained.override(model)
    mark(model, anew)
    for message in filter(None, messages):
        warnings.warn(message, stacklevel=2)
    return controller


def unpatch(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Remove the adapters and put the original modules back, in place.

    The modules are the same objects as before :func:`patch`, and each parameter has its former ``requires_grad``.
    Modules in ``modules_to_save`` keep their trained values.

    Example::

        l1ra.unpatch(model, merge=True)
        model.save_pretrained("merged")

    Args:
        merge: add the adapters to the weights before they are removed, as :func:`l1ra.merge` does. Adapters that are
            merged already stay merged. If False, the weights are those before :func:`patch`, bit for bit.

    Returns:
        ``model``.

    Raises:
        ValueError: the model was not patched.
        RuntimeError: ``fully_shard`` has sharded the adapters. The model stays patched.
        ValueError, RuntimeError, TypeError: with ``merge``, those of :func:`l1ra.merge`. The model stays patched.
    """
    original = getattr(model, ORIGINAL, None)
    if original is None:
        raise ValueError("the model was not patched by l1ra.patch, or has been unpatched already.")
    adapters = [layer for _, layer in find_adapters(model)]
    if any(is_sharded(layer.lora_A) for layer in adapters):
        raise RuntimeError(
            "fully_shard has sharded the adapters together with the weights, and does not let them go: write them with "
            "controller.save(folder) in all processes, and load them into a fresh model with l1ra.load."
        )
    if merge and not all(layer.merged for layer in adapters):
        merge_adapters(model)
    for layer in adapters:
        layer.restore_base(keep_merged=merge)
    controller = controller_of(model)
    if controller is not None:
        controller.close()
    original.restore_modules()
    if original.hook is not None:
        original.hook.remove()
    if original.quantised:
        setattr(model, QUANTISED, True)
    save_pretrained.restore(model)
    forget(model)
    object.__delattr__(model, ORIGINAL)
    if merge:
        object.__setattr__(model, MERGED_FOR_GOOD, True)
    return model


def check_unpatched(model: nn.Module) -> None:
    """Check that ``model`` has no adapters of L1RA or PEFT.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has adapters; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}.")
    if controller_of(model) is not None or next(find_adapters(model), None) is not None:
        raise ValueError(
            f"the model is patched already: call l1ra.unpatch(model) first, or take a fresh one. "
            f"{SEVERAL_ADAPTERS_HINT}"
        )
    for name, module in model.named_modules():
        if any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__):
            where = f"{name} is a" if name else "the model is a"
            raise ValueError(
                f"{where} PEFT {type(module).__name__}: pass the plain model. peft_model.merge_and_unload() returns it "
                "with PEFT's adapter merged into the weights, peft_model.unload() without the adapter."
            )


def _check_weights(model: nn.Module) -> None:
    made_there = next((name for name, param in model.named_parameters() if param.is_inference()), None)
    if made_there is not None:
        raise ValueError(
            f"{made_there} was made in torch.inference_mode(), so that no gradient can pass it: build or load the "
            "model outside of it, or under torch.no_grad()."
        )


def _check_devices(adapters: Mapping[str, L1RALinear]) -> None:
    without_values = next((name for name, layer in adapters.items() if layer.lora_A.is_meta), None)
    if without_values is not None and hasattr(adapters[without_values].base_layer, "_hf_hook"):
        raise ValueError(
            f"{without_values} is offloaded by accelerate, and an offloaded model can't be trained: load it without "
            "offloading, quantised or spread over several GPUs if it must be smaller."
        )
    if without_values is not None:
        raise ValueError(
            f"{without_values} is on the meta device, without values: load the model's weights, for example with "
            "from_pretrained, before l1ra.patch."
        )


def _resolve_config(preset: str | None, config: L1RAConfig | None, overrides: dict[str, Any]) -> L1RAConfig:
    if preset is not None and config is not None:
        raise ValueError("pass preset or config, not both: L1RAConfig.from_preset(preset) makes a config.")
    config = L1RAConfig.from_preset(preset or "default") if config is None else config
    if not isinstance(config, L1RAConfig):
        raise TypeError(
            f"config must be an L1RAConfig, not {type(config).__name__}; a preset's name goes into preset=."
        )
    if "adapter_name" in overrides:
        raise TypeError(f"adapter_name: a model has one set of adapters, without a name. {SEVERAL_ADAPTERS_HINT}")
    return config.replace(**overrides)


def _initial_ranks(targets: Mapping[str, nn.Module], budget: int, config: L1RAConfig) -> list[int]:
    """The rank of each target's adapter at the start: the budget spread evenly."""
    sizes = [base_features(module) for module in targets.values()]
    caps = [rank_cap(*size, config) for size in sizes]
    for name, cap in zip(targets, caps, strict=True):
        if cap < config.min_rank:
            raise ValueError(f"min_rank {config.min_rank} is above the largest rank of {name}, {cap}.")
    costs = [rank_cost(*size, config) for size in sizes]
    ranks = spread_evenly(budget, costs, caps)
    if min(ranks) < config.min_rank:
        need = config.min_rank * sum(costs)
        raise ValueError(
            f"a budget of {budget} can't give every adapter min_rank {config.min_rank}: write {need} or more."
        )
    return ranks


def _build_adapters(targets: Mapping[str, nn.Module], ranks: Sequence[int], config: L1RAConfig) -> Iterator[L1RALinear]:
    generator = torch.Generator("cpu").manual_seed(config.seed)
    for base, rank in zip(targets.values(), ranks, strict=True):
        yield L1RALinear.from_linear(
            base,
            rank=rank,
            alpha=config.alpha,
            rank_stabilized=config.rank_stabilized,
            scale_with_rank=config.scale_with_rank,
            dropout=config.dropout,
            init=config.init,
            adapter_dtype=config.dtype,
            reserve=None if config.reserve is None else min(config.reserve, *base_features(base)),
            generator=generator,
        )


def _configure_kernels(layer: L1RALinear, config: L1RAConfig) -> None:
    """Apply the settings ``strict`` and ``augment``."""
    path = layer.kernel_path()
    if config.strict and not path.fused:
        raise RuntimeError(f"strict=True, but the adapters would run as plain PyTorch: {path.reason}.")
    layer.strict = config.strict
    if config.augment and type(layer.base_layer) is nn.Linear:
        layer.padded_weight = PaddedWeight() if padding_pays_off(layer.in_features, layer.out_features) else None


def _set_trainable(model: nn.Module, adapters: Sequence[L1RALinear], saved: Collection[nn.Module]) -> None:
    """Train the adapters and the modules ``saved``, and nothing else."""
    model.requires_grad_(False)
    for layer in adapters:
        for param in (layer.lora_A, layer.gate, layer.lora_B):
            param.requires_grad_(True)
    for module in saved:
        module.requires_grad_(True)


@dataclass
class _OriginalState:
    """The state of a model before :func:`patch`, from which :func:`unpatch` restores it.

    Attributes:
        requires_grad: each parameter and its ``requires_grad``.
        replaced: for each layer that an adapter has replaced: its parent, its name in the parent, and the layer.
        hook: of :func:`_register_checkpointing_hook`.
        quantised: the attribute ``is_quantized`` of a transformers model.
    """

    requires_grad: list[tuple[nn.Parameter, bool]]
    replaced: list[tuple[nn.Module, str, nn.Module]]
    hook: RemovableHandle | None
    quantised: bool

    @classmethod
    def of(cls, model: nn.Module) -> _OriginalState:
        """The state of ``model``, of which no layer is replaced yet."""
        return cls([(p, p.requires_grad) for p in model.parameters()], [], None, getattr(model, QUANTISED, False))

    def replace(self, model: nn.Module, adapters: Mapping[int, L1RALinear]) -> None:
        """Replace layers of ``model`` by their adapters.

        A layer that several parents share is replaced in all of them.

        Args:
            adapters: ``id`` of a layer -> its adapter.
        """
        # A list: modules() must not be iterated while modules are replaced.
        self.replaced = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if id(child) in adapters
        ]
        for parent, name, child in self.replaced:
            parent._modules[name] = adapters[id(child)]

    def restore_modules(self) -> None:
        """Put the replaced layers back, and restore ``requires_grad`` of all parameters."""
        for parent, name, child in self.replaced:
            parent._modules[name] = child
        for param, flag in self.requires_grad:
            param.requires_grad_(flag)


def _register_checkpointing_hook(model: nn.Module) -> RemovableHandle | None:
    """Make reentrant gradient checkpointing work with frozen embeddings.

    Reentrant checkpointing returns gradients only if an input of the checkpointed block requires a gradient. With
    frozen embeddings no input does. transformers handles this case for PEFT models only.

    Returns:
        The handle of a forward hook on the input embeddings; None if the model has none.
    """
    embeddings = optional_submodule(model, "get_input_embeddings")
    return None if embeddings is None else embeddings.register_forward_hook(_RequireGradient(model))


class _RequireGradient:
    """A forward hook after which the output requires a gradient, while ``model`` uses gradient checkpointing.

    The hook is an object and not a closure, so that a copy or a pickle of the model has a hook that refers to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (
            _uses_checkpointing(self.model)
            and module.training
            and torch.is_grad_enabled()
            and isinstance(output, torch.Tensor)
        ):
            output.requires_grad_(True)


def _uses_checkpointing(model: nn.Module) -> bool:
    # transformers 5.2x renames the property, and warns at each use of the old name.
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))
