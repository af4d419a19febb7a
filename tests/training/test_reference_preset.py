"""The preset "reference" through the controller: a script of gates gives the plan of the paper's authors."""

import math

import pytest
import torch
from helpers import Residual, play, step, task, trainable
from torch import nn

import l1ra
from l1ra.layers.adapted_model import find_adapters


def scripted(script, ranks=4, width=12, total_steps=50, **overrides):
    """Four adapters of ``ranks`` each, reallocated every five steps."""
    model = Residual(width, depth=4)
    controller = l1ra.patch(model, 4 * ranks, preset="reference", total_steps=total_steps, **overrides)
    play(controller, script)
    return model, controller


def run(model, steps):
    x, y = task(model)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for _ in range(steps):
        step(model, optimizer, x, y)


def ranks(controller):
    return list(controller.ranks.values())


def test_a_starts_normal_with_one_over_the_rank_b_at_zero_and_gates_at_one():
    model = Residual(width=128, depth=2)
    l1ra.patch(model, 16, preset="reference", alpha=32)
    for _, layer in find_adapters(model):
        assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.08)
        assert not layer.lora_B.any() and (layer.gate == 1).all() and layer.scaling == 4.0
        assert layer.lora_A.dtype == layer.lora_B.dtype == layer.gate.dtype == torch.float32


def test_the_scripted_plan():
    below, at = 9.9e-11, 1e-10
    gates = [
        [at, 1.0, 0.9, 0.8],  # strictly below: nothing falls. Smallest gate: last in the order
        [0.0, below, 0.0, below],  # all fall: the last one stays. Gets none
        [1.0, below, 1.0, 1.0],  # one falls. Gets none
        [0.7, 0.7, 0.7, 0.8],  # first in the order
    ]
    model, controller = scripted({5: gates})
    x, y = task(model)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for _ in range(4):
        step(model, optimizer, x, y)
    # Gradients cleared and a learning rate of zero: so that only the reallocation changes rows from here on.
    optimizer.param_groups[0]["lr"] = 0.0
    a = [layer.lora_A.detach().clone() for _, layer in find_adapters(model)]
    b = [layer.lora_B.detach().clone() for _, layer in find_adapters(model)]
    assert ranks(controller) == [4, 4, 4, 4]
    step(model, optimizer, x, y)
    assert ranks(controller) == [6, 1, 3, 6] and controller.spare == 0
    keep = [[0, 1, 2, 3], [3], [0, 2, 3], [0, 1, 2, 3]]
    for i, (_, layer) in enumerate(find_adapters(model)):
        old = len(keep[i])
        assert torch.equal(layer.lora_A[:old], a[i][keep[i]]) and torch.equal(layer.lora_B[:old], b[i][keep[i]])
        kept = torch.tensor(gates[i])[keep[i]]
        assert torch.equal(layer.gate[:old], kept)
        assert (layer.gate[old:] == 1).all() and not layer.lora_B[old:].any()
        assert layer.scaling == 1.0  # alpha over the first rank, not the present one
    assert controller.history[-1]["pruned"] == 4 and controller.history[-1]["moved"] == 4


def test_an_odd_rank_goes_to_the_first_in_the_order():
    _, controller = model_and_run(
        {5: [[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.9, 0.8], [0.0, 0.0, 0.0, 1.0], [0.5, 1.0, 1.0, 1.0]]}
    )
    assert ranks(controller) == [5, 5, 1, 5]  # 1 before 0 before 3: ties by position
    _, controller = model_and_run({5: [[0.5] * 4, [0.9] * 4, [0.0, 0.0, 1.0, 1.0], [0.5] * 4]})
    assert ranks(controller) == [5, 5, 2, 4]


def model_and_run(script, steps=5, **overrides):
    model, controller = scripted(script, **overrides)
    run(model, steps)
    return model, controller


def test_the_order_is_that_before_pruning():
    """Without the exclusion, an adapter that has lost a rank is dealt to last, whatever its other gates."""
    script = {5: [[0.0, 1.0, 1.0, 1.0], [0.2] * 4, [0.3] * 4, [0.1] * 4]}
    assert ranks(model_and_run(script, exclude_pruned=False)[1]) == [3, 4, 5, 4]


def test_ranks_that_nobody_can_take_are_spare_and_offered_again():
    script = {5: [[0.0, 1.0, 1.0, 1.0]] * 4, 6: [[1.0] * 3] * 2 + [[0.5] * 3] * 2}
    model, controller = model_and_run(script, steps=5)
    assert ranks(controller) == [3, 3, 3, 3] and controller.spare == 4
    assert controller.moved == 0 and controller.history[-1]["pruned"] == 4
    run(model, 5)
    assert ranks(controller) == [4, 4, 4, 4] and controller.spare == 0 and controller.moved == 4


def test_a_new_row_of_a_is_drawn_with_the_first_rank_as_its_scale():
    model, controller = model_and_run({5: [[0.0] * 5 + [1.0], [1.0] * 6, [1.0] * 6, [1.0] * 6]}, ranks=6, width=256)
    assert ranks(controller) == [1, 8, 8, 7]
    rows = torch.cat([layer.lora_A[6:] for _, layer in find_adapters(model)])
    assert rows.shape == (5, 256)
    assert rows.std().item() == pytest.approx(1 / 6, rel=0.08) and abs(rows.mean().item()) < 0.02


def test_reallocations_come_every_tenth_of_the_training_but_not_at_its_start_or_end():
    model, controller = scripted({})
    run(model, 50)
    assert [entry["step"] for entry in controller.history] == [0, *range(5, 50, 5)]


@pytest.mark.parametrize("settings", [{}, {"l1_lambda": 5e-3, "gate_lr": 2e-2}, {"l1_lambda": 0.5, "l2_lambda": 0.3}])
def test_gates_move_by_the_authors_arithmetic_in_a_real_training(settings):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
    controller = l1ra.patch(model, 4, preset="reference", total_steps=1000, **settings)
    lr, l1, l2 = (settings.get(k, d) for k, d in (("gate_lr", 2e-2), ("l1_lambda", 1e-3), ("l2_lambda", 0.0)))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05, weight_decay=0.1)
    x, y = task(model)
    expected = [{"g": 1.0, "m": 0.0, "v": 0.0} for _ in range(4)]
    for n in range(1, 41):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        grads = [d for _, layer in find_adapters(model) for d in layer.gate.grad.tolist()]
        optimizer.step()
        for state, d in zip(expected, grads, strict=True):
            state["m"] = 0.9 * state["m"] + 0.1 * d
            state["v"] = 0.999 * state["v"] + 0.001 * d * d
            move = (state["m"] / (1 - 0.9**n)) / (math.sqrt(state["v"] / (1 - 0.999**n)) + 1e-8)
            g = state["g"] - lr * move
            g -= lr * l2 * g
            g -= lr * l1
            state["g"] = min(max(g, 0.0), 1.0)
        gates = [g for row in controller.gates().values() for g in row]
        assert gates == pytest.approx([state["g"] for state in expected], abs=2e-5)
    assert min(gates) < 0.99
