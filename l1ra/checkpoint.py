"""Adapters and their controller on disk: a JSON file that names two safetensors files, and is written last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from l1ra.adapted import controller_of, trained_tensors
from l1ra.aside import PARTIAL, replaced
from l1ra.base_layers import base_features
from l1ra.config import L1RAConfig
from l1ra.controller import RankController
from l1ra.linear import find_adapters
from l1ra.patch import patch, unpatch

__all__ = ["load", "read_controller", "save"]

FORMAT = 1
INDEX = "l1ra.json"
PARTS = ("lora_A", "gate", "lora_B")
TENSOR_FILES = ("adapters", "controller")
# Of older checkpoints, or left by a process that was killed while it wrote.
OURS = re.compile(r"(l1ra\.json|(adapters|controller)-[0-9a-f]{16}\.safetensors)(" + PARTIAL + ")?")


def save(controller: RankController, folder: str | os.PathLike) -> None:
    """Write the adapters, whatever else of the model is trained, and the controller into ``folder``.

    Only live rows are written. The folder is never without a whole checkpoint: files of the new one lie beside those of
    the old one until the index is replaced, in one step.

    Raises:
        OSError: it can't be written; an older checkpoint in the folder is still whole.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = controller.state_dict()
    tensors = {"adapters": _adapters(controller), "controller": _tensors_of(state)}
    index: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(controller.config),
        "adapters": {n: [a.in_features, a.out_features] for n, a in controller.adapters.items()},
        "trained": sorted(trained_tensors(controller.model)),
        "controller": {name: value for name, value in state.items() if name not in ("gates", "generator", "probes")},
        "files": {},
    }
    for kind in TENSOR_FILES:
        data = to_bytes(tensors[kind])
        digest = hashlib.sha256(data).hexdigest()
        name = f"{kind}-{digest[:16]}.safetensors"
        with replaced(folder / name) as (aside,):
            aside.write_bytes(data)
        index["files"][kind] = {"name": name, "sha256": digest}
    with replaced(folder / INDEX) as (aside,):
        aside.write_text(json.dumps({**index, "sha256": _digest(index)}, indent=1))
    kept = {INDEX, *(file["name"] for file in index["files"].values())}
    for file in folder.iterdir():
        if OURS.fullmatch(file.name) and file.name not in kept:
            file.unlink()


def load(model: nn.Module, folder: str | os.PathLike, *, auto: bool = True) -> RankController:
    """Give ``model`` the adapters of a checkpoint, and the controller that goes on where it was saved.

    An optimizer that shall go on too loads its own state afterwards: its tensors have the shapes of the saved ranks.

    Args:
        model: the model as it was before ``l1ra.patch``, one that is patched with the same budget and settings, or one
            that has been built with :class:`L1RALinear`.
        folder: where ``controller.save`` has written.
        auto: as in ``l1ra.patch``, for a model without a controller.

    Returns:
        The model's controller.

    Raises:
        FileNotFoundError: no checkpoint is there.
        ValueError: it is damaged, of a newer version, or of another model; the model is untouched.
    """
    index, tensors = _read(Path(folder))
    adapted = next(find_adapters(model), None) is not None
    _check_model(model, index, tensors["adapters"], adapted)
    there = controller = controller_of(model)
    if controller is None:
        budget, config = index["controller"]["budget"], L1RAConfig(**index["config"])
        if adapted:
            controller = RankController(model, budget, config=config, auto=auto)
        else:
            names = "|".join(re.escape(name) for name in index["adapters"])
            controller = patch(model, budget, target_modules=names, modules_to_save=[], config=config, auto=auto)
    before = {name: value.clone() for name, value in model.state_dict().items() if _belongs(name, index)}
    try:
        model.load_state_dict(tensors["adapters"], strict=False)
        controller.load_state_dict(_state(index, tensors))
    except BaseException:
        model.load_state_dict(before, strict=False)
        if not adapted:
            unpatch(model)
        elif there is None:
            controller.close()
        raise
    for name in index["trained"]:
        model.get_parameter(name).requires_grad_(True)
    return controller


def _adapters(controller: RankController) -> dict[str, Tensor]:
    rows = {
        f"{name}.{part}": getattr(adapter, part).detach()[: adapter.rank]
        for name, adapter in controller.adapters.items()
        for part in PARTS
    }
    # A tied head may share its memory with what else is trained; in the file each has its own.
    return {name: value.cpu().clone() for name, value in {**rows, **trained_tensors(controller.model)}.items()}


def _tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    probes = {f"probes.{part}.{name}": t for name, probe in state["probes"].items() for part, t in probe.items()}
    gates = {f"gates.{name}": t for name, t in state["gates"].items()}
    return {n: t.cpu().contiguous() for n, t in {**gates, **probes, "generator": state["generator"]}.items()}


def read_controller(folder: str | os.PathLike) -> dict[str, Any]:
    """The controller's ``state_dict()`` of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    return _state(*_read(Path(folder)))


def _state(index: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    probes: dict[str, dict[str, Tensor]] = {}
    gates = {}
    for name, tensor in tensors["controller"].items():
        kind, _, rest = name.partition(".")
        if kind == "gates":
            gates[rest] = tensor
        elif kind == "probes":
            part, _, adapter = rest.partition(".")
            probes.setdefault(adapter, {})[part] = tensor
    return {**index["controller"], "gates": gates, "probes": probes, "generator": tensors["controller"]["generator"]}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    from safetensors.torch import load as from_bytes

    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {INDEX}: pass the folder that controller.save(folder) has written.")
    try:
        index = json.loads(file.read_bytes())
        version, digest = index["format"], index.pop("sha256")
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: it is no index of an L1RA checkpoint.") from None
    if version != FORMAT:
        raise ValueError(f"{file} has format {version}, this version of l1ra reads {FORMAT}: install a newer l1ra.")
    if digest != _digest(index):
        raise ValueError(f"{file} is damaged: it does not say what was written.")
    tensors = {}
    for kind in TENSOR_FILES:
        path = folder / index["files"][kind]["name"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{folder} is damaged: its {kind} can't be read ({error}).") from None
        if hashlib.sha256(data).hexdigest() != index["files"][kind]["sha256"]:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written.")
        tensors[kind] = from_bytes(data)
    return index, tensors


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _check_model(model: nn.Module, index: dict[str, Any], tensors: dict[str, Tensor], adapted: bool) -> None:
    modules = dict(model.named_modules())
    if adapted and list(index["adapters"]) != [name for name, _ in find_adapters(model)]:
        raise ValueError("the checkpoint has other adapters than the model: patch it with the same target_modules.")
    for name, size in index["adapters"].items():
        module = modules.get(name)
        found = (
            None if module is None else (module.in_features, module.out_features) if adapted else base_features(module)
        )
        if found is None or list(found) != size:
            there = "nothing that can be adapted" if found is None else f"{found[0]} -> {found[1]}"
            raise ValueError(
                f"the checkpoint is of another model: it has an adapter for a layer {size[0]} -> {size[1]} at {name}, "
                f"this model has {there} there."
            )
    parameters = dict(model.named_parameters())
    for name in index["trained"]:
        if name not in parameters or parameters[name].shape != tensors[name].shape:
            raise ValueError(
                f"the checkpoint is of another model: it has a trained {name} of shape {tuple(tensors[name].shape)}."
            )


def _belongs(name: str, index: dict[str, Any]) -> bool:
    owner, _, part = name.rpartition(".")
    return name in index["trained"] or (owner in index["adapters"] and part in PARTS)
