"""The state of a run, which every section is given, and the errors by which a competitor is left out."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.files import write_text
from benchmarks.gpu import required_tests
from benchmarks.gpu.processes import poisoned
from benchmarks.gpu.sizes import FULL, TINY, Sizes
from benchmarks.gpu.tables import OURS
from benchmarks.gpu.timing import Budget, Clock, Failed

__all__ = ["SEED", "Bench", "LeftOut", "WrongResult", "error_line"]

SEED = 0
LONGEST = 300  # characters of a reason


class WrongResult(Exception):
    """A result is wrong: the competitor that computed it is not timed."""


class LeftOut(Exception):
    """A competitor can't take part; the message says why, and the tables name it."""


def one_line(text: str) -> str:
    """For tables: some messages have pages."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else words[:LONGEST] + " ..."


def error_line(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")


@dataclass
class Bench:
    """The run at hand.

    Attributes:
        results: section -> its results; a section reads those of earlier ones.
        failed: errors, and wrong results of ours; the program goes on, and its exit code is 1.
        late: whether something was left out for lack of time.
        at: the competitor or kernel that runs now: should the process die, a new one goes on without it.
        part: the file that :meth:`save` writes; None: no file.
        section: whose results are saved.
    """

    device: torch.device
    tiny: bool
    part: Path | None = None
    seed: int = SEED
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    budget: Budget = field(default_factory=lambda: Budget(0))
    late: bool = False
    at: str | None = None
    section: str = ""

    def __post_init__(self) -> None:
        self.clock = Clock(self.device, self.sizes.flush_bytes)

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else FULL

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def save(self, done: bool = False) -> None:
        """Write the section's results so far to ``part``, which the parent process reads."""
        if self.part is None:
            return
        content = {"result": self.results.get(self.section), "failed": self.failed, "at": self.at, "done": done}
        write_text(self.part, json.dumps(content, default=str))

    def no_time(self, what: str) -> str:
        """Note that ``what`` is left out; the words for the table."""
        self.late = True
        self.failed.append(f"{what}: no time left")
        self.say(f"  left out: {what}: no time left")
        return "no time left"

    def admit(self, name: str, files: Sequence[str] = ()) -> None:
        """Note that ``name`` runs next in this process.

        Raises:
            LeftOut: the kernels' tests in ``files`` did not all pass, or an earlier process died of it.
        """
        if why := self.results.get("avoid", {}).get(name) or required_tests.untested(self.results, files):
            raise LeftOut(why)
        self.at = name
        self.save()

    def leave_out(self, left_out: dict[str, str], where: str, name: str, error: Exception) -> None:
        """Note why ``name`` takes no part. Wrong results of ours and errors are failures of the run.

        Raises:
            RuntimeError: nothing else can be measured in this process either.
        """
        if isinstance(error, Failed):
            error = error.__cause__
        reason = error_line(error)
        if isinstance(error, LeftOut):
            left_out[name] = one_line(str(error))
        elif isinstance(error, WrongResult):
            left_out[name] = f"wrong: {error}"
            if name.startswith(OURS):
                self.failed.append(str(error))
        else:
            traceback.print_exception(error)
            if poisoned():
                self.at = self.at or name
                raise RuntimeError(f"{where}: {name} broke this process's use of the GPU: {reason}") from error
            left_out[name] = f"failed: {reason}"
            self.failed.append(f"{where}: {name}: {reason}")
        self.at = None

    def randn(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers on the device: products of zeros take less power and run faster than real ones."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).mul_(std)
