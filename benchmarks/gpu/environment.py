"""On what all of it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.bench import Bench

__all__ = ["commit", "processor", "run", "version"]

COMMIT = ROOT / "COMMIT"  # git rev-parse HEAD > COMMIT, for a copy without .git
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "matplotlib", "pytest")
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def run(bench: Bench) -> dict[str, Any]:
    """Hardware, versions, commit and seed."""
    found: dict[str, Any] = {
        "device": bench.device_name,
        "tiny": bench.tiny,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "seed": bench.seed,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": bench.results.get("options", {}).get("commit") or commit(),
        "kernels": os.environ.get("L1RA_KERNELS", "auto"),
        "cpu_threads": torch.get_num_threads(),
    }
    if bench.cuda:
        card = torch.cuda.get_device_properties(bench.device)
        found |= {
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "l2_mib": round(getattr(card, "L2_cache_size", 0) / 2**20, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "nvidia_smi": nvidia_smi(),
            "c_compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),  # triton needs one
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    for key, value in found.items():
        bench.say(f"  {key}: {value}")
    return found


def version(package: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output_of(*command: str) -> str | None:
    """What a command prints, None if it can't be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The git commit of the working tree, with a mark if files differ from it; without git what COMMIT says."""
    head = output_of("git", "rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return COMMIT.read_text(encoding="utf-8").strip() or None if COMMIT.exists() else None
    return head + (" and changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else "")


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks (at rest), power limit and temperature."""
    line = output_of("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    return None if line is None else dict(zip(QUERY, line.splitlines()[0].split(", "), strict=False))
