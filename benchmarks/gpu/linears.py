"""Adapted linear layers, forward and backward, all competitors in turn: a decoder layer's seven, then single ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.statistics import ratios, spread
from benchmarks.common.tables import spread_text
from benchmarks.gpu import providers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import check
from benchmarks.gpu.problem import Problem, decoder_layer, single
from benchmarks.gpu.providers import Adapted
from benchmarks.gpu.tables import FROZEN, OURS
from benchmarks.gpu.timing import Budget, Failed, Sample, Work, interleave

__all__ = ["run"]

# Of the section's time, for the decoder layer; the rest is shared evenly by the single layers.
LAYER_SHARE = 0.35


def run(bench: Bench) -> dict[str, Any]:
    """A table for each problem."""
    sizes = bench.sizes
    empty = {"tables": [], "left_out": [], "notes": providers.NOTES}
    found: dict[str, Any] = bench.results.setdefault("linears", empty)
    makers: list[Callable[[], Problem]] = [
        lambda: decoder_layer(bench, sizes.layer, sizes.layer_tokens, sizes.layer_rank),
        *(lambda shape=shape: single(bench, shape) for shape in sizes.shapes),
    ]
    # Without the problems that an earlier process finished before it died.
    for i, make in list(enumerate(makers))[len(found["tables"]) :]:
        if bench.budget.left <= 0:
            what = f"{len(makers) - i} of {len(makers)} tables of linear layers"
            found["left_out"] = [f"{what}: {bench.no_time(what)}"]
            break
        share = LAYER_SHARE if i == 0 else 1 / (len(makers) - i)
        table = one_problem(bench, make(), Budget(share * bench.budget.left))
        found["tables"].append(table)
        bench.save()
        show(bench, table)
        bench.clock.release()
    return found


def one_problem(bench: Bench, problem: Problem, budget: Budget) -> dict[str, Any]:
    """Build every competitor, bring it to where a training is after its first step, check it, then time all in turn."""
    torch._dynamo.reset()
    adapted: dict[str, Adapted] = {}
    errors: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name, adapt in providers.PROVIDERS.items():
        try:
            bench.admit(name, providers.TESTED_BY.get(name, ()))
            candidate = adapt(bench, problem.build(), problem.shape.rank)
            for linear, adapter in candidate.adapters.items():
                adapter.set(*problem.rows[linear])
            errors[name] = check(name, candidate, problem)
            adapted[name] = candidate
        except Exception as error:
            bench.leave_out(left_out, problem.title, name, error)
    bench.at = None
    bench.save()
    problem.forget()
    bench.clock.release()
    works = {name: work(candidate, problem) for name, candidate in adapted.items()}
    samples = None
    while samples is None:
        try:
            samples = interleave(bench.clock, works, bench.sizes.rounds, budget)
        except Failed as failure:
            bench.leave_out(left_out, problem.title, failure.name, failure)
            del works[failure.name]
    peaks = {name: bench.clock.peak_bytes(works[name]) for name in works}
    base = [s.total for s in samples[FROZEN]] if FROZEN in samples else None
    rows = [
        {
            "provider": name,
            "path": adapted[name].path,
            "rounds": len(samples[name]),
            **times(samples[name]),
            "overhead_percent": ratios([s.total for s in samples[name]], base) if base else None,
            "peak_mib": None if peaks[name] is None else peaks[name] / 2**20,
            "errors": errors[name],
        }
        for name in works
    ]
    for candidate in adapted.values():
        candidate.clear()
    problem.clear()
    shape = problem.shape
    return {
        "title": problem.title,
        "linears": len(problem.weights),
        "M": shape.tokens,
        "K": shape.inputs,
        "N": shape.outputs,
        "r": shape.rank,
        "rows": rows,
        "left_out": left_out,
    }


def work(adapted: Adapted, problem: Problem) -> Work:
    """Forward, and backward with the problem's gradients; the gradients of the last round are dropped before."""
    held: dict[str, tuple[torch.Tensor, ...]] = {}

    def forward() -> None:
        held["outputs"] = adapted.module(*problem.inputs)

    def backward() -> None:
        torch.autograd.backward(held.pop("outputs"), problem.gradients)

    def before() -> None:
        adapted.clear()
        problem.clear()

    return Work({"forward": forward, "backward": backward}, before)


def times(samples: list[Sample]) -> dict[str, dict[str, float]]:
    return {
        "total_ms": spread([s.total for s in samples]),
        "forward_ms": spread([s.parts["forward"] for s in samples]),
        "backward_ms": spread([s.parts["backward"] for s in samples]),
        "host_ms": spread([s.host for s in samples]),
    }


def show(bench: Bench, table: dict[str, Any]) -> None:
    bench.say(f"  {table['title']}")
    for row in table["rows"]:
        over = row["overhead_percent"]
        overhead = "" if over is None else f"{spread_text(over, '+.1f')} %"
        peak = "" if row["peak_mib"] is None else f"  {row['peak_mib']:7.0f} MiB"
        path = f"  [{row['path']}]" if row["provider"].startswith(OURS) else ""
        bench.say(
            f"    {row['provider']:24s} {spread_text(row['total_ms'], '.3f')} ms  forward "
            f"{row['forward_ms']['median']:7.3f}  backward {row['backward_ms']['median']:7.3f}  host "
            f"{row['host_ms']['median']:6.3f}  {overhead}{peak}{path}"
        )
    for name, reason in table["left_out"].items():
        bench.say(f"    left out: {name}: {reason}")
