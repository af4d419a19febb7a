"""RankController: what it never does, what moves nothing, and what it says."""

import warnings

import pytest
import torch
from helpers import BRISK, MLP, Adapted, Residual, bert, llama, patched, play, same_bits, step, task, tokens, trainable
from torch import nn

import l1ra
from l1ra import RankController
from l1ra.layers.adapted_model import find_adapters
from l1ra.model.targets import saved_modules, select_targets


def around_reallocation(controller, note):
    notes, inner = [], controller._reallocate

    def wrapped():
        before = note()
        inner()
        notes.append((before, note()))

    controller._reallocate = wrapped
    return notes


def language(model):
    return lambda: model(tokens()).logits, lambda: model(tokens(), labels=tokens()).loss


def classes(model):
    return lambda: model(tokens()).logits, lambda: model(tokens(), labels=torch.tensor([0, 2])).loss


def numbers(model):
    x, y = (part.double() for part in task(model))
    return lambda: model(x), lambda: (model(x) - y).square().mean()


@pytest.mark.parametrize("rule", ["adaptive-l1", "l1"])
@pytest.mark.parametrize("make, use", [(Residual, numbers), (MLP, numbers), (llama, language), (bert, classes)])
def test_no_reallocation_of_a_real_run_changes_the_output(make, use, rule):
    model = make()
    output, loss = use(model)
    model.double()  # in float32 rounding would hide small changes
    settings = {"gate_lr": 0.5, "l1_lambda": 1.0} if rule == "l1" else {}  # so that the paper's rule prunes at all
    budget = 4 * len(select_targets(model, "all-linear", saved_modules(model, None)))
    terms = {**BRISK, "total_steps": 120, "adapter_dtype": "float64", **settings}
    controller = l1ra.patch(model, budget, rule=rule, **terms)
    model.eval()  # no dropout

    @torch.no_grad()
    def note():
        return output().clone()

    notes = around_reallocation(controller, note)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert len(notes) == 16 and sum(entry["pruned"] for entry in controller.history) > 5
    for before, after in notes:
        assert (after - before).abs().max() <= 1e-13 * before.abs().max()


@pytest.mark.parametrize("unit, budget", [("ranks", 10), ("params", 160)])
def test_the_budget_is_never_exceeded_and_never_lost(unit, budget):
    model = MLP()
    x, y = task(model)
    controller = l1ra.patch(model, budget, budget_unit=unit, max_rank=7, **BRISK)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(60):
        step(model, optimizer, x, y)
        cost = sum(
            layer.rank * (1 if unit == "ranks" else layer.in_features + layer.out_features)
            for layer in controller.adapters.values()
        )
        assert cost + controller.spare == budget and controller.spare >= 0
        assert all(1 <= rank <= min(7, *sizes) for rank, sizes in zip(controller.ranks.values(), SIZES, strict=True))
    assert controller.history[-1]["moved"] >= 0 and sum(entry["pruned"] for entry in controller.history) > 0


SIZES = [(6, 10), (10, 8), (8, 4)]


def test_history_ranks_and_statistics_agree():
    model, controller, optimizer, x, y = patched()
    for _ in range(60):
        step(model, optimizer, x, y)
    assert [entry["step"] for entry in controller.history] == [0, 6, 12, 18, 24, 30, 36, 42, 48]
    assert controller.history[0]["ranks"] == controller.initial_ranks == dict.fromkeys(controller.adapters, 4)
    assert controller.history[-1]["ranks"] == controller.ranks == {n: a.rank for n, a in find_adapters(model)}
    assert controller.moved == sum(entry["moved"] for entry in controller.history) > 0
    assert controller.history[0]["coherence"] == {} and list(controller.history[-1]["coherence"]) == list(
        controller.ranks
    )
    assert controller.steps == 60
    statistics = controller.statistics()
    assert statistics["l1ra/ranks"] + statistics["l1ra/spare"] == 16
    assert statistics["l1ra/rank_max"] == max(controller.ranks.values())
    assert statistics["l1ra/moved"] == controller.moved
    assert controller.gates() == {n: pytest.approx((a.gate / a.rank_scaling).tolist()) for n, a in find_adapters(model)}


