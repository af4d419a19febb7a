"""Optimizer state that is loaded: of other ranks than the model has, it starts anew with a warning."""

import copy
import warnings

import pytest
import torch
from helpers import BRISK, Residual, same_bits, task, trainable
from torch.nn import functional as F

import l1ra


def training(steps, optimizer=None, **kwargs):
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **{**BRISK, "min_coherence": 0.0})
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2, **kwargs)

    def train(count):
        for _ in range(count):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(steps)
    return model, controller, optimizer, train


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_state_of_other_ranks_starts_anew_with_a_warning(kind):
    model, controller, optimizer, train = training(8, **kind)
    older, moved = copy.deepcopy(optimizer.state_dict()), controller.moved
    train(8)
    assert controller.moved > moved
    optimizer.load_state_dict(older)
    wrong = [p for p, state in optimizer.state.items() if state and state["exp_avg"].shape != p.shape]
    assert wrong
    with pytest.warns(
        UserWarning, match=f"is of other ranks .* for {len(wrong)} parameters of adapters: it starts anew"
    ):
        train(1)
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items() if state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(20)
    assert all(p.isfinite().all() for p in model.parameters())


def test_state_that_fits_is_taken_as_it_is():
    model, controller, optimizer, train = training(10)
    state, weights, mine = (copy.deepcopy(each.state_dict()) for each in (optimizer, model, controller))
    train(8)
    other, its, fresh, go_on = training(0)
    other.load_state_dict(weights)
    its.load_state_dict(mine)
    fresh.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(8)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_gates_of_an_average_that_was_copied_in_are_saved(tmp_path):
    model, controller, _, train = training(6)
    average = [p.detach().clone() for p in trainable(model)]
    train(3)
    gates = [p for name, p in model.named_parameters() if name.endswith("gate")]
    with torch.no_grad():
        for param, mean in zip(trainable(model), average, strict=True):
            if param.shape == mean.shape:
                param.copy_(mean)
        gates[0].mul_(0.75)
    x, _ = task(model)
    want = model(x)
    controller.save(tmp_path)
    torch.manual_seed(0)
    other = Residual()
    task(other)
    l1ra.load(other, tmp_path)
    torch.testing.assert_close(other(x), want)
