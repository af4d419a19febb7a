"""Processes of ours, each at the head of a group of its own, so that none of their children outlives its time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from benchmarks.common.files import ROOT

__all__ = ["NO_GPU", "environment", "kill", "kill_all", "poisoned", "start"]

NO_GPU = 2  # the exit code of a process that finds no GPU
_started: list[subprocess.Popen] = []


def environment(device: str) -> dict[str, str]:
    """Of a child: kernels are interpreted on a CPU, and never on a GPU."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(python_path())}
    if device == "cpu":
        found.setdefault("TRITON_INTERPRET", "1")
        found["CUDA_VISIBLE_DEVICES"] = ""
    else:
        found.pop("TRITON_INTERPRET", None)
    return found


def python_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def start(command: Sequence[str], output: IO | int, device: str) -> subprocess.Popen[Any]:
    """Run ``command`` in the repository; its stdout and stderr go to ``output``."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment(device),
        start_new_session=True,
    )
    _started.append(process)
    return process


def poisoned() -> bool:
    """Whether this process can't use its GPU any more, as after an illegal address."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def kill(process: subprocess.Popen) -> None:
    """End a process and its group; it may have ended already, and left children behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in a driver can't be killed; the run goes on without it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def kill_all() -> None:
    for process in _started:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
