"""Averages of the weights (EMA, SWA) while ranks move."""

import copy
import gc
import itertools
import warnings

import pytest
import torch
from helpers import BRISK, Residual, same_bits, task, trainable
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l1ra

diffusers = pytest.importorskip("diffusers.training_utils")
MOVING = {**BRISK, "min_coherence": 0.0}
DECAY = 0.9


def training(steps=40, decay=DECAY, kind="AveragedModel", **settings):
    """The controller, the model, the average as a model, and the average itself."""
    gc.collect()  # averages of other tests look like this model's
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **{**MOVING, **settings})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    average, update = make(kind, model, controller, decay)
    for _ in range(steps):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
    return controller, model, as_model(average, model), average


@torch.no_grad()
def lerp(averages, params, decay):
    for mean, param in zip(averages, params, strict=True):
        mean.lerp_(param, 1 - decay)


def make(kind, model, controller, decay):
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    clones = [p.detach().clone() for p in params]
    if kind == "AveragedModel":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        return average, lambda: average.update_parameters(model)
    if kind == "SWA":
        average = AveragedModel(model)
        return average, lambda: average.update_parameters(model)
    if kind.startswith("EMAModel"):
        chosen = list(model.parameters()) if kind.endswith("all") else list(params)
        average = diffusers.EMAModel(chosen, decay=decay, min_decay=decay, foreach="foreach" in kind)
        controller.follow(average)
        return average, lambda: average.step(chosen)
    average = {
        "copy": lambda: copy.deepcopy(model),
        "dict": lambda: dict(zip(names, clones, strict=True)),
        "list": lambda: clones,
        "some": lambda: [c for c in clones if c.ndim == 2],
    }[kind]()
    chosen = [p for p in params if p.ndim == 2] if kind == "some" else params
    controller.follow(average, chosen if kind == "some" else None)
    decays = itertools.chain([0.0], itertools.repeat(decay))  # as the others, which begin with a copy
    values = {"copy": lambda: trainable(average), "dict": lambda: list(average.values())}.get(kind, lambda: average)
    return average, lambda: lerp(values(), chosen, next(decays))


def as_model(average, model):
    if isinstance(average, torch.nn.Module):
        return getattr(average, "module", average)
    made = copy.deepcopy(model)
    if isinstance(average, dict):
        made.load_state_dict(average, strict=False)
        return made
    shadows = getattr(average, "shadow_params", average)
    every = list(made.parameters())
    some = [p for p in every if p.requires_grad and (p.ndim == 2 or len(shadows) != 8)]
    with torch.no_grad():
        for param, mean in zip(every if len(every) == len(shadows) else some, shadows, strict=True):
            param.copy_(mean)
    return made


def loss_of(model):
    torch.manual_seed(0)
    plain = Residual()
    x, y = task(plain)
    with torch.no_grad():
        return F.mse_loss(model(x), y).item()


@pytest.mark.parametrize("settings", [{}, {"reserve": 8}, {"scale_with_rank": False}], ids=str)
def test_an_average_is_as_good_as_with_fixed_ranks(settings):
    moving = {"total_steps": 200, "interval": 16, **settings}
    controller, _, average, _ = training(200, **moving)
    fixed, _, fixed_average, _ = training(200, **{**moving, "interval": 500, "total_steps": 2000})
    assert controller.moved > 10 and fixed.moved == 0
    assert loss_of(average) < 1.2 * loss_of(fixed_average)


KINDS = ["EMAModel", "EMAModel, all", "EMAModel, foreach", "copy", "dict", "list"]


