"""Ranks that move on several GPUs of this machine (NCCL): alike in all processes, and what a step then costs.

Each way of training is held against the others: all see the same examples, so that ranks must move alike.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import l1ra
from benchmarks.common.statistics import spread
from benchmarks.gpu.bench import SEED, Bench

__all__ = ["WAYS", "run"]

INTERVAL = 6
STEPS = 10 * INTERVAL
MOST = 4  # processes
BLOCKS = 8


class Residual(nn.Module):
    """Blocks ``x + tanh(linear(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def sharded_by_columns(model: nn.Module) -> nn.Module:
    return sharded(model, **l1ra.fsdp(model))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": replicated,
    "fully_shard": sharded,
    "fully_shard with l1ra.fsdp": sharded_by_columns,
}


def run(bench: Bench, processes: int | None = None) -> dict[str, Any]:
    """For each way of training the ranks it ended with, and milliseconds of its steps.

    Args:
        processes: None: one for each GPU, four at most.
    """
    count = min(MOST, torch.cuda.device_count() if bench.cuda else 1) if processes is None else processes
    if count < 2:
        bench.say("  left out: this machine has one GPU")
        return {"left_out": ["several processes: this machine has one GPU"]}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (count, Path(folder), bench.device.type, bench.tiny), nprocs=count)
        parts = [torch.load(Path(folder) / f"{number}.pt", weights_only=False) for number in range(count)]
    rows = []
    for way in WAYS:
        ranks = [part[way]["ranks"] for part in parts]
        if any(own != ranks[0] for own in ranks) or not parts[0][way]["moved"]:
            bench.failed.append(f"{way}: the processes moved other ranks, or none: {ranks}")
        rows.append({"way": way, **parts[0][way]})
        step, moving = (parts[0][way][name]["median"] for name in ("step_ms", "moving_step_ms"))
        bench.say(f"  {way}: {step:.2f} ms a step, {moving:.2f} ms where ranks move; {parts[0][way]['moved']} moved")
    if any(row["ranks"] != rows[0]["ranks"] for row in rows):
        bench.failed.append("the ways of training moved other ranks: " + "; ".join(row["way"] for row in rows))
    return {"processes": count, "rows": rows}


def work(number: int, count: int, folder: Path, kind: str, tiny: bool) -> None:
    """One process."""
    device = torch.device(kind, number) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": count}
    backend = "nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=60), **meeting)
    width, tokens = (12, 16) if tiny else (2048, 512)
    torch.save(
        {way: training(wrap, number, count, device, width, tokens) for way, wrap in WAYS.items()},
        folder / f"{number}.pt",
    )
    distributed.barrier()
    distributed.destroy_process_group()


def training(
    wrap: Callable[[nn.Module], nn.Module], number: int, count: int, device: torch.device, width: int, tokens: int
) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = Residual(width)
    wanted = Residual(width).to(device)  # what is to be learned
    inputs = torch.randn(tokens * count, width).to(device)
    with torch.no_grad():
        targets = wanted(inputs)
    settings = {"interval": INTERVAL, "warmup": 0.0, "cooldown": 0.2, "margin": 1.0, "min_coherence": -1.0}
    budget = 4 * BLOCKS
    controller = l1ra.patch(model.to(device), budget, total_steps=STEPS, reserve=min(16, width), **settings)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    plain, moving = [], []
    for _ in range(STEPS):
        moved = controller.moved
        start = time.perf_counter()
        nn.functional.mse_loss(wrapped(inputs[number::count]), targets[number::count]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        (moving if controller.moved > moved else plain).append(1e3 * (time.perf_counter() - start))
    return {
        "ranks": controller.ranks,
        "moved": controller.moved,
        "step_ms": spread(plain),
        "moving_step_ms": spread(moving or [math.nan]),
    }
