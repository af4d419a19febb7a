"""One run: its clock, its log, its results.json, and the processes that it starts and ends."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from subprocess import PIPE
from typing import Any

from benchmarks.common.files import RESULTS, ROOT, write_text
from benchmarks.gpu import correctness, processes, report, tables
from benchmarks.gpu.log import Log
from benchmarks.gpu.processes import NO_GPU
from benchmarks.gpu.sizes import ALWAYS, SECTIONS, seconds_for

__all__ = ["USUAL_SECONDS", "CannotRun", "Run", "child_command"]

TESTS = {"correctness": correctness.correctness, "trainings": correctness.trainings}
WRITE_UP = 15.0  # seconds kept for tables and pictures, of the usual total
GRACE = 20.0  # a child's start, and what its last round may take beyond its time
MOST_RETRIES = 3  # competitors or kernels that a section may lose in this way
LEAST = 2.0  # seconds with which a section is begun
LAST = 2.0  # before the end: the watchdog writes and leaves
USUAL_SECONDS = 560.0
# The environment's fields that must not differ between a run and its continuation.
SAME = ("device", "dtype", "tiny", "packages", "commit")


class CannotRun(Exception):
    """There is nothing to run; the message says why."""


def child_command(name: str, folder: Path, seconds: float, deadline: float) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.child", name, str(folder), f"{seconds:.1f}", f"{deadline:.1f}"]


class Run:
    """Raises CannotRun at once if it is to continue something that can't be continued."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.start = time.monotonic()
        self.seconds = options.seconds
        self.folder: Path | None = None  # nothing is written before it is known that this run may
        self.wanted: Path | None = options.resume or options.out
        self.resumed = options.resume is not None
        self.results = earlier(options.resume) if self.resumed else {"options": chosen_options(options)}
        self.options: dict[str, Any] = self.results["options"]
        self.results["command"] = command(self.options)
        self.results["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.sections: dict[str, dict[str, Any]] = self.results.setdefault("sections", {})
        self.now = ""
        self.at: str | None = None  # what the section's process was at when it was last heard of
        self.log = Log()
        self.over = threading.Event()

    def __enter__(self) -> Run:
        self.work = Path(tempfile.mkdtemp(prefix="l1ra-gpu-"))
        threading.Thread(target=self.watch, daemon=True).start()
        self.signal = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        processes.kill_all()
        self.log.close()
        signal.signal(signal.SIGTERM, self.signal)
        shutil.rmtree(self.work, ignore_errors=True)

    def watch(self) -> None:
        """End the run when its time is over, even if this process hangs."""
        if self.over.wait(max(0.0, self.seconds - LAST)):
            return
        # The lines below may hang, too, on a pipe that is not read or a disk that does not respond.
        threading.Timer(0.8 * LAST, os._exit, [1]).start()
        try:
            processes.kill_all()
            self.say(f"\nOUT OF TIME during {self.now}: {self.seconds:.0f} s are over.")
            self.save(f"out of time during {self.now}")
            shutil.rmtree(self.work, ignore_errors=True)
        finally:
            os._exit(1)

    @property
    def left(self) -> float:
        """Seconds for sections."""
        return (
            self.seconds
            - (time.monotonic() - self.start)
            - max(LAST, WRITE_UP * min(1.0, self.seconds / USUAL_SECONDS))
        )

    @property
    def failed(self) -> list[str]:
        return [line for state in self.sections.values() for line in state["failed"]]

    def say(self, text: str = "") -> None:
        self.log.say(text)

    def save(self, why: str) -> None:
        """results.json, whole, with ``unfinished`` in it until the end."""
        if self.folder is not None:
            results = {**self.results, "failed": self.failed} | ({"unfinished": why} if why else {})
            try:
                write_text(self.folder / "results.json", report.as_json(results))
            except OSError as error:
                self.say(f"results.json could not be written: {error}")

    def all(self) -> int:
        """Run the sections; the exit code."""
        wanted = self.options["only"]
        chosen = [name for name in SECTIONS if name in ALWAYS or not wanted or name in wanted]
        self.environment(chosen)
        for name in chosen[1:]:
            self.now = f"section {name}"
            if self.sections.get(name, {}).get("state") == "complete":
                self.say(f"\n{name}\n  complete since an earlier run")
                continue
            self.save(f"running, or killed in section {name}")
            try:
                self.section(name)
            except Exception as error:
                self.say(traceback.format_exc())
                self.fail(name, f"{type(error).__name__}: {error}")
        self.finish()
        for line in self.failed:
            self.say(f"FAILED: {line}")
        self.say(f"{time.monotonic() - self.start:.0f} s in all")
        return 1 if self.failed else 0

    def environment(self, chosen: list[str]) -> None:
        """The first section: says whether there is anything to measure on, and names the folder.

        Raises:
            CannotRun: there is no GPU, or this is not the machine or the code of the run that is to be continued.
        """
        before = self.results.get("environment")
        self.now = "section environment"
        if self.section("environment") == NO_GPU:
            raise CannotRun("There is no GPU here. On a CPU, `--tiny --device cpu` tries this program out.")
        found = self.results.get("environment") or {}
        if self.resumed and before and found:
            for key in SAME:
                if before.get(key) != found.get(key):
                    raise CannotRun(
                        f"{self.wanted} can't be continued here: its {key} is {before.get(key)}, not {found.get(key)}."
                    )
        self.folder = self.wanted or default_folder(found.get("device", "unknown device"), self.options, chosen)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.open(self.folder / "log.txt", self.resumed)
        if not self.resumed:
            report.clean(self.folder)
        if self.options["device"] == "cpu":
            self.say("CPU and tiny sizes: this tries the program out, its timings mean nothing.")

    def section(self, name: str) -> int | None:
        """Run one section; its exit code, None where it has none."""
        self.say(f"\n{name}")
        start, code = time.monotonic(), None
        state = self.sections[name] = {"state": "left out", "failed": [], "seconds": 0.0}
        self.results.pop(name, None)
        budget = min(seconds_for(name, self.seconds), self.left)
        if name == "correctness" and self.options["skip_correctness"]:
            self.results[name] = "skipped"
            state["state"] = "complete"
            self.say("  skipped: nobody knows whether what follows is right")
        elif budget < LEAST:
            self.fail(name, "left out, no time left")
        elif name in TESTS:
            self.tests(name, budget)
        else:
            code = self.child(name, budget)
            self.retry_without_failed(name, code, start + budget)
        state["seconds"] = round(time.monotonic() - start, 1)
        self.say(f"  ({name}: {state['seconds']:.0f} s of {budget:.0f})")
        self.save("running, or killed between sections")
        return code

    def fail(self, name: str, why: str) -> None:
        self.say(f"  {why}")
        self.sections[name]["failed"].append(f"{name}: {why}")

    def tests(self, name: str, budget: float) -> None:
        def keep(found: dict[str, Any]) -> None:
            self.results[name] = found
            self.save(f"running, or killed in section {name}")

        try:
            found = TESTS[name](self.options, budget, self.work, self.say, keep)
        except Exception as error:
            self.say(traceback.format_exc())
            self.sections[name]["state"] = "failed"
            self.fail(name, f"could not be run: {type(error).__name__}: {error}")
            return
        self.results[name] = found
        if found["outcome"] == "left out":
            return
        self.sections[name]["failed"] += [f"{name}: {failure['test']}" for failure in found["failures"]]
        self.sections[name]["state"] = "complete"
        if found["unfinished"] or found["outcome"] == "unfinished":
            self.sections[name]["state"] = "unfinished"
            self.fail(name, f"{found['unfinished']} tests did not run to an end, {found['passed']} passed")

    def retry_without_failed(self, name: str, code: int | None, end: float) -> None:
        """As long as a section's process dies of one competitor or kernel, go on in a new one that leaves it out."""
        avoid: dict[str, str] = {}
        while code not in (0, NO_GPU, None) and self.at not in (None, *avoid) and end - time.monotonic() > LEAST:
            if len(avoid) == MOST_RETRIES:
                break
            why = self.sections[name]["failed"][-1]
            avoid[self.at] = f"its process died: {why}"
            self.say(f"  once more, without {self.at}")
            before = self.sections[name]["failed"]
            self.results["avoid"] = avoid
            self.sections[name]["failed"] = []
            code = self.child(name, end - time.monotonic())
            self.sections[name]["failed"] = [*before, *self.sections[name]["failed"]]
        self.results.pop("avoid", None)

    def child(self, name: str, budget: float) -> int | None:
        """A section in a process of its own, until it ends or has to."""
        (self.work / f"{name}.json").unlink(missing_ok=True)
        self.at = None
        (self.work / "given.json").write_text(report.as_json(self.results))
        deadline = min(budget + GRACE * min(1.0, self.seconds / USUAL_SECONDS), max(LEAST, self.left))
        end = time.monotonic() + deadline
        seconds = min(budget, max(1.0, deadline - GRACE / 2))
        process = processes.start(child_command(name, self.work, seconds, deadline), PIPE, self.options["device"])
        reader = threading.Thread(target=self.echo, args=(process.stdout,), daemon=True)
        reader.start()
        seen = 0.0
        while process.poll() is None and time.monotonic() < end:
            seen = self.merge(name, seen)
            time.sleep(0.05)
        code = process.poll()
        processes.kill(process)
        # Children of the child may hold the pipe open for ever.
        reader.join(2)
        self.merge(name, 0.0)
        if code is None:
            self.sections[name]["state"] = "unfinished"
            self.fail(name, f"killed after {deadline:.0f} s; what it had written by then is kept")
        elif code and not self.sections[name]["failed"] and code != NO_GPU:
            self.sections[name]["state"] = "failed"
            self.fail(name, f"ended with exit code {code}; what it had written by then is kept")
        return code

    def echo(self, pipe: Any) -> None:
        for line in pipe:
            self.say(line.decode(errors="replace").rstrip("\n"))

    def merge(self, name: str, seen: float) -> float:
        """Take over what a section has written, if it is newer than ``seen``; when it was written."""
        part = self.work / f"{name}.json"
        if not part.exists() or (written := part.stat().st_mtime) <= seen:
            return seen
        content = json.loads(part.read_text())
        if content["result"] is not None:
            self.results[name] = content["result"]
        self.at = content.get("at")
        state = self.sections[name]
        state["failed"] = list(content["failed"])
        state["state"] = "complete" if content["done"] else "unfinished"
        self.save(f"running, or killed in section {name}")
        return written

    def finish(self) -> None:
        """Tables and pictures from the results, which are whole before any of them is begun."""
        self.now = "the write-up"
        runs = self.results.setdefault("runs", [])
        runs.append({"started": self.results["started"], "seconds": round(time.monotonic() - self.start, 1)})
        self.save("")
        self.say("\nwrite-up")
        written, broken = report.finished({**self.results, "failed": self.failed}, self.folder, self.say)
        for path in written:
            self.say(f"  {shown(path)}")
        self.sections.pop("write-up", None)
        if broken:
            self.sections["write-up"] = {"state": "failed", "failed": [f"write-up: {line}" for line in broken]}
            self.save("")
        else:
            self.say("\n" + tables.summary(self.results))


def earlier(folder: Path) -> dict[str, Any]:
    """The results of a run that ended early.

    Raises:
        CannotRun: there are none.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
        results["options"], results["sections"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{folder} holds no run to continue: {type(error).__name__}: {error}") from error
    results.pop("unfinished", None)
    return results


def chosen_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a continuation repeats."""
    found = {key: getattr(options, key) for key in ("only", "skip_correctness", "tiny", "device", "tests", "commit")}
    return {**found, "trainings": options.trainings or correctness.TRAININGS}


def command(options: dict[str, Any]) -> str:
    """How to run the same again; without the folder of the results, which says nothing about them."""
    words = ["python3 -m benchmarks.gpu"]
    words += ["--only", *options["only"]] if options["only"] else []
    words += ["--skip-correctness"] if options["skip_correctness"] else []
    words += ["--tiny"] if options["tiny"] else []
    words += ["--device", options["device"]] if options["device"] != "cuda" else []
    return " ".join(words)


def default_folder(device: str, options: dict[str, Any], chosen: list[str]) -> Path:
    """One folder a device; a run of some sections has one of its own, so that it replaces no full one."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    parts = [slug, *(["tiny"] if options["tiny"] else [])]
    if len(chosen) < len(SECTIONS):
        parts += ["only", *(name for name in chosen if name not in ALWAYS)]
    return RESULTS / "-".join(parts)


def shown(path: Path) -> Path:
    """Relative to the repository where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
