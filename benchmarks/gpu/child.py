"""One section in a process of its own: ``python -m benchmarks.gpu.child SECTION FOLDER SECONDS DEADLINE``.

FOLDER holds ``given.json``, the results so far, and gets ``SECTION.json``. SECONDS are the section's own,
DEADLINE those after which the process will be killed.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, environment, kernel_times, linears, reallocation, step, workers
from benchmarks.gpu.bench import SEED, Bench, error_line
from benchmarks.gpu.processes import NO_GPU
from benchmarks.gpu.timing import Budget

__all__ = ["SECTIONS", "main"]

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": environment.run,
    "step": step.run,
    "linears": linears.run,
    "kernels": kernel_times.run,
    "ceilings": ceilings.run,
    "reallocation": reallocation.run,
    "workers": workers.run,
}


def main(name: str, folder: Path, seconds: float, deadline: float) -> int:
    given = json.loads((folder / "given.json").read_text())
    options = given["options"]
    if options["device"] == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    # Where it hung, should it hang.
    faulthandler.dump_traceback_later(max(1.0, deadline - 2), file=sys.stdout)
    torch.manual_seed(SEED)
    bench = Bench(
        torch.device(options["device"]),
        options["tiny"],
        results=given,
        budget=Budget(seconds),
        section=name,
        part=folder / f"{name}.json",
    )
    try:
        bench.results[name] = SECTIONS[name](bench)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        bench.failed.append(f"{name}: {error_line(error)}")
        bench.save()
        return 1
    if bench.cuda:
        # Read while the card is still warm: a card that throttles shows here.
        bench.results[name]["card_after"] = environment.nvidia_smi()
    bench.save(done=not bench.late)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
