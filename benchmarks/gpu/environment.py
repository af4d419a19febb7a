"""On what all of it was measured."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

import torch

from benchmarks.common.environment import command_output, git_commit, package_version
from benchmarks.gpu.bench import Bench

__all__ = ["nvidia_smi", "run"]

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
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": bench.results.get("options", {}).get("commit") or git_commit(),
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


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks (at rest), power limit and temperature."""
    line = command_output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    return None if line is None else dict(zip(QUERY, line.splitlines()[0].split(", "), strict=False))
