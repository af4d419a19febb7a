"""How gates move: the paper's rule and the adaptive one. What holds whatever their constants."""

import pytest
import torch
from helpers import Adapted, Residual, patched, play, step, trainable
from torch import nn

import l1ra
from l1ra import L1RAConfig, L1RALinear, RankController
from l1ra.layers.gradient_probe import coherence
from l1ra.training.gate_bank import GateBank
from l1ra.training.gate_rules import AdaptiveL1, PaperL1, make_rule
from l1ra.training.probes import ProbeSet
from l1ra.training.schedule import Stage
from l1ra_kernels.reference import adam_elastic_net_step

INTERVAL = 20


def bank(ranks=(4, 4), gates=None):
    made = GateBank([L1RALinear(8, 8, rank=r) for r in ranks])
    if gates is not None:
        made.value = torch.tensor(gates)
    return made


def run(rule, made, grads, progress=0.0, over=False):
    for grad in grads:
        grad = torch.as_tensor(grad)
        made.update(rule.step(made, grad, Stage(INTERVAL, progress, over, INTERVAL)), grad, None)
    return made


def weak_and_strong(steps, scale=1.0):
    """Gradients of eight gates, the first three far less important than the others."""
    size = torch.tensor([1e-3, 1e-3, 1e-3, 1.0, 1.2, 0.9, 1.1, 1.0]) * scale
    return torch.randn(steps, 8).sign() * size


def test_the_config_names_the_rule():
    assert isinstance(make_rule(L1RAConfig(rule="l1")), PaperL1)
    assert isinstance(make_rule(L1RAConfig(rule="adaptive-l1")), AdaptiveL1)


@pytest.mark.parametrize("settings", [{}, {"gate_lr": 0.1, "l1_lambda": 0.5, "l2_lambda": 0.2}])
def test_the_papers_rule_is_adam_e(settings):
    made = run(PaperL1(L1RAConfig(rule="l1", **settings)), bank(), grads := torch.randn(15, 8))
    lr, l1, l2 = (settings.get(n, d) for n, d in (("gate_lr", 2e-2), ("l1_lambda", 1e-3), ("l2_lambda", 0.0)))
    gate, m, v = torch.ones(8), torch.zeros(8), torch.zeros(8)
    for age, grad in enumerate(grads):
        gate, m, v = adam_elastic_net_step(gate, grad, m, v, torch.full((8,), float(age)), lr=lr, l1=l1, l2=l2)
    torch.testing.assert_close(made.value, gate, rtol=0, atol=0)
    assert PaperL1(L1RAConfig(rule="l1")).importance(made, Stage(INTERVAL, 0.0, False, INTERVAL)) is None


