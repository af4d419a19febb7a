"""Patch a model with a plain LoRA that PEFT has saved (``from_peft``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.allocation.costs import check_budget, rank_cap, rank_cost
from l1ra.allocation.plan import LayerPlan
from l1ra.config import L1RAConfig
from l1ra.files.peft_export import CONFIG, PREFIX, WEIGHTS, check_one_parent
from l1ra.files.schema import mismatch
from l1ra.layers.adapted_model import abbreviated, controller_of, find_adapters, name_before_patch, optional_submodule
from l1ra.layers.base_layers import FLOATS, base_features
from l1ra.layers.linear import L1RALinear
from l1ra.model.drawn_anew import mark
from l1ra.model.patch import check_unpatched, patch, unpatch
from l1ra.model.targets import name_matches
from l1ra.training.controller import RankController

__all__ = ["from_peft"]

# The settings in adapter_config.json whose values from_peft uses, and their types.
SETTINGS_SCHEMA = {
    "r": int,
    "lora_alpha": int | float,
    "rank_pattern": {str: int},
    "alpha_pattern": {str: int | float},
    "use_rslora": bool,
    "target_modules": [str],  # or a str, a regular expression
    "exclude_modules": [str],  # or a str, a regular expression
    "modules_to_save": [str],
}
USED = {*SETTINGS_SCHEMA, "peft_type", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"}
# The settings that do not change the function of a trained adapter. A setting that is neither used nor ignored may
# change it, and is an error unless it is unset.
IGNORED = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
IGNORED |= {"lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"}
IGNORED |= {"lora_ga_config", "qalora_group_size", "runtime_config"}
# The values of init_lora_weights with which PEFT leaves the base weight unchanged. With all others PEFT subtracts the
# initial B @ A from the base weight.
INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _PlainLora:
    """A LoRA as read from a directory.

    Attributes:
        layers: name of a layer -> A ``(r, in_features)`` and ``alpha / r * B.T`` ``(r, out_features)``.
        modules_to_save: names of the modules that are trained in full.
        saved_tensors: the tensors of these modules, by their names in the model's state dict.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    modules_to_save: list[str]
    saved_tensors: dict[str, Tensor]


def from_peft(
    model: nn.Module,
    directory: str | Path,
    budget: int | None = None,
    *,
    config: L1RAConfig | None = None,
    auto: bool = True,
    **overrides: Any,
) -> RankController:
    """Patch ``model`` with a plain LoRA that PEFT has saved, to continue its training with dynamic ranks.

    The patched model computes the same function as the model with the LoRA in PEFT: the same layers are adapted with
    the same ranks, all gates are 1, and the LoRA's ``modules_to_save`` are loaded and trained in full. Weights of the
    base model in the file, such as embeddings with new tokens, are loaded and stay frozen. The LoRA as it was loaded is
    kept as the reference of ``controller.disabled()``. PEFT need not be installed.

    Ranks whose rows of A and B are all zero, such as padding to a common rank, are not loaded. An adapter that has no
    other ranks gets one new rank with B = 0. The dropout is that of ``config``, not that of the LoRA.

    Example::

        controller = l1ra.from_peft(model, "my-lora", total_steps=1000)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: the base model of the LoRA, without adapters.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        budget: as in ``l1ra.patch``. None: the cost of the LoRA's ranks. If the budget is larger, the rest is spare and
            is given to adapters at the reallocations.
        config: settings; None means the default preset.
        auto: register hooks on optimizers. If False, call ``controller.step(optimizer)`` after each optimizer step.
        overrides: replace single fields of ``config``; see :class:`L1RAConfig`.

    Returns:
        The controller. The model holds a reference to it; ``l1ra.unpatch(model)`` removes the adapters.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError, TypeError: the LoRA is not a plain one, or does not fit the model, the budget or the settings. The
            model is unchanged.
        RuntimeError: ``strict`` is set and an adapter would run as plain PyTorch. The model is unchanged.
    """
    check_unpatched(model)
    if config is not None and not isinstance(config, L1RAConfig):
        raise TypeError(f"config must be an L1RAConfig, not {type(config).__name__}.")
    config = (config or L1RAConfig()).replace(**overrides)
    if budget is not None:
        check_budget(budget)
    lora = _read_lora(model, Path(directory))
    cost = _check_ranks(lora, config)
    if budget is not None and budget < cost:
        raise ValueError(f"the LoRA's ranks cost {cost} of a budget of {budget}: write budget={cost} or more.")

    _patch_with_rank_one(model, lora, config)
    try:
        controller_of(model).close()
        for name, layer in find_adapters(model):
            _load_adapter(layer, *lora.layers[name], config)
        controller = RankController(model, cost if budget is None else budget, config=config, auto=auto)
        state = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in lora.saved_tensors.items():
                state[name].copy_(value)
        mark(model, [state[name] for name in lora.saved_tensors])
        controller.set_reference()
    except BaseException:
        unpatch(model)
        raise
    return controller


