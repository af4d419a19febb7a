"""Which steps of which optimizers reach a controller by hooks, and which by calls."""

import gc
import warnings
import weakref

import pytest
import torch
from helpers import Adapted, llama, patched, step, tokens, trainable
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import l1ra
from l1ra import RankController
from l1ra.training.optimizer_hooks import BackwardCounter


def test_it_hears_only_optimizers_of_its_own_parameters():
    (model, controller, optimizer, x, y), (_, other, *_) = patched(), patched()
    stranger = nn.Linear(2, 2)
    stranger_steps = torch.optim.SGD(stranger.parameters(), lr=0.1)
    for _ in range(3):
        step(stranger, stranger_steps, torch.ones(1, 2), torch.ones(1, 2))
        step(model, optimizer, x, y)
    assert (controller.steps, other.steps) == (3, 0)


def test_it_hears_an_optimizer_that_gets_the_parameters_later():
    model, controller, _, x, y = patched()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": trainable(model)})
    step(model, optimizer, x, y)
    assert controller.steps == 1


def test_two_optimizers_of_half_the_adapters_each_make_one_step_together():
    model, controller, _, x, y = patched()
    halves = [trainable(model.blocks[:2]), trainable(model.blocks[2:])]
    optimizers = [torch.optim.AdamW(half, lr=1e-2) for half in halves]
    for n in range(1, 61):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert controller.steps == n
    assert controller.moved > 0 and controller._bank.age.max() > 6
    for optimizer, half in zip(optimizers, halves, strict=True):
        for p in half:
            assert all(v.shape == p.shape for v in optimizer.state[p].values() if v.dim())


def test_two_losses_with_an_optimizer_each_both_reach_the_gates():
    model = nn.ModuleList([Adapted(), Adapted()])
    controller = RankController(model, 16, total_steps=100, rule="l1")
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    for _ in range(3):
        for part, optimizer in zip(model, optimizers, strict=True):
            step(part, optimizer, torch.randn(4, 6), torch.randn(4, 6))
    assert (controller._bank.age == 3).all() and controller.steps == 3


def test_a_new_optimizer_takes_over_from_one_that_is_gone():
    model, controller, optimizer, x, y = patched()
    step(model, optimizer, x, y)
    del optimizer
    gc.collect()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for n in range(2, 8):
        step(model, optimizer, x, y)
        assert controller.steps == n
    assert controller._bank.age.max() == 7


def test_a_new_optimizer_takes_over_from_one_that_is_kept_but_not_used():
    model, controller, first, x, y = patched()
    step(model, first, x, y)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for _ in range(6):
        step(model, optimizer, x, y)
    # Its first step could as well have been the second half of the other's, and counts as that; but no gate misses it.
    assert controller.steps == 6 and controller._bank.age.max() == 7


def test_nobody_is_kept_alive_or_called_when_the_model_is_gone():
    import transformers.trainer  # noqa: F401  where it is there, the controller looks for a Trainer

    model, controller, optimizer, x, y = patched()
    step(model, optimizer, x, y)
    params, gone = trainable(model), weakref.ref(controller)
    del model, controller
    gc.collect()
    assert gone() is None
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_controllers_may_come_and_go_during_an_optimizers_step():
    model, controller, optimizer, x, y = patched()
    others = [patched()[:2] for _ in range(3)]

    def hook(*_):
        others.pop()[1].close()
        others.clear()  # and one is garbage
        gc.collect()
        others.append(patched()[:2])

    with register_optimizer_step_post_hook(hook):
        for _ in range(3):
            step(model, optimizer, x, y)
    assert controller.steps == 3


def test_close_ends_it():
    model, controller, optimizer, x, y = patched()
    controller.close()
    step(model, optimizer, x, y)
    assert controller.steps == 0 and l1ra.report(model).budget is None
    RankController(model, 16).close()


def test_without_auto_it_moves_at_your_call_alone():
    model, controller, optimizer, x, y = patched(auto=False)
    step(model, optimizer, x, y)
    assert controller.steps == 0
    for _ in range(60):
        step(model, optimizer, x, y)
        controller.step(optimizer)
    assert controller.steps == 60 and controller.moved > 0
    for p in trainable(model):
        assert all(v.shape == p.shape for v in optimizer.state[p].values() if v.dim())


