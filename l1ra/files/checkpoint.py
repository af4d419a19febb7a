"""Checkpoints of adapters and controller on disk: a JSON index and two safetensors files that the index names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l1ra.config import L1RAConfig
from l1ra.files.atomic_write import PARTIAL_SUFFIX, atomic_write, cpu_copy
from l1ra.files.controller_state import IN_TENSORS
from l1ra.files.controller_state import SCHEMA as STATE_SCHEMA
from l1ra.files.schema import mismatch
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS

__all__ = ["Checkpoint", "read", "save"]

FORMAT = 1
INDEX = "l1ra.json"
TENSOR_FILES = ("adapters", "controller")
SCHEMA = {
    "config": dict,
    "adapters": {str: (int, int)},
    "trained": [str],
    "frozen": [str],
    "controller": {name: form for name, form in STATE_SCHEMA.items() if name not in IN_TENSORS},
    "files": {kind: {"name": str, "sha256": str} for kind in TENSOR_FILES},
}
# The file names that save() uses, complete or partly written.
OWN_FILES = re.compile(r"(l1ra\.json|(adapters|controller)-[0-9a-f]{16}\.safetensors)(" + PARTIAL_SUFFIX + ")?")
STALE_AFTER = 600.0  # seconds


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        config: the controller's config.
        adapters: module name -> ``(in_features, out_features)``.
        trained: names of the tensors outside of the adapters that the pretrained model does not have; see
            ``trained_tensors``.
        frozen: those of them that are not trained.
        tensors: the adapters' parameters, without reserved rows, and the tensors in ``trained``; by their names in the
            model's state dict.
        controller: the controller's ``state_dict()``.
    """

    config: L1RAConfig
    adapters: dict[str, tuple[int, int]]
    trained: list[str]
    frozen: list[str]
    tensors: dict[str, Tensor]
    controller: dict[str, Any]


def save(
    folder: str | os.PathLike,
    config: L1RAConfig,
    adapters: Mapping[str, L1RALinear],
    trained: Mapping[str, Tensor],
    frozen: Collection[str],
    state: Mapping[str, Any],
) -> None:
    """Write the adapters, the other trained tensors and the controller's state into ``folder``.

    The tensor files of the new checkpoint are written under new names beside those of the old one. Then the index is
    replaced in one step. So the folder holds a complete checkpoint at any time. In distributed training it is enough
    that one process saves. If several processes save into the same folder, it holds the checkpoint of the last one.

    Args:
        folder: is created if it does not exist.
        config: the controller's config.
        adapters: the adapters by module name.
        trained: the other tensors that the pretrained model does not have; see ``trained_tensors``.
        frozen: the names of those of them that are not trained.
        state: the controller's ``state_dict()``.

    Raises:
        OSError: the checkpoint can't be written. An older checkpoint in the folder is unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "adapters": {n: [a.in_features, a.out_features] for n, a in adapters.items()},
        "trained": sorted(trained),
        "frozen": sorted(frozen),
        "controller": {name: value for name, value in state.items() if name not in IN_TENSORS},
        "files": {},
    }
    tensors = {"adapters": _adapter_tensors(adapters, trained), "controller": _controller_tensors(state)}
    replaced, written = _files_in_index(folder / INDEX), []
    try:
        for kind in TENSOR_FILES:
            # The name is random so that no other process uses it: each process deletes the files that it has replaced.
            name = f"{kind}-{secrets.token_hex(8)}.safetensors"
            written.append(name)
            index["files"][kind] = {"name": name, "sha256": _write_tensors(folder / name, tensors[kind])}
        with atomic_write(folder / INDEX) as (partial_file,):
            partial_file.write_text(json.dumps({**index, "sha256": _digest(index)}, indent=1))
    except BaseException:
        _delete(folder, set(written) - _files_in_index(folder / INDEX))
        raise
    _delete(folder, (replaced | _stale_files(folder)) - {INDEX, *written})


def read(folder: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint that :func:`save` has written.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the checkpoint is damaged, or was written by a newer version of l1ra.
    """
    folder = Path(folder)
    index = _read_index(folder)
    try:
        config = L1RAConfig(**index["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / INDEX} has other settings than this version of l1ra: {error}") from None
    files = index["files"]
    tensors = {kind: _read_tensors(folder, kind, files[kind]["name"], files[kind]["sha256"]) for kind in TENSOR_FILES}
    return Checkpoint(
        config,
        {name: tuple(size) for name, size in index["adapters"].items()},
        index["trained"],
        index["frozen"],
        tensors["adapters"],
        {**index["controller"], **_unflatten_controller_tensors(tensors["controller"])},
    )


def _read_index(folder: Path) -> dict[str, Any]:
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
        raise ValueError(f"{file} is damaged: its checksum is wrong.")
    index.setdefault("frozen", [])  # not in the first checkpoints of this format
    if wrong := mismatch(index, SCHEMA):
        raise ValueError(f"{file} is no index of an L1RA checkpoint: {wrong}.")
    return index


def _read_tensors(folder: Path, kind: str, name: str, sha256: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{folder} is damaged: its {kind} can't be read ({error}).") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its checksum is wrong.")
    try:
        return from_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read: {error}.") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file. Returns its SHA-256 checksum."""
    from safetensors.torch import save as to_bytes

    data = to_bytes(tensors)
    with atomic_write(path) as (partial_file,):
        partial_file.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _files_in_index(index: Path) -> set[str]:
    """The tensor files that the index names; empty if the index can't be read."""
    try:
        names = {file["name"] for file in json.loads(index.read_bytes())["files"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and OWN_FILES.fullmatch(name)}


def _stale_files(folder: Path) -> set[str]:
    """Files that killed processes have left. They are so old that no process can still be writing them."""
    found = set()
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process may have deleted the file
            if OWN_FILES.fullmatch(file.name) and time.time() - file.stat().st_mtime > STALE_AFTER:
                found.add(file.name)
    return found


def _delete(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _adapter_tensors(adapters: Mapping[str, L1RALinear], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' parameters, without reserved rows, and the tensors ``trained``, by name in the state dict."""
    rows = {
        f"{name}.{part}": getattr(adapter, part)[: adapter.rank]
        for name, adapter in adapters.items()
        for part in ADAPTER_PARAMETERS
    }
    return {name: cpu_copy(value) for name, value in {**rows, **trained}.items()}


def _controller_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the controller's state as a flat dict, as safetensors stores them."""
    probes = {f"probes.{part}.{name}": t for name, probe in state["probes"].items() for part, t in probe.items()}
    gates = {f"gates.{name}": t for name, t in state["gates"].items()}
    return {n: t.cpu().contiguous() for n, t in {**gates, **probes, "generator": state["generator"]}.items()}


def _unflatten_controller_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undo :func:`_controller_tensors`."""
    probes: dict[str, dict[str, Tensor]] = {}
    gates = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "gates":
            gates[rest] = tensor
        elif kind == "probes":
            part, _, adapter = rest.partition(".")
            probes.setdefault(adapter, {})[part] = tensor
    generator = {name: tensor for name, tensor in tensors.items() if name == "generator"}
    return {"gates": gates, "probes": probes, **generator}


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
