"""Checkpoints of Trainers: whoever writes one, and into whatever folder, it holds what resuming needs."""

import os
import shutil
import signal
import time

import pytest
import torch
from helpers import MLP, as_lists, bert, llama, trainable
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from trainer_helpers import arguments, labelled, livelier, sentences
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import l1ra
from l1ra.layers.adapted_model import controller_of, find_adapters

MOVING = {"interval": 3, "warmup": 0.0, "min_interval": 1, "margin": 1.0}


class Wrapper(nn.Module):
    """A user's classifier around a model of transformers."""

    def __init__(self):
        super().__init__()
        self.bert = bert().bert
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.bert(input_ids).pooler_output)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Container(PreTrainedModel):
    """A model of transformers around another one."""

    config_class, _supports_sdpa = type(bert().config), True

    def __init__(self, config):
        super().__init__(config)
        self.inner = Wrapper()
        self.post_init()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids, labels)


class OwnSave(type(llama())):
    """A class with a ``save_pretrained`` that writes more than weights."""

    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        open(os.path.join(folder, "extra.txt"), "w").close()


def whole():
    return livelier(llama()), lambda model: l1ra.patch(model, 28, **MOVING)


def own_save():
    return livelier(OwnSave(llama().config)), lambda model: l1ra.patch(model, 28, **MOVING)


def wrapper():
    return livelier(Wrapper()), lambda model: l1ra.patch(model, 40, modules_to_save=["head"], **MOVING)


def part_of_a_module():
    def patch(model):
        controller = l1ra.patch(model.bert, 40, **MOVING)
        model.head.requires_grad_(True)
        return controller

    return livelier(Wrapper()), patch


def part_of_a_transformers_model():
    def patch(model):
        return l1ra.patch(model.inner.bert, 40, **MOVING)

    return livelier(Container(bert().config)), patch


def two_parts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Wrapper(), Wrapper()

        def forward(self, input_ids, labels=None):
            first, second = (part(input_ids, labels) for part in (self.first, self.second))
            return {"loss": first["loss"] + second["loss"], "logits": first["logits"]}

    def patch(model):
        l1ra.patch(model.second.bert, 30, **MOVING)
        return l1ra.patch(model.first.bert, 40, **MOVING)

    return livelier(Two()), patch


def forwarding():
    class Forwarding(nn.Module):
        """As torch.compile's: the attributes of the model inside seem to be its own."""

        def __init__(self):
            super().__init__()
            self.inner = llama()

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

        def forward(self, input_ids, labels=None):
            return self.inner(input_ids=input_ids, labels=labels)

    return livelier(Forwarding()), lambda model: l1ra.patch(model.inner, 28, **MOVING)


MODELS = [whole, own_save, wrapper, part_of_a_module, part_of_a_transformers_model, two_parts, forwarding]


