"""Processor, versions and commit of a benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

from benchmarks.common.files import ROOT

__all__ = ["command_output", "git_commit", "package_version", "processor_name", "versions"]

COMMIT = ROOT / "COMMIT"  # git rev-parse HEAD > COMMIT, for a copy without .git


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and of these packages; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The name of the CPU, or of its architecture."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_output(*command: str) -> str | None:
    """The output of a command; None if it can't be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit() -> str | None:
    """The commit of the working tree, with a mark if files differ from it; without git the text of ``COMMIT``."""
    head = command_output("git", "rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return COMMIT.read_text(encoding="utf-8").strip() or None if COMMIT.exists() else None
    return head + (" and changes" if command_output("git", "status", "--porcelain", "--untracked-files=no") else "")
