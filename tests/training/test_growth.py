"""How an adapter grows: how far at once, and into which rows."""

import pytest
import torch
from helpers import play, step, trainable
from torch import nn

import l1ra
from l1ra import L1RALinear, RankController
from l1ra.allocation.plan import LayerPlan, Plan


def test_new_rows_are_not_the_first_ones_again():
    """Nor are they those of another layer of the same width."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    controller = l1ra.patch(model, 12, preset="reference", total_steps=100)
    first = torch.cat([layer.lora_A.detach() for layer in controller.adapters.values()])
    new = controller._interval._new_rows(Plan((LayerPlan((0, 1), 24), *[LayerPlan((0, 1))] * 5), 0))[0]
    assert not (first.unsqueeze(1) == new).all(2).any()


@pytest.mark.parametrize("rule, rank", [("adaptive-l1", 4), ("l1", 23)])
def test_an_adapter_grows_fourfold_at_most_in_one_reallocation(rule, rank):
    """The paper's rule has no such bound."""
    model = nn.Sequential(L1RALinear(40, 40, rank=1), L1RALinear(40, 40, rank=12), L1RALinear(40, 40, rank=12))
    controller = RankController(model, 25, rule=rule, interval=6, total_steps=60, warmup=0.0)
    fading = [0.0] * 11 + [1.0]
    importance = [[9.0], [0.0] * 11 + [1.0], [0.0] * 11 + [1.0]] if rule == "adaptive-l1" else None
    play(controller, {5: [[1.0], fading, fading]}, importance)
    optimizer, x = torch.optim.AdamW(trainable(model), lr=1e-2), torch.randn(8, 40)
    for _ in range(6):
        step(model, optimizer, x, x)
    assert next(iter(controller.ranks.values())) == rank and sum(controller.ranks.values()) == 25