def trainer_of(make, path, kind=Trainer, callbacks=None, **settings):
    torch.manual_seed(0)
    model, patch = make()
    controller = patch(model)
    data = sentences() if make in (whole, own_save, forwarding) else labelled()
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 100, "seed": 5, **settings}
    args = TrainingArguments(**arguments(path, **settings))
    return controller, kind(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def same(trainer, other):
    """Whether two trainings ended alike, bit for bit."""
    expected = dict(other.model.named_parameters())
    controllers = [
        [controller_of(part) for part in each.model.modules() if controller_of(part) is not None]
        for each in (trainer, other)
    ]
    assert all(c.moved > 0 and c.steps == 12 for c in controllers[0])
    assert [c.history for c in controllers[0]] == [c.history for c in controllers[1]]
    return all(torch.equal(p, expected[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("make", MODELS)
def test_a_training_resumes_bit_for_bit_wherever_its_adapters_are(make, tmp_path):
    _, unbroken = trainer_of(make, tmp_path / "unbroken")
    unbroken.train()
    _, broken = trainer_of(make, tmp_path / "broken", save_steps=5)
    broken.train()
    states = list((tmp_path / "broken" / "checkpoint-5" / "l1ra").rglob("l1ra.json"))
    assert len(states) == (2 if make is two_parts else 1)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-12")
    _, resumed = trainer_of(make, tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, broken) and same(resumed, unbroken)


@pytest.mark.parametrize("make", MODELS)
def test_the_best_checkpoint_is_read_wherever_the_adapters_are(make, tmp_path):
    states = {}

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            states[state.global_step] = as_lists(controller.state_dict())

    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "greater_is_better": True}
    settings = {"save_steps": 5, "max_steps": 10, "metric_for_best_model": "loss", **best}
    controller, trainer = trainer_of(make, tmp_path, callbacks=[Note()], **settings)
    trainer.train()
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert as_lists(controller.state_dict()) == states[step]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_process_that_is_told_to_stop_resumes_from_what_it_saves_then(tmp_path):
    """transformers' just-in-time checkpoint calls the Trainer's method itself, without the callbacks."""
    pytest.importorskip("transformers.trainer_jit_checkpoint")

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

    handler = signal.getsignal(signal.SIGTERM)
    try:
        _, unbroken = trainer_of(whole, tmp_path / "unbroken")
        unbroken.train()
        _, stopped = trainer_of(whole, tmp_path / "stopped", callbacks=[Stop()], enable_jit_checkpoint=True)
        for callback in stopped.callback_handler.callbacks:
            if hasattr(callback, "jit_manager"):
                callback.jit_manager.kill_wait = 0
        stopped.train()
    finally:
        signal.signal(signal.SIGTERM, handler)
    folders = [name for name in os.listdir(tmp_path / "stopped") if name.startswith("checkpoint")]
    assert folders and stopped.state.global_step < 12
    _, resumed = trainer_of(whole, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, unbroken)


def test_a_checkpoint_before_the_first_step_holds_the_state_too(tmp_path):
    controller, trainer = trainer_of(whole, tmp_path)
    trainer.create_optimizer_and_scheduler(12)
    trainer._save_checkpoint(trainer.model, trial=None)
    assert (tmp_path / "checkpoint-0" / "l1ra" / "l1ra.json").exists() and controller.steps == 0


def test_a_trial_of_a_search_is_saved_in_its_own_folder(tmp_path):
    class Trial:
        number = 3

    _, trainer = trainer_of(whole, tmp_path)
    trainer.create_optimizer_and_scheduler(12)
    trainer.hp_search_backend, trainer.hp_name = "optuna", lambda trial: f"run-{trial.number}"
    trainer._save_checkpoint(trainer.model, trial=Trial())
    assert (tmp_path / "run-3" / "checkpoint-0" / "l1ra" / "l1ra.json").exists()
    trainer._tune_save_checkpoint(str(tmp_path / "ray"))
    assert (tmp_path / "ray" / "checkpoint-0" / "l1ra" / "l1ra.json").exists()
    assert not (tmp_path / "checkpoint-0").exists()


def test_what_a_checkpoint_uploads_holds_the_state(tmp_path, monkeypatch):
    uploaded = []
    _, trainer = trainer_of(whole, tmp_path)
    trainer.create_optimizer_and_scheduler(12)
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: uploaded.extend(os.listdir(os.path.join(folder, "l1ra")))
    )
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, trial=None)
    assert "l1ra.json" in uploaded


class SavesTheModelItself(Trainer):
    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self.args.output_dir, "mine", f"checkpoint-{self.state.global_step}")
        self.model.save_pretrained(folder)
        self._save_optimizer_and_scheduler(folder)
        self._save_rng_state(folder)
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))


