"""Write the adapters of a model as a plain LoRA in PEFT's file format (``export_peft``)."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.files.atomic_write import atomic_write, cpu_copy
from l1ra.layers.adapted_model import (
    FSDP_PREFIX,
    MERGED_FOR_GOOD,
    check_whole,
    find_adapters,
    frozen_and_drawn_anew,
    running_statistics,
    task_head,
    trained_modules,
    whole_for_saving,
)
from l1ra.layers.base_layers import is_conv1d
from l1ra.layers.linear import L1RALinear
from l1ra.layers.zero import is_engine

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "check_one_parent", "export_peft"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
WRAPPED_BY_FSDP = FSDP_PREFIX.rstrip(".")
PREFIX = "base_model.model."  # of each tensor's name in PEFT's file
# Suffix of a transformers model class -> PEFT's task_type, and the modules that PEFT trains in full for that task even
# if modules_to_save does not name them.
TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def export_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    uniform: bool | int = False,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
) -> Path:
    """Write the adapters as a plain LoRA that ``PeftModel.from_pretrained(base_model, directory)`` loads.

    The LoRA computes the same function as the adapters. Its tensors have PEFT's shapes: A ``(r, in_features)`` and B
    ``(out_features, r)``. Scaling and gates are multiplied into B, so that PEFT's own scaling ``alpha / r`` is 1
    everywhere. Ranks whose gate is 0 are left out; an adapter that has no other ranks keeps one, with B = 0.

    Modules that are trained in full are written as ``modules_to_save``, and so is the head of a transformers model for
    classification or question answering. Other weights that the pretrained checkpoint does not have, such as embeddings
    with new tokens, are written under their names. The model is not changed, and adapters may be merged.

    If ``l1ra.unpatch(model, merge=True)`` has changed the model's weights before, the files name no base model, and a
    ``UserWarning`` says so: the LoRA does not fit the weights from which the model was loaded.

    The ranks differ between layers. ``rank_pattern`` and ``alpha_pattern`` give the rank of each layer by a regular
    expression for its whole name, which PEFT supports since version 0.15.

    Example::

        l1ra.export_peft(model, "my-lora")
        model = PeftModel.from_pretrained(base_model, "my-lora")

    Args:
        model: a model with adapters. It may be compiled or wrapped in DistributedDataParallel or DeepSpeed's engine. If
            it is sharded (``fully_shard``, ZeRO stage 3), all processes must call this, and the first one writes.
        directory: is created if it does not exist. An older LoRA in it is replaced after the new one has been written
            completely. A process that is killed before leaves the older LoRA, or files that PEFT does not load.
        uniform: pad all adapters with zeros to one rank and write no patterns, for readers that support a single rank
            and alpha only, such as vLLM and the GGUF converter. True: the largest rank of this model. A number: this
            rank, so that several exports have the same.
        dtype: of A and B in the file. None: the dtype of the adapter. In a 16-bit dtype, B is rounded once, after
            scaling and gates are multiplied in.
        prefix: None writes PEFT's two files. A string writes diffusers' one, ``pytorch_lora_weights.safetensors``, in
            which each tensor's name begins with ``prefix`` and a dot: the model's name in the pipeline whose
            ``load_lora_weights`` reads it, ``"unet"`` or ``"transformer"``; or ``""`` for
            ``model.load_lora_adapter(directory, prefix=None, use_safetensors=True)``.

    Returns:
        ``directory``.

    Raises:
        ValueError: the model has no adapter; or the reader can't represent what is trained; or a rank is above
            ``uniform``. Nothing is written.
        TypeError: ``uniform`` is neither a bool nor an int.
        RuntimeError: FSDP 1 holds the adapters as parts of flat tensors. Nothing is written.
        OSError: the files can't be written. An older LoRA in the directory is unchanged.
    """
    model = _unwrap(model)
    with whole_for_saving(model) as writes:
        if writes:
            _export(model, Path(directory), uniform, dtype, prefix)
    return Path(directory)


def _export(
    model: nn.Module, directory: Path, uniform: bool | int, dtype: torch.dtype | None, prefix: str | None
) -> None:
    """:func:`export_peft` of a model whose adapters are whole."""
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    check_whole(adapters)
    check_one_parent(model, adapters)
    saved = _modules_to_save(model)
    factors = {_uncompiled_name(name): _folded_factors(layer, dtype) for name, layer in adapters.items()}
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    rank = _common_rank(ranks, uniform)
    base = _base_name(model)
    tensors = _lora_tensors(factors, pad_to=rank)
    statistics = {name: value for name, value in running_statistics(model).items() if not _is_inside(name, saved)}
    frozen = frozen_and_drawn_anew(model) | statistics
    if prefix is not None:
        if saved or frozen:
            more = f"{', '.join(saved)} is trained in full" if saved else f"{', '.join(frozen)} is in no checkpoint"
            raise ValueError(
                f"diffusers reads no more than a LoRA, and {more}: {'freeze it, or ' if saved else ''}call "
                "model.save_pretrained, which writes all weights with the adapters merged."
            )
        start = f"{prefix.removesuffix('.')}." if prefix else ""
        _write(directory, {start + name: tensor for name, tensor in tensors.items()})
        return
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    for name, module in saved.items():
        name = f"{PREFIX}{_uncompiled_name(name)}"
        tensors |= {f"{name}.{key}": cpu_copy(value) for key, value in module.state_dict().items()}
    # PEFT and transformers load tensors under these names into the base model, as PEFT's own resized embeddings.
    frozen = {f"{PREFIX}{_uncompiled_name(name)}": cpu_copy(value) for name, value in frozen.items()}
    tensors = {**frozen, **tensors}
    _write(directory, tensors, _adapter_config(model, ranks, saved, rank, base))


def _base_name(model: nn.Module) -> str | None:
    """Where readers find the weights that the LoRA belongs to; None if it is not known."""
    name = getattr(model, "name_or_path", None) or None
    if name is None or not any(hasattr(module, MERGED_FOR_GOOD) for module in model.modules()):
        return name
    warnings.warn(
        f"the LoRA belongs to the weights that l1ra.unpatch(model, merge=True) has left, not to {name}, so its files "
        "name no base model. Save the merged model before it is patched again, and load the LoRA onto that.",
        stacklevel=4,
    )
    return None


def _common_rank(ranks: Mapping[str, int], uniform: bool | int) -> int | None:
    """The one rank of all adapters in the file, None if each has its own.

    Args:
        ranks: the rank of each adapter by name.
        uniform: as in :func:`export_peft`.
    """
    if not isinstance(uniform, int):
        raise TypeError(f"uniform must be True, False or a rank, not {uniform!r}.")
    widest = max(ranks, key=ranks.get)
    if isinstance(uniform, bool):
        return ranks[widest] if uniform else None
    if uniform < ranks[widest]:
        raise ValueError(
            f"uniform={uniform}, but {widest} has rank {ranks[widest]}: write uniform={ranks[widest]} or more."
        )
    return uniform


def check_one_parent(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that no layer is a child of several modules: PEFT would adapt it in the first of them only.

    Args:
        layers: the layers to check, by name.

    Raises:
        ValueError: a layer has several parents.
    """
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for name, layer in layers.items():
        if uses[id(layer)] > 1:
            raise ValueError(f"{name} is shared between parents, of which PEFT would adapt the first only.")


