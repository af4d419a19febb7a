"""What the controller costs beside the optimizer, on a CPU: ``python -m benchmarks.step_operations``.

Prints the torch ops of each kind of step without views, on a GPU about the launches; how often Python reads values of a
tensor, for which a GPU is waited for if the tensor is on it; the seconds of a decision for many adapters.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import l1ra
from benchmarks.common.environment import git_commit, processor_name, versions
from benchmarks.common.tables import markdown_table
from l1ra.allocation.plan import Plan, allocate, ranks_given_back, ranks_to_prune
from l1ra.config import L1RAConfig
from l1ra.layers.low_rank import GatedLowRank
from l1ra.layers.row_moves import RowMoves
from l1ra.training.gate_bank import GateBank
from l1ra.training.gate_rules import make_rule
from l1ra.training.schedule import Stage

__all__ = ["COUNTED", "Cost", "Operations", "step_costs"]

WIDTH, RANK, INTERVAL = 32, 16, 8
# Kind of a step -> one of its kind, in the second interval.
COUNTED = {"probing": 10, "middle": 12, "plain": 13, "reallocation": 16}
READS = {"item", "tolist", "numpy", "cpu", "equal", "nonzero", "__bool__", "__float__", "__int__", "__index__"}


class Operations(TorchDispatchMode):
    """Counts the torch ops that are dispatched in its context, by name. Views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.reads = _Reads()

    @property
    def count(self) -> int:
        return self.found.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func is torch.ops.aten.detach_.default):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts how often Python reads values of a tensor."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cost:
    """Of one step of the controller.

    Attributes:
        operations: torch ops, by name.
        reads: how often Python read values of a tensor.
        milliseconds: of the fastest of several such steps, without counting.
    """

    operations: Counter[str]
    reads: int
    milliseconds: float


class Stack(nn.Module):
    """``depth`` linear layers, each beside a shortcut."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * 0.05
        return x


@contextmanager
def _counting() -> Iterator[Operations]:
    operations = Operations()
    with operations.reads, operations:
        yield operations


def step_costs(adapters: int, *, intervals: int = 2, **settings: object) -> dict[str, Cost]:
    """The cost of each kind of step in the second interval of a training.

    Args:
        adapters: their number, each of rank 16 at first.
        intervals: how many to train; times are those of the third one and later ones.
        settings: of :func:`l1ra.patch`.
    """
    torch.manual_seed(0)
    model, x, y = Stack(adapters), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    brisk = {"total_steps": 100 * INTERVAL, "interval": INTERVAL, "warmup": 0.0, "margin": 1.0, "min_coherence": -1.0}
    controller = l1ra.patch(model, adapters * RANK, auto=False, **{**brisk, **settings})
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("gate")]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True)
    counted: dict[str, Operations] = {}
    times: dict[str, list[float]] = {kind: [] for kind in COUNTED}
    kinds = {step % INTERVAL: kind for kind, step in COUNTED.items()}
    for step in range(1, intervals * INTERVAL + 1):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        kind = kinds.get(step % INTERVAL)
        if step in COUNTED.values():
            with _counting() as counted[kind]:
                controller.step(optimizer)
            continue
        start = time.perf_counter()
        controller.step(optimizer)
        if kind and step > 2 * INTERVAL:
            times[kind].append(1e3 * (time.perf_counter() - start))
    return {
        kind: Cost(found.found, found.reads.count, min(times[kind], default=float("nan")))
        for kind, found in counted.items()
    }


def _decision_seconds(adapters: int) -> dict[str, float]:
    """Seconds of the parts of a decision, and of a step of the gates, for adapters of ten ranks each."""
    rng = random.Random(0)
    costs, caps, learning = [1] * adapters, [40] * adapters, [rng.random() < 0.7 for _ in range(adapters)]
    layers = [GatedLowRank(16, 16, None, 10, None, False, True, "kaiming", torch.float32, None, None) for _ in costs]
    settings, rule, moves = {"min_rank": 1, "caps": caps, "learning": learning}, make_rule(L1RAConfig()), RowMoves()
    stage = Stage(interval=100, progress=0.5, over=False, min_age=1)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        seconds[name] = time.perf_counter() - start
        return found

    bank = timed("GateBank", lambda: GateBank(layers))
    gradients = {i: torch.randn(10) for i in range(adapters)}

    def step() -> None:
        flat, seen, moved = bank.flatten(gradients)
        bank.update(rule.step(bank, flat, stage, seen), flat, seen)
        bank.write_to_layers(range(adapters), moved)

    step()  # the first one allocates
    timed("a step of GateBank", step)
    timed("importance", lambda: rule.importance(bank, stage))
    importance = [[rng.lognormvariate(0, 1) for _ in range(10)] for _ in range(adapters)]
    given_back = timed("ranks_given_back, 20 reallocations", lambda: ranks_given_back([[10] * adapters] * 20))
    settings["given_back"] = given_back
    chosen = timed(
        "ranks_to_prune", lambda: ranks_to_prune(importance, costs, margin=0.7, max_count=3 * adapters, **settings)
    )
    timed("GateBank.penalise", lambda: bank.penalise(chosen, costs))
    gates = [[float(k not in rows) for k in range(10)] for rows in chosen]

    def allocated(importance: list | None) -> Plan:
        return allocate(gates, importance, costs, 10 * adapters, prune_threshold=0.5, **settings)

    plan = timed("allocate", lambda: allocated(importance))
    timed("allocate, without importance", lambda: allocated(None))
    timed("GateBank.plan_move, its tensors move", lambda: (bank.plan_move(moves, plan), moves.run()))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="*", default=[224, 1000], help="for the steps")
    parser.add_argument("--planned", type=int, nargs="*", default=[10_000, 100_000], help="for the decision")
    parser.add_argument("--intervals", type=int, default=5, help="of the training whose steps are measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made_with = ", ".join(f"{name} {number}" for name, number in versions("torch").items())
    print(f"{processor_name()}, 1 thread; {made_with}; commit {git_commit()}\n")
    rows = []
    for adapters in args.adapters:
        for reserve in (None, WIDTH):
            costs = step_costs(adapters, intervals=args.intervals, reserve=reserve)
            for kind in ("plain", "probing", "middle", "reallocation"):
                cost = costs[kind]
                numbers = (cost.operations.total(), cost.reads, f"{cost.milliseconds:.1f}")
                rows.append([kind, str(adapters), str(reserve), *map(str, numbers)])
    if rows:
        print(markdown_table(["step", "adapters", "reserve", "torch ops", "reads", "controller, ms"], rows) + "\n")
    found = {adapters: _decision_seconds(adapters) for adapters in args.planned}
    names = next(iter(found.values())) if found else ()
    table = [[name, *(f"{found[adapters][name]:.2f}" for adapters in found)] for name in names]
    print(markdown_table(["seconds", *(f"{adapters:,} adapters" for adapters in found)], table))


if __name__ == "__main__":
    main()
