"""The problems: a network, where its teacher differs from it and by what rank, and how the student is trained.

Settings were chosen by feasibility alone: LoRA that is given the planted ranks (the oracle) has to end far below
uniform LoRA in the steps there are; where no layer needs more than another, uniform LoRA far below frozen. No rule that
moves ranks was looked at for it. ``mlp`` is the oldest, and its problems and settings never change, so that its figures
stay comparable.

- ``mlp``: the planted ranks are about the budget. ``below``: less than half of it. ``above``: more than it.
- ``deep``, ``wide``: the same kind of network, 16 x 48 and 4 x 128.
- ``noise``, ``more-noise``: ``mlp`` with noise on the targets, fresh at every step.
- ``unequal``: residual blocks that widen to four times their width or narrow to a quarter; planted in both.
- ``llama``: a small randomly initialised Llama, error on its last hidden state.
- ``no-structure``: what every layer was given is just what it needs. ``scarce``: every layer needs twice as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks.planted.networks import BlockNet, LlamaNet, ResidualNet

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One problem for every seed.

    Attributes:
        name: as on the command line.
        network: builds the student from torch's global random numbers.
        planted: layer name -> rank of the term by which the teacher's weight differs.
        inputs: shape of one input.
        per_layer: the budget is this many ranks for each linear layer.
        noise: standard deviation of the noise on the targets in training, fresh at every step.
        strength: every singular value of a term.
        test_inputs: how many fresh inputs the error is measured on.
        structured: whether layers differ in what they need; if not, uniform is right.
    """

    name: str
    network: partial[nn.Module]
    planted: Mapping[str, int]
    inputs: tuple[int, ...]
    per_layer: int = 4
    noise: float = 0.0
    strength: float = 1.5
    steps: int = 1500
    batch: int = 64
    lr: float = 5e-3
    test_inputs: int = 4096
    structured: bool = True

    def problem(self, seed: int) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, on the CPU in float32; torch's global generator is seeded."""
        torch.manual_seed(seed)
        student, teacher = self.network(), self.network()
        teacher.load_state_dict(student.state_dict())
        with torch.no_grad():
            for name, rank in self.planted.items():
                weight = teacher.get_submodule(name).weight
                u, v = (torch.linalg.qr(torch.randn(size, rank)).Q for size in weight.shape)
                weight += u @ v.T * self.strength
        return student, teacher.requires_grad_(False)

    def layers(self, model: nn.Module) -> list[str]:
        """Names of all linear layers, in order."""
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def oracle_ranks(self, budget: int) -> dict[str, int]:
        """The planted ranks; if they are more than the budget, that in proportion to them."""
        total = sum(self.planted.values())
        if total <= budget:
            return dict(self.planted)
        ranks = {name: rank * budget // total for name, rank in self.planted.items()}
        # Ranks left over by rounding down go to the largest remainders, the first of equal ones.
        order = sorted(self.planted, key=lambda name: -(self.planted[name] * budget % total))
        for name in order[: budget - sum(ranks.values())]:
            ranks[name] += 1
        return ranks

    def settings(self) -> dict[str, Any]:
        """All of it in plain values, for a record."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        arguments = ", ".join(map(repr, self.network.args))
        return {
            **plain,
            "network": f"{self.network.func.__name__}({arguments})",
            "planted": dict(self.planted),
            "inputs": list(self.inputs),
        }


def _numbered(ranks: dict[int, int]) -> Mapping[str, int]:
    return MappingProxyType({f"layers.{i}": rank for i, rank in ranks.items()})


def _all() -> list[Case]:
    mlp = Case("mlp", partial(ResidualNet, 64, 8), _numbered({1: 12, 4: 8, 6: 6}), inputs=(64,))
    unequal = {"blocks.0.up": 12, "blocks.1.up": 6, "blocks.2.down": 12, "blocks.5.down": 6}
    llama = {
        "model.layers.0.mlp.down_proj": 12,
        "model.layers.2.self_attn.o_proj": 10,
        "model.layers.3.mlp.gate_proj": 8,
    }
    return [
        mlp,
        replace(mlp, name="below", planted=_numbered({2: 8, 5: 4})),
        replace(mlp, name="above", planted=_numbered({1: 16, 4: 12, 6: 8})),
        replace(mlp, name="noise", noise=0.1),
        replace(mlp, name="more-noise", noise=0.3),
        # Branches of 1/2 would make the signal of 16 layers so large that not even the oracle learns it in these steps.
        Case("deep", partial(ResidualNet, 48, 16, 0.25), _numbered({2: 12, 7: 10, 12: 8}), inputs=(48,), per_layer=3),
        # Fewer steps here and for llama: the oracle is far below uniform long before.
        Case(
            "wide",
            partial(ResidualNet, 128, 4),
            _numbered({1: 16, 3: 12}),
            inputs=(128,),
            per_layer=8,
            steps=700,
        ),
        Case("unequal", partial(BlockNet, 48, (192, 12, 192, 12, 192, 12)), MappingProxyType(unequal), inputs=(48,)),
        Case(
            "llama",
            partial(LlamaNet, 64, 4, 4, 176),
            MappingProxyType(llama),
            inputs=(16, 64),
            per_layer=2,
            steps=600,
            batch=16,
            test_inputs=512,
        ),
        replace(mlp, name="no-structure", planted=_numbered(dict.fromkeys(range(8), 4)), structured=False),
        # With just enough ranks, errors go by luck: other first rows in uniform LoRA change them several times over.
        replace(mlp, name="scarce", planted=_numbered(dict.fromkeys(range(8), 8)), structured=False),
    ]


CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _all()})
