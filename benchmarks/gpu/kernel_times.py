"""Kernels alone, against the bytes that they have to move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.common.statistics import spread
from benchmarks.gpu import kernels, required_tests
from benchmarks.gpu.bench import Bench, LeftOut
from benchmarks.gpu.ceilings import copy_rate
from benchmarks.gpu.timing import Work, interleave

__all__ = ["run"]

ROUNDS = 20


def run(bench: Bench) -> dict[str, Any]:
    """Rows of time, rate and share of the copy's rate; and the names of what was left out."""
    ceiling = copy_rate(bench)
    builders: list[tuple[str, str, Callable[[], kernels.KernelCase]]] = [
        (make.__name__, str(shape), functools.partial(make, bench, shape))
        for shape in bench.sizes.shapes
        for make in kernels.LAYER_CASES
    ]
    builders += [(make.__name__, "whole model", functools.partial(make, bench)) for make in kernels.MODEL_CASES]
    rows, left_out = [], {}
    found = bench.results["kernels"] = {"rows": rows, "left_out": left_out}
    for name, shape, make in builders:
        if bench.budget.left <= 0:
            left_out[f"{name}, {shape}"] = bench.no_time(f"kernel {name}, {shape}")
            continue
        try:
            bench.admit(name, required_tests.KERNELS[name])
            rows.append(measure(bench, make(), shape, ceiling))
        except LeftOut as reason:
            left_out[name] = str(reason)
        except Exception as error:
            bench.leave_out(left_out, "kernels", f"{name}, {shape}", error)
        bench.at = None
        bench.save()
    for name, reason in left_out.items():
        bench.say(f"  left out: {name}: {reason}")
    bench.clock.release()
    return found


def measure(bench: Bench, case: kernels.KernelCase, shape: str, ceiling: float) -> dict[str, Any]:
    work = Work({"kernel": case.call}, case.before)
    samples = interleave(bench.clock, {"kernel": work}, ROUNDS, bench.budget)["kernel"]
    ms = spread([s.total for s in samples])
    rate = case.bytes / (ms["median"] * 1e-3)
    row = {
        "name": case.name,
        "shape": shape,
        "bytes": case.bytes,
        "ms": ms,
        "gb_per_s": rate * 1e-9,
        "copy_share": rate / ceiling,
        "floor_ms": case.bytes / ceiling * 1e3,
    }
    bench.say(
        f"  {shape:32s} {case.name:28s} {ms['median']:8.4f} ms  {row['gb_per_s']:7.0f} GB/s  "
        f"{100 * row['copy_share']:5.1f} % of a copy"
    )
    return row
