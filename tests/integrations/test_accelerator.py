"""accelerate's save_state and load_state, with and without register_for_checkpointing."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from helpers import BRISK, Residual, as_lists, same_bits, task, trainable
from torch.nn import functional as F

import l1ra


def training(register=False, others=(), **project):
    torch.manual_seed(0)
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, **{**BRISK, "min_coherence": 0.0})
    accelerator = Accelerator(cpu=True, **project)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    accelerator.register_for_checkpointing(*others, *[controller] * register)

    def train(steps):
        for _ in range(steps):
            accelerator.backward(F.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    return accelerator, controller, model, train


class Counter:
    number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


@pytest.mark.parametrize("register", [False, True])
@pytest.mark.parametrize("first", [9, 20])  # probes observe, gates fade
def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(register, first, tmp_path):
    counter = Counter()
    accelerator, controller, model, train = training(register, [counter])
    train(first)
    counter.number = first
    accelerator.save_state(tmp_path)
    train(40 - first)
    again = Counter()
    accelerator, resumed, other, train = training(register, [again])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator.load_state(tmp_path)
        train(40 - first)
    assert again.number == first and resumed.moved > 0
    assert as_lists(resumed.state_dict()) == as_lists(controller.state_dict())
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert (tmp_path / "l1ra").exists() != register


def test_folders_that_accelerate_names_itself(tmp_path):
    project = {"project_config": ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)}
    accelerator, controller, _, train = training(**project)
    for _ in range(2):
        train(9)
        accelerator.save_state()
    accelerator, resumed, *_ = training(**project)
    accelerator.load_state()
    assert resumed.steps == 18 and as_lists(resumed.state_dict()) == as_lists(controller.state_dict())


def test_a_folder_without_the_state_is_named(tmp_path):
    accelerator, controller, _, train = training()
    train(9)
    controller.close()
    accelerator.save_state(tmp_path)
    accelerator, resumed, *_ = training()
    with pytest.warns(UserWarning, match="holds no state of L1RA: the ranks are those that were saved"):
        accelerator.load_state(tmp_path)
    assert resumed.steps == 0


def test_neither_a_copy_nor_a_state_dict_outside_of_save_state_writes_anything(tmp_path, monkeypatch):
    _, controller, model, train = training()
    train(1)
    monkeypatch.setattr(controller, "save", lambda folder: pytest.fail("written"))
    model.state_dict()
    model.load_state_dict(model.state_dict())
    assert controller.steps == 1


@pytest.mark.parametrize("contained", [False, True])
def test_two_models_are_told_apart(contained, tmp_path):
    """As the UNet and the text encoder of a diffusion model, prepared one by one or within one module."""

    def two():
        torch.manual_seed(0)
        models = [Residual(), Residual()]
        data = [task(model, seed=seed) for seed, model in enumerate(models)]
        controllers = [
            l1ra.patch(m, b, **{**BRISK, "min_coherence": 0.0}) for m, b in zip(models, (16, 20), strict=True)
        ]
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for model in models for p in trainable(model)], lr=1e-2)
        accelerator.prepare(*([torch.nn.ModuleList(models)] if contained else models))
        optimizer = accelerator.prepare(optimizer)

        def train(steps):
            for _ in range(steps):
                accelerator.backward(sum(F.mse_loss(m(x), y) for m, (x, y) in zip(models, data, strict=True)))
                optimizer.step()
                optimizer.zero_grad()

        return accelerator, controllers, models, train

    accelerator, controllers, models, train = two()
    train(9)
    accelerator.save_state(tmp_path)
    train(20)
    accelerator, resumed, others, train = two()
    accelerator.load_state(tmp_path)
    train(20)
    for controller, again, model, other in zip(controllers, resumed, models, others, strict=True):
        assert controller.moved > 0 and as_lists(again.state_dict()) == as_lists(controller.state_dict())
        assert all(same_bits(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