class SavesTheStateDictItself(Trainer):
    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        shutil.rmtree(os.path.join(folder, "l1ra"))
        save_file(self.model.state_dict(), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


class ReadsItself(SavesTheStateDictItself):
    def _load_from_checkpoint(self, checkpoint_path):
        weights = load_file(os.path.join(checkpoint_path, "model.safetensors"))
        self.model.load_state_dict(weights)


class ReadsWhateverItIsGiven(SavesTheStateDictItself):
    def _load_from_checkpoint(self, *args, **kwargs):
        self.model.load_state_dict(load_file(os.path.join(args[0], "model.safetensors")))


class SavesWhatIsTrained(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir, exist_ok=True)
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, os.path.join(output_dir, "model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        (SavesWhatIsTrained, "checkpoint-5"),
        (SavesTheModelItself, "mine/checkpoint-5"),
        (SavesTheStateDictItself, "checkpoint-5"),
        (ReadsItself, "checkpoint-5"),
        (ReadsWhateverItIsGiven, "checkpoint-5"),
    ],
)
def test_trainers_with_ways_of_their_own_resume_too(kind, folder, tmp_path):
    _, broken = trainer_of(whole, tmp_path, kind, save_steps=5)
    broken.train()
    _, resumed = trainer_of(whole, tmp_path, kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / folder))
    assert same(resumed, broken)


def test_saving_the_model_at_the_end_writes_no_checkpoint(tmp_path):
    _, trainer = trainer_of(whole, tmp_path / "run", save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "l1ra").exists() and not (tmp_path / "saved" / "model.safetensors").exists()


def test_outside_of_a_checkpoint_a_state_dict_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MLP()
    l1ra.patch(model, 6)
    model.load_state_dict(model.state_dict())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "holds no state of L1RA, a folder named l1ra"),
        (
            lambda folder: (folder / "l1ra.json").unlink(),
            FileNotFoundError,
            "l1ra is incomplete: saving it was interrup",
        ),
        (
            lambda folder: next(folder.glob("adapters-*")).write_bytes(b"x"),
            ValueError,
            "is damaged: its checksum is wr",
        ),
    ],
)
def test_why_a_checkpoint_is_refused_is_told_and_the_model_is_unchanged(damage, error, message, tmp_path):
    _, trainer = trainer_of(whole, tmp_path, save_steps=5)
    trainer.train()
    damage(tmp_path / "checkpoint-5" / "l1ra")
    _, again = trainer_of(whole, tmp_path)
    before = {name: p.clone() for name, p in again.model.named_parameters()}
    with pytest.raises(error, match=message):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(p, before[name]) for name, p in again.model.named_parameters())


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    _, trainer = trainer_of(whole, tmp_path, save_steps=5)
    trainer.train()
    model = livelier(llama())
    l1ra.patch(model, 8, target_modules=["q_proj", "v_proj"], **MOVING)
    again = Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=sentences())
    with pytest.raises(ValueError, match="the state is of a model with other adapters"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_frozen_weights_of_a_full_state_dict_are_read(tmp_path):
    """A model of one's own may have frozen weights that are nowhere else."""
    _, trainer = trainer_of(wrapper, tmp_path, save_steps=5)
    trainer.train()
    frozen = trainer.model.bert.embeddings.word_embeddings.weight.clone()
    _, again = trainer_of(wrapper, tmp_path)
    with torch.no_grad():
        again.model.bert.embeddings.word_embeddings.weight.zero_()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(again.model.bert.embeddings.word_embeddings.weight, frozen)


def test_a_trainer_of_a_part_of_the_patched_model_is_warned_of(tmp_path):
    model = livelier(Wrapper())

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained, self.other = model, nn.Linear(4, 4)

    outer = Whole()
    l1ra.patch(outer, 40, **MOVING)
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path, max_steps=2)), train_dataset=labelled())
    with pytest.warns(UserWarning, match="the Trainer's model does not contain the patched model"):
        trainer.train()


def test_controllers_of_layers_in_ones_own_model_are_saved_and_read(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.up, self.down = l1ra.L1RALinear(16, 24, rank=4), l1ra.L1RALinear(24, 3, rank=2)

        def forward(self, input_ids, labels=None):
            logits = self.down(torch.tanh(self.up(self.embed(input_ids).mean(1))))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def make():
        return livelier(Own()), lambda model: l1ra.RankController(model, 6, **MOVING)

    _, broken = trainer_of(make, tmp_path, save_steps=5)
    broken.train()
    assert {f"{name}.lora_A" for name, _ in find_adapters(broken.model)} <= load_file(
        tmp_path / "checkpoint-5" / "model.safetensors"
    ).keys()
    _, resumed = trainer_of(make, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(trainable(resumed.model)) > 6
    expected = dict(broken.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