@pytest.mark.parametrize("settings", [{}, {"reserve": 8}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_average_moves_alike(kind, settings):
    controller, _, expected, _ = training(**settings)
    _, _, found, _ = training(kind=kind, **settings)
    assert controller.moved > 0
    for (name, a), b in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_an_average_of_the_matrices_alone_moves_too():
    controller, _, found, _ = training(kind="some")
    _, _, expected, _ = training()
    assert controller.moved > 0
    for name, layer in controller.adapters.items():
        own, other = found.get_submodule(name), expected.get_submodule(name)
        torch.testing.assert_close(own.lora_A, other.lora_A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.lora_B, other.lora_B, rtol=1e-4, atol=1e-6)
        assert own.rank == layer.rank == other.rank


def test_swa_from_the_middle_of_a_training():
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **MOVING)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for step in range(50):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 20:
            swa, before = AveragedModel(model), loss_of(model)
        if step >= 20:
            swa.update_parameters(model)
    assert len(controller.history) > 6 and controller.moved > 0
    assert [m.rank for m in swa.modules() if isinstance(m, l1ra.L1RALinear)] == list(controller.ranks.values())
    assert loss_of(model) < loss_of(swa.module) < before


def test_a_training_with_its_average_can_be_broken_off_and_resumed(tmp_path):
    def run(steps, resume):
        torch.manual_seed(0)
        model = Residual()
        x, y = task(model)
        start = 0
        if resume:
            controller = l1ra.load(model, tmp_path / "model")
        else:
            controller = l1ra.patch(model, 16, **MOVING)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        ema = diffusers.EMAModel(trainable(model), decay=DECAY)
        if resume:
            start, state, swa_state, ema_state = torch.load(tmp_path / "rest", weights_only=False)
            optimizer.load_state_dict(state)
            swa.load_state_dict(swa_state)
            ema.load_state_dict(ema_state)
        controller.follow(ema)
        for _ in range(start, steps):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            swa.update_parameters(model)
            ema.step(trainable(model))
        if not resume:
            controller.save(tmp_path / "model")
            torch.save((steps, optimizer.state_dict(), swa.state_dict(), ema.state_dict()), tmp_path / "rest")
        return controller, [*model.state_dict().values(), *swa.state_dict().values(), *ema.shadow_params]

    run(20, False)
    controller, found = run(40, True)
    run_through, expected = run(40, False)
    assert controller.moved == run_through.moved > 0 and controller.ranks == run_through.ranks
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_only_the_averages_of_its_own_model_are_moved():
    controller, model, *_ = training(0)
    twin, _, _, stays = training(0)
    x, y = task(Residual())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = copy.deepcopy(stays.state_dict())
    for _ in range(40):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.moved > 0 and twin.steps == 0
    assert all(same_bits(a, b) for a, b in zip(before.values(), stays.state_dict().values(), strict=True))


def test_an_average_of_diffusers_that_is_not_followed_is_named():
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **{**MOVING, "reserve": 8})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ema = diffusers.EMAModel(trainable(model))
    with pytest.warns(UserWarning, match=r"EMAModel seems to average .*call controller.follow\(ema\)"):
        for _ in range(6):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            ema.step(trainable(model))
    controller.follow(ema)


def test_what_cannot_be_followed_is_refused():
    torch.manual_seed(0)
    plain = Residual()
    early, early_list = copy.deepcopy(plain), diffusers.EMAModel(plain.parameters())
    controller = l1ra.patch(plain, 16, **MOVING)
    for average, error, says in (
        (early, ValueError, "made after l1ra.patch"),
        (early_list, ValueError, "have not the shapes"),
        (plain, ValueError, "pass a copy of the whole model"),
        ({"a": torch.ones(1)}, ValueError, "holds an average of no adapter"),
        (torch.ones(1), TypeError, "can't be followed: pass a copy of the model"),
        (3, TypeError, "can't be followed"),
    ):
        with pytest.raises(error, match=says):
            controller.follow(average)


def test_an_average_that_was_loaded_with_other_ranks_is_named_at_the_next_move():
    _, model, _, average = training(20)
    _, _, _, other = training(0)
    average.load_state_dict(other.state_dict())
    x, y = task(Residual())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="AveragedModel has other ranks than the model"):
        warnings.simplefilter("ignore")
        for _ in range(10):
            F.mse_loss(model(x), y).backward()
            optimizer.step()


def test_an_average_that_was_replaced_is_not_followed_any_more():
    controller, model, _, first = training(20, kind="EMAModel")
    second = diffusers.EMAModel(trainable(model), decay=DECAY)
    controller.follow(second)
    first.shadow_params = [tensor[:1] for tensor in first.shadow_params]  # it does not fit any more
    del first
    x, y = task(Residual())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    moved = controller.moved
    for _ in range(10):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.moved > moved
    assert [tensor.shape for tensor in second.shadow_params] == [p.shape for p in trainable(model)]
