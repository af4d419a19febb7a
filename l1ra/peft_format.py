"""Plain LoRA in PEFT's files: written from the adapters of a model, and read to start from."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.allocation import LayerPlan
from l1ra.base_layers import base_features, is_conv1d
from l1ra.budget import check_budget, rank_cap, rank_cost
from l1ra.config import L1RAConfig
from l1ra.controller import RankController, controller_of
from l1ra.linear import L1RALinear, find_adapters
from l1ra.patch import patch, unpatch
from l1ra.targets import fits, saved_modules

__all__ = ["export_peft", "from_peft"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every tensor's name
# The ending of a transformers model's class -> PEFT's task, and the heads that PEFT then trains unasked.
TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
# Settings of a LoRA that from_peft obeys, and such as say nothing about the function of a trained adapter. What else is
# set changes that function.
OBEYED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
OBEYED |= {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights"}
SILENT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
SILENT |= {"lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"}
SILENT |= {"lora_ga_config", "qalora_group_size", "runtime_config"}
# First values of A and B that leave the base weight as it is; all others subtract from it what they start with.
INITS = (True, False, "gaussian", "eva", "orthogonal")


def export_peft(
    model: nn.Module, directory: str | Path, *, uniform: bool = False, dtype: torch.dtype | None = None
) -> Path:
    """Write the adapters as a plain LoRA that ``PeftModel.from_pretrained(base_model, directory)`` loads.

    It computes the same, in PEFT's shapes: A ``(r, in_features)`` and B ``(out_features, r)``, with the scaling and
    the gates folded into B, so that PEFT's own ``alpha / r`` is 1 everywhere. Ranks whose gate is 0 are left out; an
    adapter without any other keeps one, with B = 0. Modules that are trained in full go along as ``modules_to_save``,
    and so does the head of a transformers task model. The model stays as it is; merged adapters may stay merged.

    The ranks differ from layer to layer: ``rank_pattern`` and ``alpha_pattern`` name each layer by a regular
    expression for its whole name, which PEFT reads from 0.15 on.

    Args:
        model: with adapters; compiled or wrapped in DistributedDataParallel if need be.
        directory: of the files, made if it is not there. An adapter in it is replaced, when the new one is whole.
        uniform: fill all adapters with zeros up to the largest rank and write no patterns: for readers that know one
            rank and one alpha only, as vLLM and the converter to GGUF.
        dtype: of A and B in the file. None: that of the adapter. In 16 bits, folding rounds B once.

    Returns:
        ``directory``.

    Raises:
        ValueError: the model has no adapter, or PEFT can't express what is trained; nothing is written.
    """
    from safetensors.torch import save_file

    model = _unwrapped(model)
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    _refuse_shared(model, adapters)
    saved = _trained_in_full(model)
    layers = {_plain(name): _folded(layer, dtype) for name, layer in adapters.items()}
    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    largest = max(ranks.values())
    tensors = {}
    for name, (a, b) in layers.items():
        if uniform:
            a, b = (nn.functional.pad(rows, (0, 0, 0, largest - len(rows))) for rows in (a, b))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _stored(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _stored(b.T)
    for name, module in saved.items():
        tensors |= {f"{PREFIX}{_plain(name)}.{key}": _stored(value) for key, value in module.state_dict().items()}
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = {
        "peft_type": "LORA",
        **_task(model, saved),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, ranks),
        "modules_to_save": [_plain(name) for name in saved] or None,
        "rank_pattern": {} if uniform else pattern,
        "alpha_pattern": {} if uniform else pattern,
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in adapters.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    aside = {name: directory / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, aside[WEIGHTS], metadata={"format": "pt"})
        aside[CONFIG].write_text(json.dumps(config, indent=2) + "\n")
        for name, path in aside.items():
            os.replace(path, directory / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return directory


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _plain(name: str) -> str:
    """A module's name in the model as it was before parts of it were compiled."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def _stored(tensor: Tensor) -> Tensor:
    # A memory of its own: savers refuse tensors that share one.
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _folded(layer: L1RALinear, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A ``(r, in_features)`` and ``s * g * B`` ``(r, out_features)`` of the ranks whose gate is not 0."""
    a, gate, b = (param[: layer.rank] for param in (layer.lora_A, layer.gate, layer.lora_B))
    live = gate != 0
    if not live.any():
        live[0] = True
    exact = torch.promote_types(b.dtype, torch.float32)
    b = b[live].to(exact) * (layer.scaling * gate[live].to(exact)).unsqueeze(1)
    return a[live].to(dtype or layer.lora_A.dtype), b.to(dtype or layer.lora_B.dtype)


def _refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for name, layer in layers.items():
        if uses[id(layer)] > 1:
            raise ValueError(f"{name} is shared between parents, of which PEFT would adapt the first only.")


def _trained_in_full(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose own parameters are trained, and a task model's head, by name; none lies in another."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name for name, head in saved_modules(model, None).items() if next(find_adapters(head), None) is None}
    for name, module in modules.items():
        if isinstance(module, L1RALinear) or not any(
            p is not None and p.requires_grad for p in module._parameters.values()
        ):
            continue
        if any(isinstance(modules.get(name[:end]), L1RALinear) for end in _dots(name)):
            raise ValueError(
                f"{name} is trained beside its adapter, which a plain LoRA can't say: freeze it, or adapt other layers."
            )
        found.add(name)
    found = {name for name in found if not any(name[:end] in found for end in _dots(name))}
    for name in found:
        if next(find_adapters(modules[name]), None) is not None:
            raise ValueError(
                f"{name or 'the model itself'} has parameters of its own that are trained, and adapters within: PEFT "
                "can train a module in full or adapt it, not both. Freeze these parameters."
            )
    # PEFT takes a name for an ending, and then expects the tensors of whatever else it fits.
    further = {other: name for other in modules for name in found if other.endswith(name) and other not in found}
    for name in found:
        excluded = re.compile(rf"(^|.*\.){name}($|\..*)")  # PEFT's, in which a dot is any character
        further |= {other: name for other, _ in find_adapters(model) if excluded.match(other)}
    for other, name in further.items():
        within = any(isinstance(modules.get(other[:end]), L1RALinear) for end in _dots(other))
        if within or next(find_adapters(modules[other]), None) is not None:
            raise ValueError(
                f"{name} is trained in full, and PEFT would take the adapted {other} for it: adapt other layers, or "
                "rename one of the two."
            )
    return {name: modules[name] for name in sorted(found | further.keys())}


def _dots(name: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\.", name)]


def _target_modules(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """``names``, or a regular expression for them if one of them is also the ending of another module's name."""
    for other in map(_plain, dict(model.named_modules())):
        if other not in names and any(other[end + 1 :] in names for end in _dots(other)):
            return "|".join(map(re.escape, names))
    return list(names)


def _task(model: nn.Module, saved: Collection[str]) -> dict[str, Any]:
    """PEFT's ``task_type`` where it changes nothing, otherwise ``auto_mapping``, by which PEFT finds the class."""
    kind = type(model)
    for ending, (task, heads) in TASKS.items():
        if kind.__name__.endswith(ending) and (heads or hasattr(model, "prepare_inputs_for_generation")):
            claimed = {name for name, _ in model.named_modules() if heads and name.endswith(heads)}
            if claimed <= set(saved):
                return {"task_type": task, "auto_mapping": None}
    known = kind.__module__.split(".")[0] == "transformers"
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__} if known else None
    return {"task_type": None, "auto_mapping": mapping}


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}.")
    if controller_of(model) is not None or next(find_adapters(model), None) is not None:
        raise ValueError("the model is patched already: call l1ra.unpatch(model) first, or take a fresh one.")
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
    layer.initial_rank = rank
    layer.alpha = float(rank if config.alpha is None else config.alpha)
    layer.scaling = layer.alpha / (math.sqrt(rank) if config.rank_stabilized else rank)
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
    _refuse_shared(model, {name: modules[name] for name in halves})
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
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} can't be read: {error}.") from None


