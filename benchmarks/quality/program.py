"""Fine-tuning methods compared at equal budgets: LoRA, rsLoRA, AdaLoRA, L1RA, and the model as it is.

Every run has the same layers, head, data order, steps and schedule, and one alpha at all budgets; each method's
learning rate is found by the same climb on a grid, at the middle budget or, for language models, at each, judged by the
loss on a validation part, and what is reported comes from a test part. The head's learning rate is found first, beside
LoRA, and is the same for all methods.

Runs that are recorded are not done again: a call that is broken off, or has used up its minutes, goes on where it was.

    python -m benchmarks.quality                                        # hours on two cores
    python -m benchmarks.quality --tasks polarity --methods lora l1ra --seeds 3
    python -m benchmarks.quality --device cuda --minutes 25
    python -m benchmarks.quality --set margin=0.3 --label m03 --tasks polarity --rate 2e-3     # an experiment
    python -m benchmarks.quality --table-only
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.files import RESULTS, write_text
from benchmarks.common.settings import setting
from benchmarks.quality.analysis import Results
from benchmarks.quality.learning_rates import RATES, START
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plots import draw
from benchmarks.quality.run_queue import Plan, PlannedTask, Queue, start
from benchmarks.quality.runs import store
from benchmarks.quality.tables import markdown
from benchmarks.quality.tasks import TASKS
from examples.data import DataError

__all__ = ["main"]

OUT = RESULTS / "quality"


def main(argv: list[str] | None = None, launch: Callable[[Any], Any] = start) -> int:
    """Do what the command line asks for.

    Returns:
        0, or 1 if a run failed.
    """
    arguments = parse(argv)
    # Shorter or longer trainings are another experiment: their records would be taken for each other.
    out = arguments.out if arguments.steps is None else arguments.out / f"{arguments.steps}-steps"
    failed: list[str] = []
    made_by = commands(out, argv, trains=not arguments.table_only)  # noted at once: a call may be broken off
    if not arguments.table_only:
        queue = Queue(
            arguments.jobs or (2 if arguments.device == "cpu" else 1), deadline(arguments.minutes), expected_seconds()
        )
        queue.launch = launch
        plan = make_plan(arguments, out)
        try:
            if arguments.minutes != 0:
                fetch(plan)
        except DataError as error:
            print(f"quality: {error}", file=sys.stderr)
            return 1
        queue.use_recorded_times(store(out).read_all(), arguments.device)
        queue.work(plan.ready)
        if plan.unsettled():
            print(f"not begun, as learning rates are still to be tried: {', '.join(plan.unsettled())}")
        if queue.left:
            print(f"{queue.left} runs, and what follows from them, are left for the next call: no time for them.")
        failed = queue.failed
    report(out, made_by)
    if failed:
        print(f"{len(failed)} runs FAILED and are not recorded: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def report(out: Path, made_by: list[str]) -> None:
    """Tables and pictures of the records in ``out``."""
    results = Results(store(out).read_all(), METHODS)
    if not results.records:
        return
    page = out / "quality.md"
    write_text(page, markdown(results, made_by))
    print(f"written: {page}")
    try:
        draw(results, out)
    except ImportError:
        print("no pictures: matplotlib is not installed")


def deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def expected_seconds() -> dict[str, float]:
    return {task.name: task.guess for task in TASKS.values()}


def fetch(plan: Plan) -> None:
    """Texts and models, before several processes want them at once."""
    for name in plan.tasks:
        TASKS[name].model()
        TASKS[name].examples()


def make_plan(arguments: argparse.Namespace, out: Path) -> Plan:
    tasks = {}
    for name in arguments.tasks:
        task = TASKS[name]
        budgets = tuple(arguments.budgets or task.budgets)
        steps = arguments.steps or task.steps
        tasks[name] = PlannedTask(steps, task.middle, budgets, task.has_head, task.climbs_each)
    experiment = arguments.label is not None
    return Plan(
        tasks,
        ("l1ra",) if experiment else tuple(arguments.methods),
        arguments.seeds,
        str(out.resolve()),
        arguments.device,
        arguments.label,
        tuple(arguments.set),
        arguments.rate,
        tuple(arguments.rates),
        share=not experiment and arguments.budgets is None,
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        metavar="TASK",
        help=f"{', '.join(TASKS)} (default: on a GPU all, on a CPU those of an hour or two)",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    add(
        "--budgets",
        nargs="+",
        type=float,
        help="multiples of the number of adapted layers (default: 2 4 8, and 70 %% of 4 and 8 for l1ra)",
    )
    add("--seeds", type=int, default=5, help="number of them (default: %(default)s)")
    add("--steps", type=int, help="instead of the tasks' own; records go into a folder of their own inside --out")
    add("--out", type=Path, default=OUT, help="folder of records, tables and pictures")
    add(
        "--set",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="settings of L1RAConfig for an experiment with l1ra; needs --label",
    )
    add("--label", help="name of the experiment in records and tables")
    add("--rate", type=float, help="a learning rate instead of the climb; the head still has its own")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help=f"the grid of the climb, which begins next to {START:g}",
    )
    add("--jobs", type=int, help="runs side by side (default: 2 on a CPU, 1 on a GPU)")
    add("--minutes", type=float, help="begin no run that would probably end later")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--table-only", action="store_true", help="train nothing; make tables and pictures of the records")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    found = p.parse_args(argv)
    if bool(found.set) != (found.label is not None):
        p.error("--set and --label belong together")
    if found.label in METHODS:
        p.error(f"--label {found.label} is the name of a method")
    found.tasks = found.tasks or [name for name, task in TASKS.items() if task.default or found.device == "cuda"]
    return found


def commands(out: Path, argv: list[str] | None, trains: bool) -> list[str]:
    """The different command lines that have made the records in ``out``, this one among them if it trains."""
    file = out / "commands.txt"
    found = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    words = sys.argv[1:] if argv is None else argv
    # Where results lie, and how much time there was, makes no difference to them.
    words = [word for i, word in enumerate(words) if not {"--out", "--minutes"} & {word, *words[max(0, i - 1) : i]}]
    line = shlex.join(["python", "-m", "benchmarks.quality", *words])
    if trains and line not in found:
        found.append(line)
        write_text(file, "\n".join(found) + "\n")
    return found