def _unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers of ``torch.compile``, DistributedDataParallel, FSDP 1 and DeepSpeed."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model):
            model = model.module
        elif hasattr(model, WRAPPED_BY_FSDP):
            model = getattr(model, WRAPPED_BY_FSDP)
        else:
            return model


def _uncompiled_name(name: str) -> str:
    """A module's name in the model as it was before parts of the model were compiled, or wrapped by FSDP 1."""
    name = name.replace(FSDP_PREFIX, "").removesuffix("." + WRAPPED_BY_FSDP)
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


@torch.no_grad()
def _folded_factors(layer: L1RALinear, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A ``(r, in_features)`` and ``s * g * B`` ``(r, out_features)`` of the ranks whose gate is not 0."""
    a, gate, b = (param[: layer.rank] for param in (layer.lora_A, layer.gate, layer.lora_B))
    live = gate != 0
    if not live.any():
        live[0] = True
    at_least_float32 = torch.promote_types(b.dtype, torch.float32)
    b = b[live].to(at_least_float32) * (layer.scaling * gate[live].to(at_least_float32)).unsqueeze(1)
    return a[live].to(dtype or layer.lora_A.dtype), b.to(dtype or layer.lora_B.dtype)


def _lora_tensors(factors: Mapping[str, tuple[Tensor, Tensor]], pad_to: int | None) -> dict[str, Tensor]:
    """The tensors of the LoRA under PEFT's names without the prefix, padded with zeros to the rank ``pad_to``."""
    tensors = {}
    for name, (a, b) in factors.items():
        if pad_to is not None:
            a, b = (nn.functional.pad(rows, (0, 0, 0, pad_to - len(rows))) for rows in (a, b))
        tensors[f"{name}.lora_A.weight"] = cpu_copy(a)
        tensors[f"{name}.lora_B.weight"] = cpu_copy(b.T)
    return tensors


def _adapter_config(
    model: nn.Module,
    ranks: Mapping[str, int],
    saved: Mapping[str, nn.Module],
    common_rank: int | None,
    base: str | None,
) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    rank = common_rank or max(ranks.values())
    pattern = {} if common_rank else {f"^{re.escape(name)}": own for name, own in ranks.items()}
    return {
        "peft_type": "LORA",
        **_task_settings(model, saved),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, ranks),
        "modules_to_save": [_uncompiled_name(name) for name in saved] or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for _, layer in find_adapters(model)),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    """Write PEFT's two files, or diffusers' one if there is no ``config``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    names = [DIFFUSERS_WEIGHTS] if config is None else [WEIGHTS, CONFIG]
    with atomic_write(*(directory / name for name in names)) as (weights_file, *config_files):
        try:
            save_file(tensors, weights_file, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors raises it in place of an OSError
            raise OSError(f"{directory / names[0]} can't be written: {error}.") from None
        for file in config_files:
            file.write_text(json.dumps(config, indent=2) + "\n")


def _modules_to_save(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to write as ``modules_to_save``, by name; none of them is inside another one.

    These are the modules that own trained parameters outside of adapters, and the head of a task model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name for name, head in task_head(model).items() if not _has_adapters(head)}
    for name in trained_modules(model):
        if _is_inside_adapter(name, modules):
            raise ValueError(
                f"{name} is trained beside its adapter, which a plain LoRA can't represent: freeze it, or adapt other "
                "layers."
            )
        names.add(name)
    names = {name for name in names if not any(parent in names for parent in _parents(name))}
    for name in names:
        if _has_adapters(modules[name]):
            raise ValueError(
                f"{name or 'the model itself'} has parameters of its own that are trained, and adapters within: PEFT "
                "can train a module in full or adapt it, not both. Freeze these parameters."
            )
    also_matched = _also_matched_by_peft(names, model, modules)
    for other, name in also_matched.items():
        if _is_inside_adapter(other, modules) or _has_adapters(modules[other]):
            raise ValueError(
                f"{name} is trained in full, and PEFT would take the adapted {other} for it: adapt other layers, or "
                "rename one of the two."
            )
    return {name: modules[name] for name in sorted(names | also_matched.keys())}


def _also_matched_by_peft(names: Collection[str], model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The other modules that PEFT matches if ``names`` are its ``modules_to_save``, and the name that matches each.

    PEFT matches a name as the ending of module names, and expects the tensors of all modules that match. It also does
    not adapt a layer whose name matches its regular expression for the names, in which a dot matches any character.
    """
    matched = {other: name for other in modules for name in names if other.endswith(name) and other not in names}
    for name in names:
        not_adapted = re.compile(rf"(^|.*\.){name}($|\..*)")
        matched |= {other: name for other, _ in find_adapters(model) if not_adapted.match(other)}
    return matched


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _has_adapters(module: nn.Module) -> bool:
    return next(find_adapters(module), None) is not None


