"""Adapters that start from a plain LoRA in PEFT's files."""

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
from l1ra.files.peft_export import CONFIG, PREFIX, WEIGHTS, refuse_shared
from l1ra.files.schema import mismatch
from l1ra.layers.adapted_model import abbreviated, controller_of, find_adapters
from l1ra.layers.base_layers import FLOATS, base_features
from l1ra.layers.linear import L1RALinear
from l1ra.model.patch import check_unpatched, patch, unpatch
from l1ra.model.targets import name_matches
from l1ra.training.controller import RankController

__all__ = ["from_peft"]

# Settings of a LoRA that from_peft obeys, and such as say nothing about the function of a trained adapter. What else is
# set changes that function.
SETTINGS_SCHEMA = {
    "r": int,
    "lora_alpha": int | float,
    "rank_pattern": {str: int},
    "alpha_pattern": {str: int | float},
    "use_rslora": bool,
    "target_modules": [str],  # or a regular expression, as the next one
    "exclude_modules": [str],
    "modules_to_save": [str],
}
OBEYED = {*SETTINGS_SCHEMA, "peft_type", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"}
SILENT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
SILENT |= {"lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"}
SILENT |= {"lora_ga_config", "qalora_group_size", "runtime_config"}
# First values of A and B that leave the base weight as it is; all others subtract from it what they start with.
INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _PlainLora:
    """What a directory holds: the name of a layer -> A ``(r, in_features)`` and ``alpha / r * B``
    ``(r, out_features)``; the modules trained in full, and their tensors by name."""

    layers: dict[str, tuple[Tensor, Tensor]]
    saved: list[str]
    values: dict[str, Tensor]


def from_peft(
    model: nn.Module,
    directory: str | Path,
    budget: int | None = None,
    *,
    config: L1RAConfig | None = None,
    auto: bool = True,
    **overrides: Any,
) -> RankController:
    """Patch ``model`` with a plain LoRA as PEFT saves it, to train on with ranks that move.

    The model then computes what it does with the LoRA in PEFT: the same layers are adapted, at the same ranks, gates
    are 1, and the LoRA's ``modules_to_save`` are loaded and trained in full. PEFT need not be installed.

    Ranks of nothing but zeros, with which adapters are filled up to one size, are not loaded; where there is no other,
    one new rank with B = 0 is. Dropout is that of the settings.

    Args:
        model: the base model of the LoRA, without adapters.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        budget: as for ``l1ra.patch``. None: what the LoRA's ranks cost. What it is larger is spare, and dealt in time.
        config: settings; ``overrides`` replace single fields of it (see ``L1RAConfig``).
        auto: listen to optimizers; with False call ``controller.step(optimizer)`` after each step.

    Returns:
        The controller, which the model holds too; ``l1ra.unpatch(model)`` takes the adapters out again.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError, TypeError: the LoRA is of a kind that adapters can't be, or does not fit the model, the budget or
            the settings; the model is untouched.
        RuntimeError: ``strict`` is set and an adapter would run as plain PyTorch; the model is untouched.
    """
    check_unpatched(model)
    if config is not None and not isinstance(config, L1RAConfig):
        raise TypeError(f"config must be an L1RAConfig, not {type(config).__name__}.")
    config = (config or L1RAConfig()).replace(**overrides)
    if budget is not None:
        check_budget(budget)
    lora = _read(model, Path(directory))
    spent = 0
    for name, (a, b) in lora.layers.items():
        rank, size = max(1, len(a)), (a.shape[1], b.shape[1])
        cap = rank_cap(*size, config)
        if not config.min_rank <= rank <= cap:
            raise ValueError(f"{name} has rank {rank} in the LoRA, and may have from {config.min_rank} to {cap} here.")
        spent += rank * rank_cost(*size, config)
    if budget is not None and budget < spent:
        raise ValueError(f"the LoRA's ranks cost {spent} of a budget of {budget}: write budget={spent} or more.")

    # One rank an adapter at first; which ranks they get, and by which settings they move, is said afterwards.
    first = config.replace(alpha=None, rank_stabilized=False, min_rank=1, max_rank=None, budget_unit="ranks")
    names = "|".join(map(re.escape, lora.layers))
    patch(model, len(lora.layers), target_modules=names, modules_to_save=lora.saved, config=first, auto=False)
    try:
        controller_of(model).close()
        for name, layer in find_adapters(model):
            _load(layer, *lora.layers[name], config)
        controller = RankController(model, spent if budget is None else budget, config=config, auto=auto)
        state = model.state_dict()
        with torch.no_grad():
            for name, value in lora.values.items():
                state[name].copy_(value)
    except BaseException:
        unpatch(model)
        raise
    return controller


@torch.no_grad()
def _load(layer: L1RALinear, a: Tensor, b: Tensor, config: L1RAConfig) -> None:
    rank = max(1, len(a))
    layer.resize(LayerPlan((0,), rank - 1), a[1:].float())
    # The settings' scaling is that of the rank at the start, which is this one.
    layer.set_initial_rank(rank, config.alpha, config.rank_stabilized)
    layer.gate[:rank] = 1.0
    layer.lora_A[: len(a)] = a.to(layer.lora_A)
    layer.lora_B[: len(b)] = (b / layer.scaling).to(layer.lora_B)


def _read(model: nn.Module, directory: Path) -> _PlainLora:
    """The LoRA in ``directory``, found to fit ``model``."""
    config, tensors = _files(directory)
    modules = dict(model.named_modules())
    halves: dict[str, dict[str, Tensor]] = {}
    values = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if name == key or (not half and ".lora_" in name):
            raise ValueError(f"{WEIGHTS} holds {key}, which is no part of a plain LoRA on linear layers.")
        if half:
            halves.setdefault(half[1], {})[half[2]] = tensor
        else:
            values[name] = tensor

    for name in halves:
        if name not in modules or base_features(modules[name]) is None:
            what = f"is a {type(modules[name]).__name__}" if name in modules else "is not in the model"
            raise ValueError(
                f"the LoRA adapts {name}, which {what}: pass the LoRA's own base model, with linear layers."
            )
    refuse_shared(model, {name: modules[name] for name in halves})
    endings = tuple(config.get("modules_to_save") or ())
    saved = [name for name in modules if endings and name.endswith(endings)]
    state = model.state_dict()
    expected = {key for name in saved for key in state if key.startswith(f"{name}.")}
    _compare("modules_to_save", expected, values)
    _compare("target_modules", _targeted(model, config, saved), halves)
    if not halves:
        raise ValueError(f"{directory} adapts no layer.")
    for name, value in values.items():
        _check_shape(name, value, tuple(state[name].shape))
        _check_finite(name, value)
    layers = {name: _layer(name, parts, *base_features(modules[name]), config) for name, parts in halves.items()}
    return _PlainLora(layers, saved, values)


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    strange = [name for name in config if name not in OBEYED | SILENT and config[name] not in (None, False, 0, {}, [])]
    if config.get("bias", "none") != "none":
        strange.append("bias")
    if config.get("init_lora_weights", True) not in INITS:
        strange.append("init_lora_weights")
    if strange:
        told = ", ".join(f"{name}={config[name]!r}" for name in strange)
        raise ValueError(f"the LoRA is not a plain one: {told} can't be read. Merge it into its model instead.")
    _check_settings(config, directory / CONFIG)
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} can't be read: {error}.") from None


