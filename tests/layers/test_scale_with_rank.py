"""``scale_with_rank``: an adapter's scaling follows its rank, and a changed rank changes no output."""

import math

import pytest
import torch
from helpers import OPTIMIZERS, llama, patched, shake, step
from torch import nn

import l1ra
from l1ra import L1RALinear
from l1ra.allocation.plan import LayerPlan
from l1ra.training.optimizer_state import AVERAGES, scale_states


def layer(rank=4, **settings):
    return shake(L1RALinear(6, 9, rank=rank, alpha=8, adapter_dtype=torch.float64, dtype=torch.float64, **settings))


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("reserve", [None, 6])
def test_the_scaling_follows_the_rank_and_the_output_stays(stabilized, reserve):
    adapted, x = layer(rank_stabilized=stabilized, reserve=reserve), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        adapted.gate[:4] = torch.tensor([1.0, 0.0, 0.0, 0.5])
    before = adapted(x)
    adapted.resize(LayerPlan((0, 3), 0))
    torch.testing.assert_close(adapted(x), before)
    gates = [1.0, 0.5]
    for grow, rank in ((0, 2), (3, 5), (1, 6)):
        if grow:
            adapted.resize(LayerPlan(tuple(range(adapted.rank)), grow))
            gates += [1.0] * grow
        torch.testing.assert_close(adapted(x), before)
        scaling = 8 / (2 if stabilized else 4) * math.sqrt(4 / rank)
        assert (adapted.gate[:rank] * adapted.scaling).tolist() == pytest.approx([scaling * g for g in gates])
        assert f"scaling={scaling:g}" in repr(adapted)


def test_without_it_rows_and_scaling_stay():
    adapted = layer(scale_with_rank=False)
    gate, b = adapted.gate.detach().clone(), adapted.lora_B.detach().clone()
    adapted.resize(LayerPlan((0, 1, 2, 3), 1))
    assert adapted.rank_scaling == 1 and torch.equal(adapted.gate[:4], gate) and torch.equal(adapted.lora_B[:4], b)


def test_gradients_that_are_held_are_those_of_the_scaled_parameters():
    adapted, x = layer(), torch.randn(5, 6, dtype=torch.float64)
    adapted(x).square().sum().backward()
    adapted.resize(LayerPlan((0, 1, 2, 3), 2))
    held = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    adapted(x).square().sum().backward()
    for name in ("lora_A", "gate", "lora_B"):
        torch.testing.assert_close(held[name][:4], adapted.get_parameter(name).grad[:4])


# Adagrad's starting value is in its sum, which no gradient has made.
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"Adagrad"}))
def test_what_an_optimizer_remembers_is_what_scaled_gradients_would_have_left(name):
    grads = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))

    def remembered(factor):
        param = nn.Parameter(torch.zeros(3, 5))
        optimizer = OPTIMIZERS[name]([param])
        for grad in grads:
            param.grad = factor * grad
            optimizer.step()
        return optimizer, param

    (optimizer, param), (other, twin) = remembered(1.0), remembered(0.25)
    scale_states([optimizer], {param: 0.25})
    for key, value in other.state[twin].items():
        if isinstance(value, torch.Tensor) and key not in AVERAGES:
            torch.testing.assert_close(optimizer.state[param][key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_an_average_of_the_parameter_is_divided_as_it_is():
    param = nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.ASGD([param], lr=0.1, t0=0)
    param.grad = torch.ones(3, 5)
    optimizer.step()
    before = optimizer.state[param]["ax"].clone()
    scale_states([optimizer], {param: 0.5})
    assert torch.equal(optimizer.state[param]["ax"], 2 * before)


def moved(**settings):
    """A model whose ranks have moved, its controller, optimizer and data."""
    model, controller, optimizer, x, y = patched(min_interval=1, interval=4, total_steps=100, **settings)
    while not controller.moved:
        step(model, optimizer, x, y)
    return model, controller, optimizer, x, y


@pytest.mark.parametrize("reserve", [None, 12])
def test_the_controllers_gates_are_the_masters(reserve):
    model, controller, *_ = moved(reserve=reserve)
    assert any(layer.rank_scaling != 1 for layer in controller.adapters.values())
    for name, adapted in controller.adapters.items():
        gates = controller.gates()[name]
        assert all(0 <= gate <= 1 for gate in gates)
        raw = adapted.gate[: adapted.rank].tolist()
        share = math.sqrt(controller.initial_ranks[name] / adapted.rank)
        assert raw == pytest.approx([gate * share for gate in gates])
    assert all(row.smallest_gate <= 1 for row in l1ra.report(model).rows)


def test_a_reallocation_keeps_a_float64_model_to_float64():
    """The masters are float32: what they are multiplied by must not be rounded to it."""
    model, controller, optimizer, x, y = patched(
        rule="l1", gate_lr=0.5, l1_lambda=1.0, min_interval=1, interval=4, total_steps=100, adapter_dtype="float64"
    )
    model.double()
    x, y, inner, outputs = x.double(), y.double(), controller._reallocate, []

    def reallocate():
        outputs.append(model(x).detach())
        inner()
        outputs.append(model(x).detach())

    controller._reallocate = reallocate
    while not controller.moved:
        step(model, optimizer, x, y)
    assert any(0 < g != 1 for gates in controller.gates().values() for g in gates)
    torch.testing.assert_close(outputs[-1], outputs[-2], rtol=1e-13, atol=1e-14)


def test_importance_does_not_see_the_scale():
    """The first-order change of the loss if a rank were removed is the same, however its scale is split."""
    _, controller, *_ = moved()
    bank = controller._bank
    for adapted in controller.adapters.values():
        adapted.gate.grad = torch.ones_like(adapted.gate)
    grad, *_ = bank.flatten(bank.take_gradients(range(len(bank.ranks))))
    shares = [1.0 * a.rank_scaling for a in controller.adapters.values() for _ in range(a.rank)]
    assert grad.tolist() == pytest.approx(shares)


def test_loaded_gates_are_read_without_their_share():
    model, controller, *_ = moved()
    before = controller.gates()
    model.load_state_dict({n: 0.5 * v if n.endswith("gate") else v for n, v in model.state_dict().items()})
    for name, gates in controller.gates().items():
        assert gates == pytest.approx([0.5 * gate for gate in before[name]])


@pytest.mark.parametrize("scale_with_rank", [False, True])
def test_only_what_is_rescaled_is_read_and_written_again(monkeypatch, scale_with_rank):
    """Quantised state is rounded each time."""
    factors = []
    monkeypatch.setattr(
        "l1ra.training.reallocation.scale_states", lambda optimizers, found: factors.extend(found.values())
    )
    moved(scale_with_rank=scale_with_rank)
    assert 1.0 not in factors and bool(factors) == scale_with_rank


def test_the_paper_keeps_the_scaling_of_the_start():
    model = llama()
    controller = l1ra.patch(model, 28, preset="reference")
    assert all(not adapted.scale_with_rank for adapted in controller.adapters.values())
