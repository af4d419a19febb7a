"""Adapters and their controller on disk: a JSON file that names two safetensors files, and is written last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l1ra.config import L1RAConfig
from l1ra.files.atomic_write import PARTIAL_SUFFIX, atomic_write, cpu_copy
from l1ra.files.controller_state import IN_TENSORS
from l1ra.files.controller_state import SCHEMA as STATE
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
    "controller": {name: form for name, form in STATE.items() if name not in IN_TENSORS},
    "files": {kind: {"name": str, "sha256": str} for kind in TENSOR_FILES},
}
LEFT = 600.0  # seconds
# Of older checkpoints, or left by a process that was killed while it wrote.
OURS = re.compile(r"(l1ra\.json|(adapters|controller)-[0-9a-f]{16}\.safetensors)(" + PARTIAL_SUFFIX + ")?")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        config: of the controller.
        adapters: module name -> ``(in_features, out_features)``.
        trained: names of what else a training changes, see ``trained_tensors``.
        tensors: by their names in the model's state dict: live rows of the adapters, and what ``trained`` names.
        controller: its ``state_dict()``.
    """

    config: L1RAConfig
    adapters: dict[str, tuple[int, int]]
    trained: list[str]
    tensors: dict[str, Tensor]
    controller: dict[str, Any]


def save(
    folder: str | os.PathLike,
    config: L1RAConfig,
    adapters: Mapping[str, L1RALinear],
    trained: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write adapters, other trained tensors and the state of their controller into ``folder``.

    Only live rows are written. The folder is never without a whole checkpoint: files of the new one lie beside those of
    the old one until the index is replaced, in one step. Of several processes one is enough; if all of them save into
    one folder, the last one's checkpoint stays.

    Args:
        config: of the controller.
        adapters: by module name.
        trained: the other tensors that the training changes, see ``trained_tensors``.
        state: of the controller, its ``state_dict()``.

    Raises:
        OSError: it can't be written; an older checkpoint in the folder is still whole.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"adapters": _live_tensors(adapters, trained), "controller": _tensors_of(state)}
    index: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "adapters": {n: [a.in_features, a.out_features] for n, a in adapters.items()},
        "trained": sorted(trained),
        "controller": {name: value for name, value in state.items() if name not in IN_TENSORS},
        "files": {},
    }
    before, written = _named(folder / INDEX), []
    try:
        for kind in TENSOR_FILES:
            data = to_bytes(tensors[kind])
            # A name that no other process takes: each clears away what it has replaced.
            name = f"{kind}-{secrets.token_hex(8)}.safetensors"
            written.append(name)
            with atomic_write(folder / name) as (aside,):
                aside.write_bytes(data)
            index["files"][kind] = {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
        with atomic_write(folder / INDEX) as (aside,):
            aside.write_text(json.dumps({**index, "sha256": _digest(index)}, indent=1))
    except BaseException:
        _clear(folder, set(written) - _named(folder / INDEX))
        raise
    _clear(folder, (before | _left(folder)) - {INDEX, *written})


def read(folder: str | os.PathLike) -> Checkpoint:
    """What :func:`save` has written.

    Raises:
        FileNotFoundError: no checkpoint is there.
        ValueError: it is damaged, or of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
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
    if wrong := mismatch(index, SCHEMA):
        raise ValueError(f"{file} is no index of an L1RA checkpoint: {wrong}.")
    try:
        config = L1RAConfig(**index["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has other settings than this version of l1ra: {error}") from None
    tensors = {}
    for kind in TENSOR_FILES:
        path = folder / index["files"][kind]["name"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{folder} is damaged: its {kind} can't be read ({error}).") from None
        if hashlib.sha256(data).hexdigest() != index["files"][kind]["sha256"]:
            raise ValueError(f"{path} is damaged: its bytes are not those that were written.")
        try:
            tensors[kind] = from_bytes(data)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read: {error}.") from None
    return Checkpoint(
        config,
        {name: tuple(size) for name, size in index["adapters"].items()},
        index["trained"],
        tensors["adapters"],
        _state(index, tensors["controller"]),
    )


def _named(index: Path) -> set[str]:
    """The files of the checkpoint that is there, none if it can't be read."""
    try:
        names = {file["name"] for file in json.loads(index.read_bytes())["files"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and OURS.fullmatch(name)}


def _clear(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _left(folder: Path) -> set[str]:
    """What killed processes have left: so old that no other process is writing it now."""
    found = set()
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process clears away too
            if OURS.fullmatch(file.name) and time.time() - file.stat().st_mtime > LEFT:
                found.add(file.name)
    return found


def _live_tensors(adapters: Mapping[str, L1RALinear], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows = {
        f"{name}.{part}": getattr(adapter, part)[: adapter.rank]
        for name, adapter in adapters.items()
        for part in ADAPTER_PARAMETERS
    }
    return {name: cpu_copy(value) for name, value in {**rows, **trained}.items()}


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    probes = {f"probes.{part}.{name}": t for name, probe in state["probes"].items() for part, t in probe.items()}
    gates = {f"gates.{name}": t for name, t in state["gates"].items()}
    return {n: t.cpu().contiguous() for n, t in {**gates, **probes, "generator": state["generator"]}.items()}


def _state(index: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
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
    return {**index["controller"], "gates": gates, "probes": probes, **generator}


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
