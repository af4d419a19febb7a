"""One run: a method on a case with a seed. All methods of a seed see the same inputs and targets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import l1ra
from benchmarks.planted.cases import CASES, Case
from benchmarks.planted.turnover import Turnover
from l1ra.layers.adapted_model import find_adapters

__all__ = ["METHODS", "Data", "Result", "run"]

# Those that a controller drives, with their settings; only they take overrides.
DRIVEN: dict[str, dict[str, Any]] = {
    "reference": {"preset": "reference"},
    "default": {"preset": "default"},
    "gradient-rows": {"preset": "default", "new_rows": "gradient"},
}
METHODS = ("frozen", "uniform", *DRIVEN, "oracle", "floor")


@dataclass(frozen=True)
class Result:
    """Of one run.

    Attributes:
        error: mean-squared error on fresh inputs, against the teacher without noise.
        ranks: final ranks, in the order of the layers; empty without adapters.
        planted_ranks: layer name -> planted rank.
        budget: ranks for all layers.
        layers: how many there are.
        min_rank: what every adapter keeps.
        moved: ranks that went from one adapter to another.
        reallocations: ``step``, ranks ``cut`` and ``dealt`` of each.
        wasted: ranks dealt that were cut again before the end.
        seconds: of training.
    """

    error: float
    ranks: dict[str, int]
    planted_ranks: dict[str, int]
    budget: int
    layers: int
    min_rank: int = 0
    moved: int = 0
    reallocations: list[dict[str, int]] = field(default_factory=list)
    wasted: int = 0
    seconds: float = 0.0

    @property
    def planted_share(self) -> float:
        """Share of the given ranks that lies on planted layers."""
        return sum(self.ranks.get(name, 0) for name in self.planted_ranks) / max(1, sum(self.ranks.values()))

    @property
    def placeable(self) -> int:
        """Ranks that can lie on planted layers at most: the others keep ``min_rank`` each."""
        return self.budget - self.min_rank * len(set(self.ranks) - set(self.planted_ranks))

    @property
    def placed(self) -> float:
        """Ranks on planted layers, as a share of what can lie there."""
        return sum(self.ranks.get(name, 0) for name in self.planted_ranks) / self.placeable

    @property
    def coverage(self) -> float:
        """Share of the planted ranks, as far as they can be met, that are met; a layer's surplus does not count."""
        met = sum(min(rank, self.ranks.get(name, 0)) for name, rank in self.planted_ranks.items())
        return met / min(self.placeable, sum(self.planted_ranks.values()))


class Data:
    """Inputs and targets of a seed, the same for all methods."""

    def __init__(self, case: Case, teacher: nn.Module, seed: int, noise: float) -> None:
        self._case, self._teacher, self._noise = case, teacher, noise
        self._inputs = torch.Generator().manual_seed(1000 + seed)
        # Of its own, so that the inputs are those of the case without noise.
        self._noises = torch.Generator().manual_seed(2000 + seed)

    @torch.no_grad()
    def batch(self) -> tuple[Tensor, Tensor]:
        """The next one to train on."""
        x, y = self._draw(self._case.batch)
        return x, y + self._noise * torch.randn(y.shape, generator=self._noises) if self._noise else y

    def test(self) -> tuple[Tensor, Tensor]:
        """Fresh inputs, and the teacher's outputs without noise."""
        return self._draw(self._case.test_inputs)

    @torch.no_grad()
    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, *self._case.inputs, generator=self._inputs)
        return x, self._teacher(x)


def run(method: str, seed: int, steps: int | None = None, case: str | Case = "mlp", **overrides: object) -> Result:
    """Train with ``method`` and measure.

    ``"frozen"``: the student as it is. ``"uniform"``: LoRA, our layers with all gates held at 1. ``"reference"``,
    ``"default"``: the presets; ``"gradient-rows"``: with ``new_rows="gradient"``. ``"oracle"``: LoRA that is
    given the planted ranks. ``"floor"``: the same, starting at the solution and without noise: what this training
    leaves of the error by rounding and by its own unrest.

    Args:
        steps: instead of the case's.
        overrides: settings of ``L1RAConfig``, for ``"reference"``, ``"default"`` and ``"gradient-rows"``.

    Raises:
        ValueError: no such method, or overrides for one that takes none.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if overrides and method not in DRIVEN:
        raise ValueError(f"{method!r} takes no settings of L1RAConfig: only {', '.join(DRIVEN)} do.")
    case = CASES[case] if isinstance(case, str) else case
    steps = case.steps if steps is None else steps
    student, teacher = case.problem(seed)
    layers = len(case.layers(student))
    budget = case.per_layer * layers
    controller, turnover = None, None
    if method in DRIVEN:
        settings = {"total_steps": steps, "seed": seed, **DRIVEN[method], **overrides}
        controller = l1ra.patch(student, budget, **settings)
        turnover = Turnover(controller)
    elif method == "uniform":
        controller = l1ra.patch(student, budget, total_steps=steps, rule="l1", gate_lr=0.0, l1_lambda=0.0)
    elif method != "frozen":
        ranks = case.oracle_ranks(budget) if method == "oracle" else dict(case.planted)
        _adapt(student, ranks)
        if method == "floor":
            _solve(student, teacher)
    data = Data(case, teacher, seed, noise=0.0 if method == "floor" else case.noise)
    began = time.perf_counter()
    if method != "frozen":
        _train(student, data, steps, case.lr)
    seconds = time.perf_counter() - began
    x, y = data.test()
    with torch.no_grad():
        error = (student(x) - y).square().mean().item()
    return Result(
        error=error,
        ranks={name: layer.rank for name, layer in find_adapters(student)},
        planted_ranks=dict(case.planted),
        budget=budget,
        layers=layers,
        min_rank=controller.config.min_rank if controller else 0,
        moved=controller.moved if controller else 0,
        reallocations=turnover.reallocations() if turnover else [],
        wasted=turnover.wasted if turnover else 0,
        seconds=seconds,
    )


def _adapt(student: nn.Module, ranks: dict[str, int]) -> None:
    """Plain LoRA of these ranks: gates stay 1."""
    for name, rank in ranks.items():
        student.set_submodule(name, l1ra.L1RALinear.from_linear(student.get_submodule(name), rank=rank))
    student.requires_grad_(False)
    for name, p in student.named_parameters():
        p.requires_grad_("lora" in name)


@torch.no_grad()
def _solve(student: nn.Module, teacher: nn.Module) -> None:
    """Set each adapter to the difference of the teacher's weight and the student's."""
    for name, layer in find_adapters(student):
        u, s, v = torch.linalg.svd(teacher.get_submodule(name).weight - layer.weight)
        root = s[: layer.rank].sqrt().unsqueeze(1)
        layer.lora_A.copy_(root * v[: layer.rank])
        layer.lora_B.copy_(root * u.T[: layer.rank])


def _train(student: nn.Module, data: Data, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = data.batch()
        loss = (student(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
