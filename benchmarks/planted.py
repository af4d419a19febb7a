"""Planted ranks: does the budget find the layers that need it?

A frozen random residual net is the student; its teacher differs from it by low-rank terms of known rank in some
layers. The student is adapted to the teacher under a budget that is spread evenly at first, on fresh random inputs
at every step, and compared with uniform LoRA and with an oracle that was given the planted ranks.

    python benchmarks/planted.py --seeds 3
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import l1ra

WIDTH, DEPTH, PER_LAYER, STEPS, BATCH, LR = 64, 8, 4, 1500, 64, 5e-3
PLANTED = {1: 12, 4: 8, 6: 6}


class ResidualNet(nn.Module):
    """``x <- x + relu(x W + b) / 2``, layer after layer."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu() / 2
        return x / math.sqrt(len(self.layers))


@dataclass(frozen=True)
class Result:
    """Of one run: mean-squared error on fresh inputs, final ranks by layer, ranks moved."""

    error: float
    ranks: list[int] = field(default_factory=list)
    moved: int = 0

    @property
    def planted_share(self) -> float:
        """Share of the given ranks that lies on planted layers."""
        return sum(self.ranks[i] for i in PLANTED) / max(1, sum(self.ranks))


def problem(seed: int) -> tuple[ResidualNet, ResidualNet]:
    """Student and teacher."""
    torch.manual_seed(seed)
    student, teacher = ResidualNet(), ResidualNet()
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        for i, rank in PLANTED.items():
            u = torch.linalg.qr(torch.randn(WIDTH, rank)).Q
            v = torch.linalg.qr(torch.randn(WIDTH, rank)).Q
            teacher.layers[i].weight += u @ v.T * 1.5
    return student, teacher.requires_grad_(False)


def run(method: str, seed: int, steps: int = STEPS, **overrides: object) -> Result:
    """Train with ``method``: ``"frozen"``, ``"uniform"``, ``"oracle"``, ``"reference"`` or ``"default"``.

    Uniform LoRA is the same layers with all gates held at 1. ``overrides`` are settings of ``L1RAConfig``.
    """
    student, teacher = problem(seed)
    budget = PER_LAYER * DEPTH
    controller = None
    if method == "oracle":
        for i, rank in PLANTED.items():
            student.layers[i] = l1ra.L1RALinear.from_linear(student.layers[i], rank=rank)
        student.requires_grad_(False)
        for name, p in student.named_parameters():
            p.requires_grad_("lora" in name)
    elif method == "uniform":
        controller = l1ra.patch(student, budget, total_steps=steps, rule="l1", gate_lr=0.0, l1_lambda=0.0)
    elif method != "frozen":
        controller = l1ra.patch(student, budget, preset=method, total_steps=steps, seed=seed, **overrides)
    generator = torch.Generator().manual_seed(1000 + seed)
    if method != "frozen":
        optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            x = torch.randn(BATCH, WIDTH, generator=generator)
            loss = (student(x) - teacher(x)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    with torch.no_grad():
        x = torch.randn(4096, WIDTH, generator=generator)
        error = (student(x) - teacher(x)).square().mean().item()
    if controller is None:
        return Result(error)
    return Result(error, list(controller.ranks.values()), controller.moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="+", default=["frozen", "uniform", "reference", "default", "oracle"])
    arguments = parser.parse_args()
    print(f"planted {PLANTED} of {DEPTH} layers, budget {PER_LAYER * DEPTH}, torch {torch.__version__}")
    for method in arguments.methods:
        for seed in range(arguments.seeds):
            r = run(method, seed, arguments.steps)
            share = f"{r.planted_share:.0%} on planted layers, {r.moved} moved, {r.ranks}" if r.ranks else ""
            print(f"{method:10s} seed {seed}  error {r.error:.6f}  {share}", flush=True)


if __name__ == "__main__":
    main()
