"""Plain LoRA in PEFT's files, written from the adapters of a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.files.atomic_write import atomic_write, cpu_copy
from l1ra.layers.adapted_model import find_adapters, task_head, trained_modules
from l1ra.layers.base_layers import is_conv1d
from l1ra.layers.linear import L1RALinear

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "export_peft", "refuse_shared"]

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
        directory: of the files, made if it is not there. An adapter in it is replaced, when the new one is whole; a
            process that is killed meanwhile leaves the old one, or none that could be read.
        uniform: fill all adapters with zeros up to the largest rank and write no patterns: for readers that know one
            rank and one alpha only, as vLLM and the converter to GGUF.
        dtype: of A and B in the file. None: that of the adapter. In 16 bits, folding rounds B once.

    Returns:
        ``directory``.

    Raises:
        ValueError: the model has no adapter, or PEFT can't express what is trained; nothing is written.
        OSError: it can't be written; an older adapter in the directory is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = _unwrapped(model)
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    refuse_shared(model, adapters)
    saved = _trained_in_full(model)
    layers = {_plain(name): _folded(layer, dtype) for name, layer in adapters.items()}
    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    largest = max(ranks.values())
    tensors = {}
    for name, (a, b) in layers.items():
        if uniform:
            a, b = (nn.functional.pad(rows, (0, 0, 0, largest - len(rows))) for rows in (a, b))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = cpu_copy(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = cpu_copy(b.T)
    for name, module in saved.items():
        tensors |= {f"{PREFIX}{_plain(name)}.{key}": cpu_copy(value) for key, value in module.state_dict().items()}
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
    with atomic_write(directory / WEIGHTS, directory / CONFIG) as (weights, settings):
        try:
            save_file(tensors, weights, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps what the system says
            raise OSError(f"{directory / WEIGHTS} can't be written: {error}.") from None
        settings.write_text(json.dumps(config, indent=2) + "\n")
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


def refuse_shared(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a layer that has several parents, which PEFT adapts in one of them.

    Raises:
        ValueError: there is one among ``layers``.
    """
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for name, layer in layers.items():
        if uses[id(layer)] > 1:
            raise ValueError(f"{name} is shared between parents, of which PEFT would adapt the first only.")


def _trained_in_full(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose own parameters are trained, and a task model's head, by name; none lies in another."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name for name, head in task_head(model).items() if next(find_adapters(head), None) is None}
    for name in trained_modules(model):
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