def _check_ranks(lora: _PlainLora, config: L1RAConfig) -> int:
    """Check that ``config`` allows the ranks of the LoRA.

    Returns:
        Their cost, in the unit of the budget.
    """
    cost = 0
    for name, (a, b) in lora.layers.items():
        rank, size = max(1, len(a)), (a.shape[1], b.shape[1])
        cap = rank_cap(*size, config)
        if not config.min_rank <= rank <= cap:
            raise ValueError(f"{name} has rank {rank} in the LoRA, and may have from {config.min_rank} to {cap} here.")
        cost += rank * rank_cost(*size, config)
    return cost


def _patch_with_rank_one(model: nn.Module, lora: _PlainLora, config: L1RAConfig) -> None:
    """Patch the layers of the LoRA with adapters of rank 1, which :func:`_load_adapter` resizes.

    The settings that depend on the ranks or the scaling are replaced by neutral ones. :func:`_load_adapter` and the
    final controller apply the values of ``config``.
    """
    neutral = config.replace(alpha=None, rank_stabilized=False, min_rank=1, max_rank=None, budget_unit="ranks")
    patch(
        model,
        len(lora.layers),
        target_modules="|".join(map(re.escape, lora.layers)),
        modules_to_save=lora.modules_to_save,
        config=neutral,
        auto=False,
    )


@torch.no_grad()
def _load_adapter(layer: L1RALinear, a: Tensor, b: Tensor, config: L1RAConfig) -> None:
    rank = max(1, len(a))
    layer.resize(LayerPlan((0,), rank - 1), a[1:].float())
    # The scaling depends on the initial rank, which is the rank of the LoRA.
    layer.set_initial_rank(rank, config.alpha, config.rank_stabilized)
    layer.gate[:rank] = 1.0
    layer.lora_A[: len(a)] = a.to(layer.lora_A)
    layer.lora_B[: len(b)] = (b / layer.scaling).to(layer.lora_B)


def _read_lora(model: nn.Module, directory: Path) -> _PlainLora:
    """Read the LoRA in ``directory``, and check that it fits ``model``."""
    config, tensors = _read_files(directory)
    factors, saved_tensors = _split_tensors(tensors)
    modules = dict(model.named_modules())
    for name in factors:
        if name not in modules or base_features(modules[name]) is None:
            problem = f"is a {type(modules[name]).__name__}" if name in modules else "is not in the model"
            raise ValueError(
                f"the LoRA adapts {name}, which {problem}: pass the LoRA's own base model, with linear layers."
            )
    check_one_parent(model, {name: modules[name] for name in factors})
    endings = tuple(config.get("modules_to_save") or ())
    modules_to_save = [name for name in modules if endings and name.endswith(endings)]
    state = model.state_dict()
    expected = {key for name in modules_to_save for key in state if key.startswith(f"{name}.")}
    # Beside modules_to_save there may be weights that are not those of the base model's checkpoint.
    base_names = {name: name_before_patch(name, factors) for name in saved_tensors}
    surplus = [name for name, before in base_names.items() if before not in state]
    _check_names("modules_to_save", expected, expected & saved_tensors.keys() | set(surplus))
    _check_names("target_modules", _targeted_layers(model, config, modules_to_save), factors)
    if not factors:
        raise ValueError(f"{directory} adapts no layer.")
    embeddings = _embedding_addresses(model)
    for name, value in saved_tensors.items():
        own = state[base_names[name]]
        if own.shape[1:] == value.shape[1:] and own.shape != value.shape and own.data_ptr() in embeddings:
            raise ValueError(
                f"{name} has {len(value)} rows in {WEIGHTS} and {len(own)} in the model: call "
                f"model.resize_token_embeddings({len(value)}) first."
            )
        _check_shape(name, value, tuple(own.shape))
        _check_finite(name, value)
    layers = {
        name: _folded_factors(name, parts, *base_features(modules[name]), config) for name, parts in factors.items()
    }
    return _PlainLora(layers, modules_to_save, saved_tensors)


def _embedding_addresses(model: nn.Module) -> set[int]:
    parts = [optional_submodule(model, f"get_{kind}_embeddings") for kind in ("input", "output")]
    return {param.data_ptr() for part in parts if part is not None for param in part.parameters()}