def _targeted(model: nn.Module, config: dict[str, Any], saved: list[str]) -> set[str] | None:
    """The linear layers that the LoRA's settings name; None if these can't tell without PEFT."""
    wanted, unwanted = config.get("target_modules"), config.get("exclude_modules")
    if not wanted or wanted == "all-linear" or config.get("layers_to_transform") is not None:
        return None

    def named(name: str, by: str | list[str] | None) -> bool:
        if isinstance(by, str):
            return re.fullmatch(by, name) is not None
        return any(fits(name, ending) for ending in by or ())

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
            told = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
            raise ValueError(f"by the LoRA's {setting}, tensors are {what} {WEIGHTS}: {told}.")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} in {WEIGHTS} and should be {shape}.")


def _layer(
    name: str, parts: dict[str, Tensor], in_features: int, out_features: int, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A and ``alpha / r * B``, a row a rank, without the ranks of nothing but zeros."""
    if len(parts) == 1:
        raise ValueError(f"{name} has a lora_{next(iter(parts))} without its other half in {WEIGHTS}.")
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    _check_shape(f"{name}.lora_A", parts["A"], (rank, in_features))
    _check_shape(f"{name}.lora_B", parts["B"], (out_features, rank))
    a, b = parts["A"], parts["B"].T
    exact = torch.promote_types(b.dtype, torch.float32)
    live = (a != 0).any(1) | (b != 0).any(1)
    return a[live], b[live].to(exact) * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits ``name``, as PEFT tells it."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