def _is_inside_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(modules.get(parent), L1RALinear) for parent in _parents(name))


def _parents(name: str) -> list[str]:
    """The names of the modules that contain the module ``name``: for ``"a.b.c"`` these are ``"a"`` and ``"a.b"``."""
    return [name[:dot] for dot in _dots(name)]


def _dots(name: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\.", name)]


def _target_modules(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """``names``, or a regular expression for them if one of them is also the ending of another module's name."""
    for other in map(_uncompiled_name, dict(model.named_modules())):
        if other not in names and any(other[dot + 1 :] in names for dot in _dots(other)):
            return "|".join(map(re.escape, names))
    return list(names)


def _task_settings(model: nn.Module, saved: Collection[str]) -> dict[str, Any]:
    """PEFT's ``task_type`` and ``auto_mapping``.

    A ``task_type`` is written only if PEFT would then train no further modules in full. Otherwise ``auto_mapping``
    tells PEFT the class of the model.
    """
    kind = type(model)
    for suffix, (task, heads) in TASKS.items():
        if kind.__name__.endswith(suffix) and (heads or hasattr(model, "prepare_inputs_for_generation")):
            trained_by_peft = {name for name, _ in model.named_modules() if heads and name.endswith(heads)}
            if trained_by_peft <= set(saved):
                return {"task_type": task, "auto_mapping": None}
    known = kind.__module__.split(".")[0] == "transformers"
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__} if known else None
    return {"task_type": None, "auto_mapping": mapping}
