"""Optimizers that step while a backward is running, or while graphs wait for theirs."""

import gc
import itertools
import warnings

import pytest
import torch
from helpers import BRISK, Residual, same_bits, task, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

import l1ra

MOVING = {**BRISK, "min_coherence": 0.0}


def towers(**settings):
    torch.manual_seed(0)
    model = nn.ModuleList([Residual(), Residual()])
    data = [task(tower, seed=seed) for seed, tower in enumerate(model)]
    return model, l1ra.patch(model, 32, **{**MOVING, **settings}), data


def losses_of(model, data, forward=lambda tower, x: tower(x)):
    return [(forward(tower, x) - y).square().mean() for tower, (x, y) in zip(model, data, strict=True)]


def optimizer_of(params):
    return torch.optim.AdamW(params, lr=1e-2)


def in_hooks(model, groups, step=lambda optimizer: None):
    """An optimizer for each group of parameters, which steps in the backward once all of the group have a gradient."""
    for group in groups:
        optimizer, waiting = optimizer_of(group), set(group)

        def hook(param, optimizer=optimizer, waiting=waiting, group=group):
            waiting.discard(param)
            if not waiting:
                optimizer.step()
                step(optimizer)
                optimizer.zero_grad()
                waiting.update(group)

        for param in group:
            param.register_post_accumulate_grad_hook(hook)


def train(how, steps=60, **settings):
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, auto=how != "explicit", **{**MOVING, **settings})
    if how == "usual":
        optimizer = optimizer_of(trainable(model))
    elif how == "layer":
        in_hooks(model, [list(layer.parameters())[:3] for layer in controller.adapters.values()])
    elif how == "no gates":
        in_hooks(model, [[p] for p in trainable(model) if p.ndim == 2])
    else:
        in_hooks(model, [[p] for p in trainable(model)], controller.step if how == "explicit" else lambda _: None)
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        if how == "usual":
            optimizer.step()
            optimizer.zero_grad()
    return controller, model


@pytest.mark.parametrize("settings", [{}, {"reserve": 8}, {"rule": "l1", "gate_lr": 0.1, "l1_lambda": 0.5}], ids=str)
@pytest.mark.parametrize("how", ["parameter", "layer", "no gates", "explicit"])
def test_optimizers_in_the_backward_train_as_one_after_it(how, settings):
    expected, usual = train("usual", **settings)
    found, model = train(how, **settings)
    assert len(expected.history) > 5 and (expected.moved > 0 or settings.get("rule"))
    assert found.steps == 60 and found.moved == expected.moved and found.history == expected.history
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), usual.state_dict().values(), strict=True))


def test_a_backward_that_breaks_off_does_not_keep_the_next_from_being_heard():
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **MOVING)
    in_hooks(model, [[p] for p in trainable(model)])
    inputs = []
    handle = model.blocks[0].register_forward_hook(lambda *args: inputs.append(args[2].register_hook(lambda _: 1 / 0)))
    with pytest.raises(ZeroDivisionError):
        (model(x) - y).square().mean().backward()
    handle.remove()
    for _ in range(10):
        (model(x) - y).square().mean().backward()
    assert controller.steps == controller._bank.age.max() == 10


@pytest.mark.parametrize("reentrant", [False, True])
def test_optimizers_in_the_backward_with_checkpointing(reentrant):
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **MOVING)
    in_hooks(model, [[p] for p in trainable(model)])
    x.requires_grad_()
    losses = []
    for _ in range(60):
        z = checkpoint(lambda x: x + torch.tanh(model.blocks[0](x)), x, use_reentrant=reentrant)
        z = checkpoint(lambda x: x + torch.tanh(model.blocks[1](x)), z, use_reentrant=reentrant)
        for block in model.blocks[2:]:
            z = z + torch.tanh(block(z))
        loss = (z - y).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert controller.steps == 60 and controller.moved > 0 and losses[-1] < losses[0]
    assert controller._bank.age.max() > 6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"reserve": 8}, {"scale_with_rank": False}], ids=str)
