"""How long a training waits while ranks move between all adapters of a model.

The layers are there without the rest of the model, and those of one kind share their frozen weight. A few tokens run
through each of them, so that new ranks have their directions to look along. Before each reallocation a part of the
gates is set to 0 by way of the state dict, as a resumed training would do it.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.common.statistics import spread
from benchmarks.gpu import required_tests
from benchmarks.gpu.bench import Bench, LeftOut
from benchmarks.gpu.sizes import ModelShape
from benchmarks.gpu.step import timed
from l1ra import L1RALinear, RankController
from l1ra.layers.adapted_model import find_adapters

__all__ = ["run"]

INTERVAL = 4
PRUNED = 2
TOKENS = 16


def run(bench: Bench) -> dict[str, Any]:
    """Milliseconds of optimizer steps with and without a reallocation, and how many ranks moved."""
    try:
        bench.admit("reallocation", required_tests.REALLOCATION)
    except LeftOut as reason:
        bench.say(f"  left out: {reason}")
        return {"left_out": [f"reallocation: {reason}"]}
    shape, rank = bench.sizes.models[-1], bench.sizes.model_rank
    model = stack(bench, shape, rank)
    total = (bench.sizes.reallocations + 2) * INTERVAL * 100
    count = 7 * shape.layers
    controller = RankController(model, rank * count, interval=INTERVAL, warmup=0.0, cooldown=0.0, total_steps=total)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=bench.cuda)
    plain, moving, moved = [], [], []
    for number in range(1, 1 + INTERVAL * (bench.sizes.reallocations + 1)):
        if bench.budget.left <= 0:
            break
        resumed = number % INTERVAL == INTERVAL - 1
        if resumed:
            zero_gates(model)
        gradients(bench, model)
        before = controller.moved
        ms = 1e3 * timed(bench, optimizer.step)
        optimizer.zero_grad()
        # The first interval allocates the optimizer's state and the like; a step that reads gates anew is none of both.
        if number > INTERVAL and not resumed:
            (moving if controller.moved > before else plain).append(ms)
            moved += [controller.moved - before] if controller.moved > before else []
    if not moving or not plain:
        raise RuntimeError("no rank moved: nothing was timed")
    extra = statistics.median(moving) - statistics.median(plain)
    found = {
        "adapters": count,
        "rank": rank,
        "ranks_moved": moved,
        "step_ms": spread(plain),
        "step_with_reallocation_ms": spread(moving),
        "reallocation_ms": extra,
    }
    controller.close()
    bench.say(
        f"  {count} adapters, {statistics.median(moved):.0f} ranks moved: {extra:.1f} ms on top of a step of the "
        f"optimizer and the gates, {found['step_ms']['median']:.1f} ms ({len(moving)} reallocations)"
    )
    return found


def stack(bench: Bench, shape: ModelShape, rank: int) -> nn.Module:
    """``shape.layers`` times the seven linears, on shared weights, each with an adapter."""
    weights = {
        name: nn.Parameter(bench.randn(outputs, inputs, std=inputs**-0.5), requires_grad=False)
        for name, (inputs, outputs) in shape.linears.items()
    }

    def layer() -> nn.ModuleDict:
        linears = nn.ModuleDict()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = weight
            linears[name] = L1RALinear.from_linear(linear, rank=rank)
        return linears

    return nn.ModuleList(layer() for _ in range(shape.layers))


def gradients(bench: Bench, model: nn.Module) -> None:
    """A few random tokens forward and backward through each adapter by itself."""
    for _, layer in find_adapters(model):
        y = layer(bench.randn(TOKENS, layer.in_features))
        y.backward(torch.randn_like(y))


def zero_gates(model: nn.Module) -> None:
    """Set the first gates of every other adapter to 0."""
    gates = {}
    for i, (name, layer) in enumerate(find_adapters(model)):
        if i % 2 == 0:
            gate = layer.gate.detach().clone()
            gate[: min(PRUNED, layer.rank - 1)] = 0
            gates[f"{name}.gate"] = gate
    model.load_state_dict(gates, strict=False)
