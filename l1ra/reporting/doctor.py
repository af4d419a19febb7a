"""What is installed, what there is to compute on, which path each kind of layer takes there, and if it is right."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from l1ra.reporting.columns import aligned_columns
from l1ra.reporting.self_check import Check, checks
from l1ra_kernels import choice

__all__ = ["Diagnosis", "doctor"]

PACKAGES = ("l1ra", "torch", "triton", "transformers", "numpy", "safetensors")
OPTIONAL = ("peft", "accelerate", "trl", "bitsandbytes", "torchao")
VARIABLES = ("L1RA_KERNELS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`doctor` has found; ``str()`` makes a text of it, for a bug report.

    Attributes:
        system: Python, operating system and processor.
        versions: package -> version, "" where it is not installed.
        variables: of the environment, those that are set.
        devices: each with its memory, in words.
        device: the one on which everything was tried.
        checks: what was tried, and how it went.
        seconds: that it took.
    """

    system: str
    versions: dict[str, str]
    variables: dict[str, str]
    devices: tuple[str, ...]
    device: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing that was tried has failed."""
        return not any(check.ok is False for check in self.checks)

    def __str__(self) -> str:
        there = [f"{name} {version}" for name, version in self.versions.items() if version]
        absent = [name for name, version in self.versions.items() if not version]
        lines = [self.system, ", ".join(there)]
        if absent:
            lines.append(f"not installed: {', '.join(absent)}")
        lines += [f"{name}={value}" for name, value in self.variables.items()]
        lines += ["", *self.devices, "", f"tried on {self.device}:", ""]
        return "\n".join([*lines, *self._table(), "", self._verdict()])

    __repr__ = __str__

    def _table(self) -> list[str]:
        layers = [check for check in self.checks if check.path]
        paths = list(dict.fromkeys(check.path for check in layers))
        rows = [("", "dtype", "path", "found")]
        for check in self.checks:
            path = f"{check.path.split(' (')[0]} [{paths.index(check.path) + 1}]" if check.path else ""
            word = {True: "ok", False: "FAILED", None: "not tried"}[check.ok]
            rows.append((check.what, check.dtype, path, f"{word}: {check.told}"))
        first, *lines = aligned_columns(rows, left=range(4))
        return [first, "-" * len(first), *lines, "", *(f"path [{n}]: {path}" for n, path in enumerate(paths, 1))]

    def _verdict(self) -> str:
        failed = sum(check.ok is False for check in self.checks)
        tried = sum(check.ok is not None for check in self.checks)
        found = f"{failed} of {tried} checks FAILED" if failed else f"all {tried} checks are ok"
        return f"{found} ({self.seconds:.1f} s)"


def doctor() -> Diagnosis:
    """Look at the environment, and try the adapters on the device that there is: a GPU, or the CPU.

    ``print(l1ra.doctor())`` says what is installed, which path each kind of layer takes and why, whether its output and
    gradients are those of float64, whether a reallocation keeps a model's function, and whether a checkpoint comes
    back. So does ``python -m l1ra``, whose exit status is 1 if something has failed. It takes a few seconds, and
    changes nothing.

    Returns:
        What was found; nothing is raised.
    """
    start = time.perf_counter()
    device = _device()
    found = tuple(checks(device))
    return Diagnosis(
        f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        {name: os.environ[name] for name in VARIABLES if name in os.environ},
        tuple(_devices()),
        str(device),
        found,
        time.perf_counter() - start,
    )


def _device() -> torch.device:
    try:
        if torch.accelerator.is_available():
            return torch.empty(0, device=torch.accelerator.current_accelerator()).device
    except RuntimeError:  # it is there and does not answer: _devices says so
        pass
    return torch.device("cpu")


def _version(package: str) -> str:
    if package in ("l1ra", "torch"):
        return importlib.import_module(package).__version__
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{version} (can't be imported)" if package == "triton" and not choice.triton_available() else version


def _devices() -> Iterable[str]:
    memory = ""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        memory = f", {_gib(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
    yield f"cpu: {platform.machine()}{memory}"
    cuda, rocm = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else ""
    if built and not torch.cuda.is_available():
        yield f"torch is built for {built}, and finds no GPU"
    for i in range(torch.cuda.device_count()):
        try:
            card, free = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0]
        except RuntimeError as error:
            yield f"cuda:{i}: {error}"
            continue
        memory = f"{_gib(free)} of {_gib(card.total_memory)} free"
        yield f"cuda:{i}: {card.name}, compute capability {card.major}.{card.minor}, {memory}, {built}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