def _check_settings(config: dict[str, Any], file: Path) -> None:
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
            patterns += map(_whole, value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{file} has {pattern!r}, which is no regular expression: {error}.") from None


def _targeted(model: nn.Module, config: dict[str, Any], saved: list[str]) -> set[str] | None:
    """The linear layers that the LoRA's settings name; None if these can't tell without PEFT."""
    wanted, unwanted = config.get("target_modules"), config.get("exclude_modules")
    if not wanted or wanted == "all-linear" or config.get("layers_to_transform") is not None:
        return None

    def named(name: str, by: str | list[str] | None) -> bool:
        if isinstance(by, str):
            return re.fullmatch(by, name) is not None
        return any(name_matches(name, ending) for ending in by or ())

    return {
        name
        for name, module in model.named_modules()
        if base_features(module) is not None
        and named(name, wanted)
        and not named(name, unwanted)
        and not any(name == whole or name.startswith(f"{whole}.") for whole in saved)
    }


def _compare(setting: str, expected: Collection[str] | None, found: Collection[str]) -> None:
    if expected is None:
        return
    for names, what in ((set(expected) - set(found), "missing from"), (set(found) - set(expected), "surplus in")):
        if names:
            raise ValueError(f"by the LoRA's {setting}, tensors are {what} {WEIGHTS}: {abbreviated(sorted(names))}.")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} in {WEIGHTS} and should be {shape}.")


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{name} is not finite: its numbers in {WEIGHTS}, or the LoRA's alpha.")


def _layer(
    name: str, parts: dict[str, Tensor], in_features: int, out_features: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A and ``alpha / r * B``, a row a rank, without the ranks of nothing but zeros."""
    if len(parts) == 1:
        raise ValueError(f"{name} has a lora_{next(iter(parts))} without its other half in {WEIGHTS}.")
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if rank < 1:
        raise ValueError(f"{name} has rank {rank} in {CONFIG}.")
    _check_shape(f"{name}.lora_A", parts["A"], (rank, in_features))
    _check_shape(f"{name}.lora_B", parts["B"], (out_features, rank))
    a, b = parts["A"], parts["B"].T
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        raise ValueError(f"{name} is {a.dtype} and {b.dtype} in {WEIGHTS}: only floating-point numbers can be trained.")
    exact = torch.promote_types(b.dtype, torch.float32)
    live = (a != 0).any(1) | (b != 0).any(1)
    a, b = a[live], b[live].to(exact) * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    _check_finite(name, a, b)
    return a, b


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits ``name``, as PEFT tells it."""
    return next((v for key, v in (patterns or {}).items() if re.match(_whole(key), name)), default)


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"