def _read_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of ``adapter_config.json``, checked to be a plain LoRA, and of ``adapter_model.safetensors``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}: pass a directory to which PEFT has saved a LoRA.")
    try:
        config = json.loads((directory / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG} is no JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{directory} holds an adapter of PEFT's type {kind!r}: only 'LORA' can be read.")
    unsupported = [
        name for name in config if name not in USED | IGNORED and config[name] not in (None, False, 0, {}, [])
    ]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights", True) not in INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        settings = ", ".join(f"{name}={config[name]!r}" for name in unsupported)
        raise ValueError(f"the LoRA is not a plain one: {settings} can't be read. Merge it into its model instead.")
    _check_settings(config, directory / CONFIG)
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} can't be read: {error}.") from None


def _check_settings(config: dict[str, Any], file: Path) -> None:
    """Check the types of the settings that are used, and that each pattern is a regular expression."""
    patterns = []
    for name in SETTINGS_SCHEMA.keys() & config.keys():
        value = config[name]
        if isinstance(value, str) and name in ("target_modules", "exclude_modules"):
            patterns.append(value)
        elif (value is not None or name in ("r", "lora_alpha")) and (
            wrong := mismatch(value, SETTINGS_SCHEMA[name], name)
        ):
            raise ValueError(f"{file} has settings that PEFT does not write: {wrong}.")
        elif isinstance(value, dict):
            patterns += map(_name_pattern, value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{file} has {pattern!r}, which is no regular expression: {error}.") from None


def _split_tensors(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The LoRA factors, ``{layer name: {"A": ..., "B": ...}}``, and the other tensors, by name in the state dict."""
    factors: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if name == key or (not match and ".lora_" in name):
            raise ValueError(f"{WEIGHTS} holds {key}, which is no part of a plain LoRA on linear layers.")
        if match:
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[name] = tensor
    return factors, others


def _targeted_layers(model: nn.Module, config: dict[str, Any], modules_to_save: list[str]) -> set[str] | None:
    """The linear layers that the LoRA's ``target_modules`` match; None if only PEFT itself can resolve the settings."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return None

    def matches(name: str, patterns: str | list[str] | None) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name_matches(name, ending) for ending in patterns or ())

    return {
        name
        for name, module in model.named_modules()
        if base_features(module) is not None
        and matches(name, targets)
        and not matches(name, excluded)
        and not any(name == saved or name.startswith(f"{saved}.") for saved in modules_to_save)
    }


def _check_names(setting: str, expected: Collection[str] | None, found: Collection[str]) -> None:
    if expected is None:
        return
    for names, problem in ((set(expected) - set(found), "missing from"), (set(found) - set(expected), "surplus in")):
        if names:
            raise ValueError(f"by the LoRA's {setting}, tensors are {problem} {WEIGHTS}: {abbreviated(sorted(names))}.")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} in {WEIGHTS} and should be {shape}.")


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{name} is not finite: its numbers in {WEIGHTS}, or the LoRA's alpha.")


def _folded_factors(
    name: str, parts: dict[str, Tensor], in_features: int, out_features: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A ``(r, in_features)`` and ``alpha / r * B.T`` ``(r, out_features)``, without the ranks that are all zero."""
    if len(parts) == 1:
        raise ValueError(f"{name} has a lora_{next(iter(parts))} without its other half in {WEIGHTS}.")
    rank = _pattern_value(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if rank < 1:
        raise ValueError(f"{name} has rank {rank} in {CONFIG}.")
    _check_shape(f"{name}.lora_A", parts["A"], (rank, in_features))
    _check_shape(f"{name}.lora_B", parts["B"], (out_features, rank))
    a, b = parts["A"], parts["B"].T
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        raise ValueError(f"{name} is {a.dtype} and {b.dtype} in {WEIGHTS}: only floating-point numbers can be trained.")
    nonzero = (a != 0).any(1) | (b != 0).any(1)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    a, b = a[nonzero], b[nonzero].to(torch.promote_types(b.dtype, torch.float32)) * scaling
    _check_finite(name, a, b)
    return a, b


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern in ``rank_pattern`` or ``alpha_pattern`` that matches ``name``, as in PEFT."""
    return next((v for key, v in (patterns or {}).items() if re.match(_name_pattern(key), name)), default)


def _name_pattern(key: str) -> str:
    """The regular expression that PEFT makes of a key of ``rank_pattern`` or ``alpha_pattern``."""
    return rf"(.*\.)?({key})$"
