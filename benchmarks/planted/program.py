"""Planted ranks: does the budget find the layers that need it?

A frozen random network is the student; its teacher differs from it by low-rank terms of known rank in some layers. The
student is adapted to the teacher under a rank budget that is spread evenly at first, on fresh random inputs at every
step, and compared with uniform LoRA and with an oracle that was given the planted ranks.

    python -m benchmarks.planted                                        # everything: about an hour on two cores
    python -m benchmarks.planted --cases mlp --seeds 3
    python -m benchmarks.planted --cases mlp llama --methods default --set margin=0.3 --label m0.3 --out runs/planted

Each run adds a row to ``<case>.jsonl`` in ``--out`` and is not repeated if its row is there; ``planted.md`` there is
made from all rows.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import RESULTS, write_text
from benchmarks.common.settings import setting
from benchmarks.planted.cases import CASES
from benchmarks.planted.runs import Job, load, one_thread, perform, sources, store
from benchmarks.planted.tables import markdown
from benchmarks.planted.training import DRIVEN, METHODS
from l1ra import L1RAConfig


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.planted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M", help=", ".join(METHODS))
    p.add_argument("--seeds", type=int, default=5, help="0 ... SEEDS - 1; default 5")
    p.add_argument("--steps", type=int, help="number of training steps, instead of the case's own")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each; default 2")
    p.add_argument("--out", type=Path, default=RESULTS / "planted")
    p.add_argument("--again", action="store_true", help="repeat runs that have a record")
    p.add_argument("--set", nargs="+", type=setting, default=[], metavar="KEY=VALUE", help="settings of L1RAConfig")
    p.add_argument("--label", help="the name of `default` with these settings; default: the settings")
    return p


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """The runs that are asked for. With settings, the methods that take any are named after the label.

    Raises:
        TypeError, ValueError: a setting that ``L1RAConfig`` refuses, or its seed, which is the run's.
    """
    overrides = dict(arguments.set)
    if "seed" in overrides:
        raise ValueError("every run has a seed of its own, from 0 on: write --seeds and how many.")
    L1RAConfig().replace(**overrides)
    found = []
    for case in arguments.cases:
        for method in arguments.methods:
            name, own = method, {}
            if overrides and method in DRIVEN:
                own = overrides
                name = arguments.label if method == "default" else f"{method}-{arguments.label}"
            steps = arguments.steps or CASES[case].steps
            found += [Job(case, method, name, seed, steps, own) for seed in range(arguments.seeds)]
    return found


def line(record: dict[str, Any], note: str = "") -> str:
    """A run in one line."""
    text = f"{record['case']:12s} {record['label']:12s} seed {record['seed']}  error {record['error']:<9.4g}"
    if record["ranks"]:
        ranks = list(record["ranks"].values())
        text += f"  {record['planted_share']:.0%} on planted layers, {record['moved']} moved, {ranks}"
    return text + note


def work(wanted: list[Job], out: Path, processes: int) -> None:
    """Run all of them, ``processes`` at a time, and print each as it ends."""
    if processes == 1 or len(wanted) < 2:
        threads = torch.get_num_threads()
        one_thread()
        for job in wanted:
            print(line(perform(job, out)), flush=True)
        torch.set_num_threads(threads)
        return
    # Threads that spin while they wait slow down the other worker; read when torch is loaded, in the new process.
    os.environ.update(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="0")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for done in as_completed([pool.submit(perform, job, out) for job in wanted]):
            print(line(done.result()), flush=True)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.label and not arguments.set:
        p.error("--label names settings: add --set KEY=VALUE")
    arguments.label = arguments.label or ",".join(f"{key}={value}" for key, value in arguments.set)
    try:
        asked = jobs(arguments)
    except (TypeError, ValueError) as reason:
        p.error(str(reason))
    for name in dict.fromkeys(arguments.cases):
        case = CASES[name]
        print(f"{name}: planted {dict(case.planted)}, {case.per_layer} ranks a layer, torch {torch.__version__}")
    wanted = []
    for job in asked:
        record = None if arguments.again else load(job, arguments.out)
        if record is None:
            wanted.append(job)
        else:
            old = job.method in DRIVEN and record["sources"] != sources()
            print(line(record, "  (from before" + (", l1ra has changed since)" if old else ")")), flush=True)
    work(wanted, arguments.out, arguments.jobs)
    page = arguments.out / "planted.md"
    write_text(page, markdown(store(arguments.out).read_all(), arguments.label or "default"))
    print(f"{page} has all runs so far.")
    return 0