def test_the_same_run_twice_gives_the_same_ranks():
    def run():
        torch.manual_seed(0)
        model, controller, optimizer, x, y = patched()
        for _ in range(60):
            step(model, optimizer, x, y)
        return controller.history, model(x)

    (first, a), (second, b) = run(), run()
    assert first == second and same_bits(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_moves_no_gate_and_prunes_nothing(bad):
    model, controller, optimizer, x, y = patched(interval=3)
    for _ in range(5):
        step(model, optimizer, x, y)
    gates = controller.gates()
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    model.blocks[0].gate.grad[0] = bad
    optimizer.step()  # a reallocation is due
    alive = {name: [g for g in row if g > 0] for name, row in gates.items()}
    assert controller.steps == 6
    for name, row in controller.gates().items():  # none moved; those that were zero before are cut as they would be
        assert row[: len(alive[name])] == alive[name] and set(row[len(alive[name]) :]) <= {1.0}
    assert controller.skipped_steps == 1 and controller.history[-1]["gates"]["skipped"] == 1
    step(model, optimizer, x, y)
    assert controller.skipped_steps == 1 and controller._bank.age.max() == 6


class ReadsAWeight(Residual):
    """As Mamba with its ``dt_proj``: the weight of one of its layers is used, and the layer is never called."""

    def forward(self, x):
        return self.blocks[0](x) + torch.tanh(x @ self.blocks[1].weight.T) + self.blocks[2](x)


def test_adapters_that_no_gradient_has_reached_are_named_once():
    model = ReadsAWeight()
    controller = l1ra.patch(model, 16, **BRISK)
    optimizer, (x, y) = torch.optim.AdamW(trainable(model), lr=1e-2), task(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            step(model, optimizer, x, y)
        assert not caught
        for _ in range(20):
            step(model, optimizer, x, y)
    (warning,) = caught
    assert "in 6 steps" in str(warning.message) and "learn nothing: blocks.1, blocks.3. " in str(warning.message)
    assert "leave them out of target_modules" in str(warning.message) and len(controller.history) == 5


@pytest.mark.parametrize("bad_steps, warns", [(6, False), (5, True)])
def test_steps_that_were_skipped_are_no_sign_of_an_adapter_without_gradients(bad_steps, warns):
    model = ReadsAWeight() if warns else Residual()
    controller = l1ra.patch(model, 16, **BRISK)
    x, y = task(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(6):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if n < bad_steps:
                model.blocks[0].gate.grad.fill_(torch.nan)
            optimizer.step()
    assert controller.skipped_steps == bad_steps and len(controller.history) == 2
    assert len(caught) == warns


def test_without_total_steps_it_warns_and_moves_ranks_every_hundred_steps():
    model, controller, optimizer, x, y = patched(total_steps=None, interval=0.05)
    play(controller, {})
    with pytest.warns(UserWarning, match="every 100 steps .* Pass total_steps="):
        step(model, optimizer, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(204):
            step(model, optimizer, x, y)
    assert [entry["step"] for entry in controller.history] == [0, 100, 200]


@pytest.mark.parametrize("interval, head", [(100, False), (40, True)])  # none, and one before a rank can be judged
def test_a_schedule_without_any_reallocation_is_said(interval, head):
    model, _, optimizer, x, y = patched(total_steps=50, interval=interval)
    model.head = nn.Parameter(torch.zeros(()), requires_grad=head)
    with pytest.warns(UserWarning, match=f"no rank will move: .* intervals of {interval}"):
        step(model, optimizer, x, y)


def test_training_beyond_total_steps_is_said_once():
    model, _, optimizer, x, y = patched(total_steps=4, interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            step(model, optimizer, x, y)
        assert not caught
        for _ in range(4):
            step(model, optimizer, x, y)
    assert len(caught) == 1 and "beyond its 4 total_steps" in str(caught[0].message)


def test_ranks_wait_while_an_adapter_is_merged():
    """A head that goes on learning keeps the optimizer stepping; a merged layer can't be resized."""
    model, controller, optimizer, x, y = patched(total_steps=60, interval=6)
    play(controller, {5: [[0.0, 1.0, 1.0, 1.0]] + [[1.0] * 4] * 3})
    receiver = list(find_adapters(model))[1][1]
    for n in range(6):
        if n == 5:
            receiver.merge()
            with pytest.warns(UserWarning, match="unmerge"):
                step(model, optimizer, x, y)
        else:
            step(model, optimizer, x, y)
    assert list(controller.ranks.values()) == [4, 4, 4, 4] and controller._bank.ranks == [4, 4, 4, 4]
    receiver.unmerge()
    for _ in range(6):
        step(model, optimizer, x, y)
    assert list(controller.ranks.values()) == [3, 5, 4, 4]


@pytest.mark.parametrize("settings", [{"reserve": 8}, {"strict": True, "alpha": 4.0}, {"scale_with_rank": False}])
def test_settings_of_the_layers_are_refused_where_the_layers_are_made_already(settings):
    names = ", ".join(sorted(settings))
    with pytest.raises(TypeError, match=f"{names}: the layers have that already. Pass it to L1RALinear"):
        RankController(Adapted(), 8, **settings)