def test_with_auto_a_call_of_step_is_an_error():
    _, controller, optimizer, *_ = patched()
    with pytest.raises(RuntimeError, match="drop the call, or pass auto=False"):
        controller.step(optimizer)


def test_auto_and_explicit_steps_give_the_same_gates_whatever_the_optimizer_does_to_them():
    ends = []
    for auto in (True, False):
        torch.manual_seed(0)
        model, controller, _, x, y = patched(auto=auto)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.5)
        for _ in range(20):
            step(model, optimizer, x, y)
            if not auto:
                controller.step(optimizer)
        ends.append((controller.gates(), controller.ranks))
    assert ends[0] == ends[1]


def test_many_backward_passes_without_a_step_warn_once():
    model, _, optimizer, x, y = patched()
    step(model, optimizer, x, y)
    stepped = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * BackwardCounter.LIMIT):
            model(x[:1]).sum().backward()
            if len(caught) == 1 and not stepped:
                optimizer.step()  # also where steps come after all
                stepped = True
    (warning,) = caught
    assert "256 backward passes" in str(warning.message) and "controller.step(optimizer)" in str(warning.message)


def test_steps_in_time_keep_it_silent():
    model, _, optimizer, x, _ = patched(total_steps=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 * BackwardCounter.LIMIT // 8):
            for _ in range(8):
                model(x[:1]).sum().backward()
            optimizer.step()


def test_parameters_that_a_load_has_replaced_are_still_heard():
    model, controller, _, x, y = patched()
    old = dict(model.named_parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    adapted = [p for n, p in model.named_parameters() if "base_layer" not in n]
    assert all(p is not old[n] for n, p in model.named_parameters())
    step(model, torch.optim.SGD(adapted, lr=1e-3), x, y)
    assert controller.steps == 1


def test_an_explicit_step_after_the_gradients_were_cleared_is_said():
    model, controller, optimizer, x, y = patched(auto=False)
    step(model, optimizer, x, y)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="before the gradients are cleared"):
        controller.step(optimizer)


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def told_by(model, optimizers, steps=6):
    """The warnings of a training in which these optimizers step one after the other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(torch.ones(3, 4)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    return [str(w.message) for w in caught if "Make the optimizer after l1ra.patch" in str(w.message)]


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2)


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize(("steps", "head", "says"), [(1, [], 1), (1, ["head"], 0), (2, ["head"], 1), (6, ["head"], 1)])
def test_an_optimizer_that_was_made_before_patch_is_named(steps, head, says, auto):
    model = WithHead()
    optimizer = sgd(model.parameters())
    controller = l1ra.patch(model, 2, modules_to_save=head, target_modules=["body"], total_steps=500, auto=auto)
    if not auto:
        optimizer.register_step_post_hook(lambda *_: controller.step(optimizer))
    assert len(told_by(model, [optimizer], steps)) == says


def test_a_trainer_with_an_optimizer_that_was_made_before_patch_is_told(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    l1ra.patch(model, 28)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    with pytest.warns(UserWarning, match="AdamW holds weights that l1ra.patch has frozen and no adapter"):
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()


@pytest.mark.parametrize("first", ["head", "adapters", "body and head"])
def test_optimizers_of_other_parts_are_not_named(first):
    model, other = WithHead(), nn.Linear(3, 3)
    early = sgd(model.parameters())
    controller = l1ra.patch(model, 2, modules_to_save=["head"], target_modules=["body"], total_steps=500)
    adapters = sgd([p for layer in controller.adapters.values() for p in layer.parameters() if p.requires_grad])
    optimizers = {
        "head": [sgd(model.head.parameters()), adapters],
        "adapters": [adapters, sgd(model.head.parameters()), sgd(other.parameters())],
        "body and head": [early, adapters],
    }[first]
    other(torch.ones(1, 3)).sum().backward()
    assert told_by(model, optimizers) == [] and controller.steps == 6


def test_muon_takes_the_matrices_and_the_gates_need_no_optimizer():
    model, controller, _, x, y = patched(min_coherence=0.0)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.ndim == 2], lr=1e-2)
    first = step(model, optimizer, x, y).item()
    for _ in range(50):
        last = step(model, optimizer, x, y).item()
    assert (
        controller.moved > 0 and last < first and all(layer.gate.grad is None for layer in controller.adapters.values())
    )
