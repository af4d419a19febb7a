"""``doctor``: the installed packages, the devices, the implementation that each type of layer uses, and self-checks."""

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
from l1ra.reporting.self_check import Check, run_checks
from l1ra_kernels import choice

__all__ = ["Diagnosis", "doctor"]

PACKAGES = ("l1ra", "torch", "triton", "transformers", "numpy", "safetensors")
OPTIONAL = ("peft", "accelerate", "trl", "bitsandbytes", "torchao")
VARIABLES = ("L1RA_KERNELS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of :func:`doctor`. ``str()`` formats it as text, e.g. for a bug report.

    Attributes:
        system: Python version, operating system and processor.
        versions: package name -> version, "" if the package is not installed.
        variables: the environment variables that affect L1RA and are set.
        devices: a description of each device, with its memory.
        device: the device on which the checks ran.
        checks: the checks and their results.
        seconds: duration of :func:`doctor`.
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
        """Whether no check has failed."""
        return not any(check.ok is False for check in self.checks)

    def __str__(self) -> str:
        installed = [f"{name} {version}" for name, version in self.versions.items() if version]
        missing = [name for name, version in self.versions.items() if not version]
        lines = [self.system, ", ".join(installed)]
        if missing:
            lines.append(f"not installed: {', '.join(missing)}")
        lines += [f"{name}={value}" for name, value in self.variables.items()]
        lines += ["", *self.devices, "", f"tried on {self.device}:", ""]
        return "\n".join([*lines, *self._table(), "", self._summary()])

    __repr__ = __str__

    def _table(self) -> list[str]:
        paths = list(dict.fromkeys(check.path for check in self.checks if check.path))
        rows = [("", "dtype", "path", "found")]
        for check in self.checks:
            path = f"{check.path.split(' (')[0]} [{paths.index(check.path) + 1}]" if check.path else ""
            status = {True: "ok", False: "FAILED", None: "not tried"}[check.ok]
            rows.append((check.name, check.dtype, path, f"{status}: {check.message}"))
        first, *lines = aligned_columns(rows, left=range(4))
        return [first, "-" * len(first), *lines, "", *(f"path [{n}]: {path}" for n, path in enumerate(paths, 1))]

    def _summary(self) -> str:
        failed = sum(check.ok is False for check in self.checks)
        tried = sum(check.ok is not None for check in self.checks)
        result = f"{failed} of {tried} checks FAILED" if failed else f"all {tried} checks are ok"
        return f"{result} ({self.seconds:.1f} s)"


def doctor() -> Diagnosis:
    """Describe the environment, and check the adapters on the GPU, or on the CPU if there is no GPU.

    The diagnosis lists the installed packages and which implementation each type of layer uses and why. It states
    whether outputs and gradients agree with float64, whether a reallocation preserves a model's function, and whether a
    saved checkpoint loads. ``python -m l1ra`` prints the diagnosis; its exit status is 1 if a check has failed.

    The checks take a few seconds. They do not change torch's random number generators, and errors in them are reported
    and not raised.

    Example::

        diagnosis = l1ra.doctor()
        print(diagnosis)

    Returns:
        A :class:`Diagnosis`: ``ok`` is False if a check has failed, ``checks`` lists them, ``str()`` is a text.
    """
    start = time.perf_counter()
    device = _device()
    checks = tuple(run_checks(device))
    return Diagnosis(
        f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        {name: os.environ[name] for name in VARIABLES if name in os.environ},
        tuple(_describe_devices()),
        str(device),
        checks,
        time.perf_counter() - start,
    )


def _device() -> torch.device:
    """The device to run the checks on."""
    try:
        if torch.accelerator.is_available():
            return torch.empty(0, device=torch.accelerator.current_accelerator()).device
    except RuntimeError:  # the accelerator exists but can't be used; _describe_devices() reports the error
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


def _describe_devices() -> Iterable[str]:
    memory = ""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        memory = f", {_format_size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
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
        memory = f"{_format_size(free)} of {_format_size(card.total_memory)} free"
        yield f"cuda:{i}: {card.name}, compute capability {card.major}.{card.minor}, {memory}, {built}"


def _format_size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