@pytest.mark.parametrize("interval", [1, 2, 3, 20, 75])
def test_gates_that_are_pressed_fade_to_exactly_zero_within_half_an_interval(interval):
    made = bank()
    made.penalise([(0, 2), (3,)], [1, 1])
    rule, at = AdaptiveL1(L1RAConfig()), Stage(interval, 0.3, False, interval)
    for steps in range(max(1, interval // 2)):
        assert steps == 0 or (made.value[[0, 2, 7]] > 0).all()
        made.update(rule.step(made, grad := torch.randn(8), at), grad, None)
    assert made.value.tolist() == [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("trial", [INTERVAL, INTERVAL // 4])
def test_ranks_are_not_judged_before_their_trial_is_over(trial):
    rule, at = AdaptiveL1(L1RAConfig()), Stage(INTERVAL, 0.0, False, trial)
    made = run(rule, bank(), weak_and_strong(trial - 1))
    assert rule.importance(made, at) == [[None] * 4, [None] * 4]
    weak, strong = rule.importance(run(rule, made, weak_and_strong(1)), at)
    assert weak[:3] == pytest.approx([1e-3] * 3) and strong == pytest.approx([1.2, 0.9, 1.1, 1.0])


def test_adaptive_gates_that_are_zero_stay_so_until_they_are_cut():
    made = bank(gates=[0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    run(AdaptiveL1(L1RAConfig()), made, torch.ones(5, 8))
    assert made.value[0] == 0 and made.value[1] > 0.5


def test_adaptive_gates_recover_once_no_reallocation_will_come():
    made = bank(gates=[0.4, 0.6, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    made.penalise([(0, 1, 2), ()], [1, 1])
    run(AdaptiveL1(L1RAConfig()), made, weak_and_strong(INTERVAL), progress=1.0, over=True)
    assert (made.value == 1).all()


@pytest.mark.parametrize("rule", ["l1", "adaptive-l1"])
def test_gates_stay_between_zero_and_one_whatever_the_gradients(rule):
    made = bank(ranks=(1, 5, 2))
    for scale in (1e-30, 1.0, 1e18):
        run(make_rule(L1RAConfig(rule=rule)), made, torch.randn(30, 8) * scale)
        assert torch.isfinite(made.value).all() and made.value.min() >= 0 and made.value.max() <= 1


@pytest.mark.parametrize("rule", ["l1", "adaptive-l1"])
def test_a_gradient_of_zero_everywhere_does_no_harm(rule):
    made = run(make_rule(L1RAConfig(rule=rule)), bank(), torch.zeros(3 * INTERVAL, 8))
    assert torch.isfinite(made.value).all() and made.value.max() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["l1", "adaptive-l1"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(rule, bad):
    steady, disturbed = bank(), bank()
    grads = weak_and_strong(INTERVAL)
    run(make_rule(L1RAConfig(rule=rule)), steady, grads)
    spoilt = grads[7].clone()
    spoilt[2] = bad
    run(make_rule(L1RAConfig(rule=rule)), disturbed, [*grads[:7], spoilt, *grads[7:]])
    assert disturbed.skipped == 1 and steady.skipped == 0
    for name in ("value", "age", "exp_avg", "exp_avg_sq", "importance_sq"):
        assert torch.equal(getattr(steady, name), getattr(disturbed, name)), name


def test_gates_without_a_gradient_stand_still():
    model = Adapted()
    controller = RankController(model, 8, total_steps=100, rule="l1", gate_lr=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.up.gate.grad = torch.ones(4)
    optimizer.step()
    gates = controller.gates()
    assert gates["up"] == pytest.approx([0.95 - 5e-5] * 4) and gates["down"] == [1.0] * 4


def test_importance_of_a_rank_does_not_depend_on_how_its_scale_is_split():
    """Half the gate and twice the B is the same function: the same importance."""
    found = []
    for gate in (1.0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(L1RALinear(6, 6, rank=3))
        with torch.no_grad():
            model[0].lora_B.normal_().div_(gate)
            model[0].gate.fill_(gate)
        controller = RankController(model, 3, total_steps=1000)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(torch.randn(9, 6)).square().mean().backward()
        optimizer.step()
        found.append(controller._bank.importance_sq)
    torch.testing.assert_close(found[0], found[1])


def test_new_ranks_start_with_a_clean_record():
    model = Residual()
    controller = l1ra.patch(model, 16, total_steps=1000, interval=10, warmup=0.0)
    bank = controller._bank
    for name in ("exp_avg", "exp_avg_sq", "importance_sq", "age"):
        setattr(bank, name, torch.arange(1.0, 17.0))
    play(controller, {})
    bank.value[1] = 0.0
    bank.write_to_layers()
    controller._make_schedule()
    controller._reallocate()
    assert list(controller.ranks.values()) == [3, 5, 4, 4]
    kept = [1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, *map(float, range(9, 17))]
    for name in ("exp_avg", "exp_avg_sq", "importance_sq", "age"):
        assert getattr(bank, name).tolist() == kept, name
    assert bank.value.tolist() == [1.0] * 16


@pytest.mark.parametrize("came_back, pressed, ranks", [(0, [0, 1, 2], [2, 4, 6, 4]), (8, [0], [2, 5, 5, 4])])
def test_what_an_adapter_gave_back_counts_where_ranks_are_given_up_and_dealt(came_back, pressed, ranks):
    _, controller, *_ = patched(margin=1.0, turnover=0.2)
    names, start = list(controller.ranks), controller.ranks
    controller.history += [{"ranks": {**start, names[2]: 4 + came_back}}, {"ranks": start}]
    play(controller, {}, [[1.0] * 4, [1.0] * 4, [4.0] * 4, [1.0] * 4])  # a need of 4, or of 4 / 3 after eight that left
    controller._make_schedule()
    controller._interval.choose_ranks(
        controller._importance(), controller._stage().progress, controller._given_back(), [1] * len(controller.adapters)
    )
    assert controller._bank.weight.nonzero().flatten().tolist() == pressed
    controller._bank.value[:2] = 0.0
    controller._bank.write_to_layers()
    controller._reallocate()
    assert list(controller.ranks.values()) == ranks


def test_the_middle_of_an_interval_presses_what_is_worth_more_elsewhere():
    model, controller, optimizer, x, y = patched(interval=10, margin=0.5, turnover=0.2)
    importance = [[1.0] * 4, [0.1, 9.0, 0.2, 9.0], [0.3] * 4, [0.7] * 4]
    play(controller, {}, importance)
    for step_number in range(1, 11):
        assert controller._bank.weight.any() == (step_number > 5), step_number
        step(model, optimizer, x, y)
        if step_number == 5:  # more would be worth it, but a fifth of 16 ranks is three
            assert controller._bank.weight.nonzero().flatten().tolist() == [4, 6, 8]
    assert not controller._bank.weight.any() and controller.moved == 0  # the script has let no gate fall


@pytest.mark.parametrize("coherence, pressed", [(0.09, []), (0.1, [4, 6, 8]), (torch.nan, [4, 6, 8])])
def test_no_rank_is_given_up_for_an_adapter_whose_gradients_are_noise(coherence, pressed, monkeypatch):
    monkeypatch.setattr("l1ra.training.probes.coherence", lambda probes: torch.full((len(probes),), coherence).double())
    model, controller, optimizer, x, y = patched(interval=10, turnover=0.2)
    play(controller, {}, [[1.0] * 4, [0.1, 9.0, 0.2, 9.0], [0.3] * 4, [0.7] * 4])
    for _ in range(5):
        step(model, optimizer, x, y)
    assert controller._bank.weight.nonzero().flatten().tolist() == pressed


@pytest.mark.parametrize(
    "coherence, floor, pressed",
    [
        ([0.29, 0.6, 0.29, 0.29], 0.1, []),  # the second alone stands out, and its weakest rank is the least of all
        ([0.3, 0.6, 0.3, 0.3], 0.1, [4, 6, 8]),
        ([0.29, 0.6, 0.29, 0.29], -1.0, [4, 6, 8]),
        ([0.3, 0.6, 0.3, 0.3], 0.31, []),
    ],
)
def test_no_rank_is_given_up_for_an_adapter_that_does_not_stand_out(coherence, floor, pressed, monkeypatch):
    model, controller, optimizer, x, y = patched(interval=10, turnover=0.2, min_coherence=floor)
    monkeypatch.setattr(ProbeSet, "coherence", lambda probes: dict(zip(controller.adapters, coherence, strict=True)))
    play(controller, {}, [[1.0] * 4, [0.1, 9.0, 0.2, 9.0], [0.3] * 4, [0.7] * 4])
    for _ in range(5):
        step(model, optimizer, x, y)
    assert controller._bank.weight.nonzero().flatten().tolist() == pressed


def test_probes_ride_along_in_the_first_half_of_an_interval():
    model, controller, optimizer, x, y = patched()
    riding = []
    for number in range(1, 60):
        step(model, optimizer, x, y)
        probes = [layer.probe for layer in controller.adapters.values()]
        riding += [number] if all(probes) else []
        assert any(probes) == all(probes)
        seen = {probe.seen.item() for probe in controller._interval.probes._probes.values()}
        if number < 48:  # the step at which they stop is the last that they have seen
            assert seen == {number - 1 if number < 3 else 2 if number < 6 else min(number % 6, 3)}
    # The first interval begins with the first step: the controller does not know before how long the training is.
    assert riding == [n for n in range(1, 48) if n % 6 in (0, 1, 2)]


def test_no_rank_moves_where_all_matter_alike():
    model, controller, optimizer, x, y = patched(interval=6)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    controller._rule.importance = lambda bank, at: [[1.0] * rank for rank in bank.ranks]
    for _ in range(60):
        step(model, optimizer, x, y)
    assert len(controller.history) > 5 and controller.moved == 0 and set(controller._bank.value.tolist()) == {1.0}


@pytest.mark.parametrize("head, moves", [(False, [False, True, True]), (True, [False, False, True])])
def test_the_first_ranks_move_at_once_but_beside_a_head_at_the_second_reallocation(head, moves):
    model, controller, optimizer, x, y = patched(interval=6)
    model.head = nn.Parameter(torch.zeros(()), requires_grad=head)
    for _ in range(12):
        step(model, optimizer, x, y)
    assert [entry["pruned"] > 0 for entry in controller.history] == moves


def test_no_rank_goes_to_an_adapter_that_the_model_never_calls():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: L1RALinear(12, 12, rank=2) for name in ("a", "b", "never called")})
    controller = RankController(model, budget=10, interval=6, total_steps=60, warmup=0.0)  # 4 ranks to deal
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    with pytest.warns(UserWarning, match="no gradient has reached these adapters in 6 steps.*never called"):
        for _ in range(12):
            (model["b"](model["a"](torch.randn(4, 12))) * torch.randn(4, 12)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.ranks["never called"] <= 2 and sum(controller.ranks.values()) == 10


def test_an_overflow_does_not_hide_that_gradients_are_noise():
    torch.manual_seed(0)
    model, controller, optimizer, x, y = patched(interval=40, total_steps=400)
    for number in range(60):
        (model(torch.randn_like(x)) * torch.randn_like(y)).sum().backward()
        if number == 45:  # as GradScaler: the step is left out, and no hook of the optimizer runs
            for probe in controller._interval.probes._probes.values():
                probe.gradient.fill_(torch.inf)
        else:
            optimizer.step()
        optimizer.zero_grad()
    found = coherence(list(controller._interval.probes._probes.values()))
    assert len(found) == 4 and all(abs(c) < 0.9 for c in found)
