"""The rates that the card reaches: memory traffic, large products, products onto an output, skinny products."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common.statistics import spread
from benchmarks.common.tables import spread_text
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import Work, interleave

__all__ = ["copy_rate", "run"]

ROUNDS = 15
THIN = 16


def copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written together, of a copy within the device; measured once a run."""
    known = bench.results.get("ceilings", {}).get("copy")
    if known is not None:
        return known["tb_per_s"] * 1e12
    ms = measure_copy(bench)["ms"]["median"]
    return 2 * bench.sizes.copy_bytes / (ms * 1e-3)


def run(bench: Bench) -> dict[str, Any]:
    copy = measure_copy(bench)
    bench.say(f"  copy  {copy['tb_per_s']:.3f} TB/s  ({spread_text(copy['ms'], '.3f')} ms)")
    found = bench.results["ceilings"] = {"copy": copy, "products": []}
    bench.save()
    side = bench.sizes.square
    sizes = [(side, side, side), *dict.fromkeys((s.tokens, s.inputs, s.outputs) for s in bench.sizes.shapes)]
    for m, k, n in sizes:
        if bench.budget.left <= 0:
            bench.no_time(f"products of {m} x {k} x {n}")
            continue
        found["products"] += measure_products(bench, m, k, n)
        bench.save()
    bench.clock.release()
    return found


def measure_copy(bench: Bench) -> dict[str, Any]:
    """A copy that is far larger than the L2 cache."""
    source = torch.randint(0, 127, (bench.sizes.copy_bytes,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    work = Work({"copy": lambda: target.copy_(source)})
    samples = interleave(bench.clock, {"copy": work}, ROUNDS, bench.budget)["copy"]
    ms = spread([s.total for s in samples])
    return {"bytes": 2 * source.numel(), "ms": ms, "tb_per_s": 2 * source.numel() / ms["median"] * 1e-9}


def measure_products(bench: Bench, m: int, k: int, n: int) -> list[dict[str, Any]]:
    """``x W^T`` written and added onto an output (beta = 1), and the two thin products of an adapter, in turn."""
    x, w, y = bench.randn(m, k), bench.randn(n, k, std=k**-0.5), bench.randn(m, n)
    a, b, h = bench.randn(THIN, k), bench.randn(THIN, n), bench.randn(m, THIN)
    size = y.element_size()
    # Flops, and the bytes that have to be moved: each operand once.
    large, thin = 2 * m * k * n, 2 * m * THIN
    kinds = {
        "product": (lambda: torch.mm(x, w.t(), out=y), large, m * k + n * k + m * n),
        "product, beta=1": (lambda: y.addmm_(x, w.t()), large, m * k + n * k + 2 * m * n),
        f"down to {THIN}": (lambda: torch.mm(x, a.t(), out=h), thin * k, m * k + THIN * k + m * THIN),
        f"up from {THIN}": (lambda: torch.mm(h, b, out=y), thin * n, m * n + THIN * n + m * THIN),
        f"up from {THIN}, beta=1": (lambda: y.addmm_(h, b), thin * n, 2 * m * n + THIN * n + m * THIN),
    }
    works = {name: Work({"product": call}) for name, (call, _, _) in kinds.items()}
    samples = interleave(bench.clock, works, ROUNDS, bench.budget)
    rows = []
    for name, (_, flops, numbers) in kinds.items():
        ms = spread([s.total for s in samples[name]])
        row = {
            "name": name,
            "M": m,
            "K": k,
            "N": n,
            "ms": ms,
            "tflops_per_s": flops / ms["median"] * 1e-9,
            "gb_per_s": numbers * size / ms["median"] * 1e-6,
        }
        rows.append(row)
        bench.say(
            f"  {m} x {k} x {n}  {name:22s} {spread_text(ms, '.3f')} ms  "
            f"{row['tflops_per_s']:7.1f} TFLOP/s  {row['gb_per_s']:7.0f} GB/s"
        )
    return rows
