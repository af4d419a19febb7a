"""NaN and inf in activations, gradients, gates and adapters: no gate moves by them, and training goes on if it can."""

import pytest
import torch
from helpers import patched, same_bits, step
from torch.nn import functional as F

import l1ra
from l1ra.allocation.new_rows import leading_rows
from l1ra.layers.adapted_model import find_adapters

BAD = [torch.nan, torch.inf, -torch.inf]
RULES = {"adaptive-l1": {}, "l1": {"gate_lr": 0.5, "l1_lambda": 1.0}}


def run(steps, made, bad=torch.nan, where=(), at=()):
    """Train; at the steps ``at`` there is something ``bad`` in ``where``: "x", or the names of gradients.

    A and B are not stepped by a gradient that is not finite: that is the user's to see to, the gates the controller's.
    """
    model, controller, optimizer, x, y = made
    while controller.steps < steps:
        optimizer.zero_grad()
        poisoned = controller.steps in at
        batch = x.clone()
        if poisoned and "x" in where:
            batch[0, 0] = bad
        F.mse_loss(model(batch), y).backward()
        for name, p in model.blocks[1].named_parameters(recurse=False):
            if poisoned and name in where:
                p.grad[0] = bad
        for name, p in model.named_parameters():
            if p.requires_grad and not name.endswith("gate"):
                p.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
    return made


def live_rows(model):
    return [
        p.detach()[: layer.rank].clone()
        for _, layer in find_adapters(model)
        for p in (layer.lora_A, layer.gate, layer.lora_B)
    ]


# Probes look for new directions in the steps 16 to 18, then ranks move.
@pytest.mark.parametrize("at", [(13,), (16,), (17,), tuple(range(12, 18))])
@pytest.mark.parametrize(
    "where, bad",
    [
        (("x",), torch.nan),
        (("x",), torch.inf),
        (("gate",), torch.nan),
        (("gate",), -torch.inf),
        (("gate",), 1e25),  # whose square is infinite
        (("lora_A", "gate", "lora_B"), torch.nan),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_after_a_poisoned_step_the_training_goes_on(rule, where, bad, at):
    made = run(at[0], patched(rule=rule, **RULES[rule]))
    model, controller, *_, x, y = made
    before, loss = controller.state_dict(), F.mse_loss(model(x), y)
    run(at[0] + 1, made, bad, where, at)
    state = controller.state_dict()
    assert controller.skipped_steps == 1
    if len(state["history"]) == len(before["history"]):
        moved = {name for name, value in state["gates"].items() if not torch.equal(value, before["gates"][name])}
        assert moved <= {"skipped", "weight"}  # which ranks to press is chosen by what was known before
    run(60, made, bad, where, at)
    assert controller.skipped_steps == len(at) and sum(controller.ranks.values()) + controller.spare == 16
    assert all(value.isfinite().all() for value in controller.state_dict()["gates"].values())
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(entry["pruned"] for entry in controller.history if entry["step"] > 18) > 0
    assert F.mse_loss(model(x), y) < loss


@pytest.mark.parametrize("at", [3, 17])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "gate"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("more", [{}, {"reserve": 8}, {"principal_axes": False, "new_rows": "gradient"}], ids=str)
def test_a_model_that_is_lost_breaks_nothing_else(more, rule, part, at, tmp_path):
    """Nobody guards A and B: one NaN, and the optimizer spreads it."""
    model, controller, optimizer, x, y = run(at, patched(rule=rule, **RULES[rule], **more))
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    with torch.no_grad():
        getattr(model.blocks[1], part)[: model.blocks[1].rank] = torch.nan
    optimizer.step()
    if part == "gate":
        assert model(x).isfinite().all()  # the controller's are the ones that count
    for _ in range(30):
        step(model, optimizer, x, y)
    lost = part != "gate"
    assert controller.skipped_steps == (30 if lost else 0) and model(x).isnan().all() == lost
    assert all(0 <= gate <= 1 for row in controller.gates().values() for gate in row)
    assert sum(controller.ranks.values()) + controller.spare == 16
    assert str(l1ra.report(model))
    l1ra.export_peft(model, tmp_path / "lora")
    l1ra.unmerge(l1ra.merge(model))
    controller.save(tmp_path / "saved")
    kept = live_rows(model)
    l1ra.unpatch(model)
    assert l1ra.load(model, tmp_path / "saved").steps == controller.steps
    assert all(same_bits(p, q) for p, q in zip(live_rows(model), kept, strict=True))


@pytest.mark.parametrize("bad", BAD)
def test_gates_that_are_loaded_and_not_finite_break_nothing(bad):
    model, controller, optimizer, x, y = run(10, patched())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["blocks.0.gate"][0] = bad
    model.load_state_dict(state)
    for _ in range(20):
        step(model, optimizer, x, y)
    assert controller.steps == 30 and controller.skipped_steps >= 19
    assert sum(controller.ranks.values()) + controller.spare == 16


@pytest.mark.parametrize("bad", [*BAD, 1e38])
def test_new_rows_are_random_where_their_direction_is_unknown(bad):
    random = torch.randn(2, 12)
    sketch, present = torch.randn(4, 12), torch.randn(3, 12)
    sketch[0, 0] = bad
    (rows,) = leading_rows([sketch], [present], [random])
    assert rows.isfinite().all() and (torch.equal(rows, random) or bad == 1e38)
    present[0, 0] = torch.nan
    assert torch.equal(leading_rows([torch.randn(4, 12)], [present], [random])[0], random)