@pytest.mark.parametrize("optimizers", ["one", "one a tower"])
def test_a_step_of_one_tower_leaves_the_graph_of_the_other_alone(optimizers, settings, checkpointing):
    model, controller, data = towers(**settings)
    own = [optimizer_of(trainable(tower)) for tower in model]
    if optimizers == "one":
        own = [optimizer_of(trainable(model))] * 2
    forward = (lambda tower, x: checkpoint(tower, x, use_reentrant=False)) if checkpointing else (lambda t, x: t(x))
    first = None
    for _ in range(40):
        losses = losses_of(model, data, forward)
        first = first or [loss.item() for loss in losses]
        for loss, optimizer in zip(losses, own, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.steps == (80 if optimizers == "one" else 40)
    assert controller.moved > 0 and all(loss < before for loss, before in zip(losses, first, strict=True))


def test_towers_that_are_trained_in_turns_by_one_optimizer_move_as_many_ranks_as_by_one_each():
    moved = []
    for parts in (1, 2):
        model, controller, data = towers(total_steps=320 // parts, interval=16, reserve=8)
        own = (
            [optimizer_of(trainable(tower)) for tower in model] if parts == 2 else [optimizer_of(trainable(model))] * 2
        )
        for _ in range(160):
            for loss, optimizer in zip(losses_of(model, data), own, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        moved.append(controller.moved / len(controller.history))
    assert min(moved) > 0.7 * max(moved) > 1


def test_ranks_wait_for_the_graph_of_the_other_tower_and_move_after_its_backward():
    model, controller, data = towers()
    optimizers = [optimizer_of(trainable(tower)) for tower in model]
    at = []
    for _ in range(12):
        losses = losses_of(model, data)
        for i, (loss, optimizer) in enumerate(zip(losses, optimizers, strict=True)):
            loss.backward()
            before = len(controller.history)
            optimizer.step()
            optimizer.zero_grad()
            at += [(controller.steps, i)] * (len(controller.history) - before)
    assert at == [(6, 1), (12, 1)]


def test_a_generator_and_its_critic_with_several_steps_of_one_a_step_of_the_other():
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": Residual(), "critic": Residual()})
    controller = l1ra.patch(model, 32, **MOVING)
    generator, critic = (optimizer_of(trainable(part)) for part in model.values())
    for _ in range(15):
        fake = model["generator"](torch.randn(8, 12))  # its graph lives through all steps of the critic
        for _ in range(3):
            critic.zero_grad()
            (model["critic"](fake.detach()).square().mean() - model["critic"](torch.randn(8, 12)).mean()).backward()
            critic.step()
        generator.zero_grad()
        model["critic"](fake).mean().backward()
        generator.step()
    assert controller.moved > 0 and controller._bank.age.min() >= 0


def test_a_graph_that_is_retained_over_a_step_of_the_other_tower():
    model, controller, data = towers()
    optimizers = [optimizer_of(trainable(tower)) for tower in model]
    for _ in range(40):
        first, second = losses_of(model, data)
        second.backward(retain_graph=True)
        first.backward()
        optimizers[0].step()
        second.backward()
        optimizers[1].step()
        model.zero_grad()
    assert controller.moved > 0


def test_outputs_that_are_kept_with_their_graphs_delay_nothing_once_their_adapters_were_stepped():
    model, controller, data = towers()
    optimizers = [optimizer_of(trainable(tower)) for tower in model]
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            kept += [tower(x).mean() for tower, (x, _) in zip(model, data, strict=True)]
            for loss, optimizer in zip(losses_of(model, data), optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert len(controller.history) > 5


def test_a_graph_that_never_gets_its_backward_is_named():
    model, controller, data = towers()
    optimizer = optimizer_of(trainable(model[0]))
    kept = []
    with pytest.warns(UserWarning, match="no rank has moved since step 1: a backward through adapters"):
        for i in range(16):
            if i == 1:
                kept.append(model[1](data[1][0]))
            losses_of(model[:1], data[:1])[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(controller.history) == 1
    kept.clear()
    gc.collect()
    losses_of(model[:1], data[:1])[0].backward()
    with pytest.warns(UserWarning, match="No optimizer holds them"):
        optimizer.step()
    assert len(controller.history) > 1


def test_an_ordinary_loop_records_no_graphs():
    model, controller, data = towers()
    optimizer = optimizer_of(trainable(model))
    for _ in range(8):
        sum(losses_of(model, data)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.pending_graphs is None for layer in controller.adapters.values())


def test_gates_without_a_gradient_are_restored_without_a_mark():
    """As an optimizer may decay what has no gradient, and a backward may still need it."""
    model, controller, data = towers()

    class Decaying(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.mul_(0.9)

    optimizer = Decaying(trainable(model), lr=1e-2)
    losses = losses_of(model, data)
    losses[0].backward()
    versions = [layer.gate._version for layer in controller.adapters.values()]
    optimizer.step()
    assert [g for gates in controller.gates().values() for g in gates] == [1.0] * 32
    assert all((layer.gate == 1).all() for layer in controller.adapters.values())
    now = [layer.gate._version for layer in controller.adapters.values()]
    assert [a != b for a, b in zip(versions, now, strict=True)] == [True] * 4 + [False] * 4


def test_adapters_that_no_optimizer_holds_keep_their_gates_and_gradients():
    model, controller, data = towers()
    optimizer = optimizer_of(trainable(model[0]))
    sum(losses_of(model, data)).backward()
    optimizer.step()
    layers = list(controller.adapters.values())
    assert [layer.gate.grad is None for layer in layers] == [True] * 4 + [False] * 4
    assert [any(row) for row in controller._bank.by_adapter(controller._bank.age)] == [True] * 4 + [False] * 4
    assert len(list(itertools.chain(*controller.gates().values()))) == 32
