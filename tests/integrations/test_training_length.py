"""How long a training is, as its Trainer says it: resumed for longer or shorter, begun anew, trained a second time."""

import warnings

import pytest
import torch
from helpers import llama
from trainer_helpers import arguments, livelier, sentences
from transformers import Trainer, TrainerCallback, TrainingArguments

import l1ra

SETTINGS = {"interval": 6, "min_interval": 6, "warmup": 0.0, "margin": 1.0}
COOLDOWN = 0.3


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class OutOfMemory(Trainer):
    """Runs out of memory once, after ``at`` forwards, as a GPU would."""

    at = 11

    def training_step(self, *args, **kwargs):
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(*args, **kwargs)


def patched(**settings):
    model = livelier(llama())
    return model, l1ra.patch(model, 28, **{**SETTINGS, **settings})


def train(path, model, steps, *, stop_at=None, resume=None, trainer=Trainer, callbacks=(), **kwargs):
    args = TrainingArguments(**arguments(path, **{"max_steps": steps, "save_strategy": "steps", **kwargs}))
    stop = [] if stop_at is None else [StopAt(stop_at)]
    made = trainer(model, args, train_dataset=sentences(), callbacks=[*callbacks, *stop])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(L1RA|rank|training goes on).*")
        made.train(resume_from_checkpoint=resume)
    return made


def moves(controller):
    return [entry["step"] for entry in controller.history if entry["step"]]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("first, broken_at, then", [(18, 18, 54), (60, 15, 30), (60, 17, 24), (30, 8, 60)])
def test_a_training_that_is_resumed_for_longer_or_shorter_ends_with_that_length(
    first, broken_at, then, explicit, tmp_path
):
    """Broken off between reallocations too, with probes (step 8) or fading gates (steps 15 and 17)."""
    model, begun = patched()
    train(tmp_path, model, first, stop_at=broken_at, save_steps=broken_at)
    model, controller = patched()
    callbacks = [controller.callback()] if explicit else []
    resume = str(tmp_path / f"checkpoint-{broken_at}")
    train(tmp_path, model, then, resume=resume, callbacks=callbacks, save_steps=1000)
    assert controller.total_steps == controller.steps == then
    last = int((1 - COOLDOWN) * then + 1e-6)
    assert moves(controller) == moves(begun) + [step for step in range(6, last + 1, 6) if step > broken_at]
    assert all(gate == 1 for row in master_gates(controller) for gate in row)  # none is left half faded


def master_gates(controller):
    return controller._bank.by_adapter(controller._bank.value)


def test_a_training_resumed_as_it_was_keeps_its_length_and_its_probes(tmp_path):
    """The same number of steps changes nothing: bit for bit as unbroken."""
    whole_model, whole = patched()
    train(tmp_path / "whole", whole_model, 24, save_steps=1000)
    model, _ = patched()
    train(tmp_path / "broken", model, 24, stop_at=8, save_steps=8)
    model, controller = patched()
    train(tmp_path / "broken", model, 24, resume=str(tmp_path / "broken" / "checkpoint-8"), save_steps=1000)
    assert controller.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole_model.parameters(), strict=True))


def test_a_length_of_the_users_own_stands_when_resumed(tmp_path):
    model, _ = patched(total_steps=100)
    train(tmp_path, model, 18, save_steps=18)
    model, controller = patched(total_steps=100)
    train(tmp_path, model, 30, resume=str(tmp_path / "checkpoint-18"), save_steps=1000)
    assert (controller.total_steps, controller.steps) == (100, 30) and moves(controller) == [6, 12, 18, 24, 30]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_training_that_begins_anew_after_running_out_of_memory_is_counted_anew(explicit, tmp_path):
    model, controller = patched()
    trainer = train(
        tmp_path,
        model,
        -1,
        trainer=OutOfMemory,
        callbacks=[controller.callback()] if explicit else [],
        num_train_epochs=3,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        save_strategy="no",
    )
    assert trainer.args.per_device_train_batch_size == 8 and trainer._train_batch_size < 8
    assert controller.steps == controller.total_steps == trainer.state.global_step > 24
    last = int((1 - COOLDOWN) * controller.steps + 1e-6) // 6 * 6
    assert moves(controller) == list(range(6, last + 1, 6))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_training_moves_ranks_by_its_own_length(same_trainer, tmp_path):
    model, controller = patched()
    trainer = train(tmp_path, model, 18, save_strategy="no")
    assert moves(controller) == [6, 12]
    moved = controller.moved
    if same_trainer:
        trainer.args.max_steps = 30
        trainer.train()
    else:
        train(tmp_path, model, 30, save_strategy="no")
    assert controller.steps == controller.total_steps == 30 and moves(controller) == [6, 12, 18]
    assert controller.moved > moved and controller.ranks == controller.history[-1]["ranks"]


def test_a_second_training_goes_on_within_a_length_of_the_users_own(tmp_path):
    model, controller = patched(total_steps=36)
    for _ in range(2):
        train(tmp_path, model, 18, save_strategy="no")
    assert controller.steps == 36 and moves(controller) == [6, 12, 18, 24]


def test_a_loaded_controller_trains_as_long_as_its_new_trainer_says(tmp_path):
    model, begun = patched()
    train(tmp_path, model, 60, stop_at=15, save_strategy="no")
    begun.save(tmp_path / "saved")
    model = livelier(llama())
    controller = l1ra.load(model, tmp_path / "saved")
    assert controller.steps == 15
    train(tmp_path, model, 30, save_strategy="no")
    assert controller.steps == controller.total_steps == 30 and moves(controller) == [6, 12, 18]


@pytest.mark.parametrize("explicit", [False, True])
def test_out_of_memory_after_a_resume_is_counted_from_where_it_resumed(explicit, tmp_path):
    """The Trainer reads its optimizer's state again, which is of the ranks of the checkpoint, and not the model."""
    settings = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "auto_find_batch_size": True}
    model, _ = patched()
    train(tmp_path, model, -1, stop_at=12, save_steps=12, **settings)
    model, controller = patched()
    args = TrainingArguments(**arguments(tmp_path, **{"max_steps": -1, "save_strategy": "no", **settings}))
    callbacks = [controller.callback()] if explicit else []
    trainer = OutOfMemory(model, args, train_dataset=sentences(), callbacks=callbacks)
    with pytest.warns(UserWarning, match="is of other ranks than those of the model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert controller.steps == controller.total_steps == trainer.state.global_step
    steps = [entry["step"] for entry in controller.history]
    assert steps == sorted(set(steps)) and controller.ranks == controller.history[-1]["ranks"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_second_training_from_a_loaded_state_resumes_bit_for_bit(tmp_path):
    model, begun = patched()
    train(tmp_path, model, 24, save_strategy="no")
    begun.save(tmp_path / "saved")

    def second(folder, **kwargs):
        model = livelier(llama())
        controller = l1ra.load(model, tmp_path / "saved")
        train(folder, model, 40, seed=5, **kwargs)
        return controller, model

    whole, unbroken = second(tmp_path / "whole", save_strategy="no")
    second(tmp_path / "broken", stop_at=10, save_steps=10)
    resumed, model = second(tmp_path / "broken", resume=str(tmp_path / "broken" / "checkpoint-10"), save_strategy="no")
    assert resumed.history == whole.history and whole.steps == 40
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unbroken.parameters(), strict=True))
