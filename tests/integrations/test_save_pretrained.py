"""What a patched transformers model writes when it is saved, by itself and by a Trainer."""

import copy
import logging
import os
import pickle

import pytest
import torch
from helpers import bert, llama, shake, tokens
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import arguments, labelled, livelier, sentences
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import l1ra
from l1ra.layers.adapted_model import find_adapters

PLAIN = {"adapter_config.json", "adapter_model.safetensors"}


def patched():
    model = llama()
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0)
    shake(model, 1.0)
    return model, controller


@torch.no_grad()
def computed(model):
    return model.eval()(tokens()).logits


def files(folder):
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture
def base(tmp_path):
    """A folder with a plain model."""
    livelier(llama()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, folder, save_steps=10, resume=None, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0)
    data = sentences()
    settings = arguments(folder, save_strategy="steps", save_steps=save_steps, max_steps=20, **kwargs)
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data[:8])
    trainer.train(resume_from_checkpoint=resume)
    return controller, trainer


def test_a_saved_model_is_a_lora_that_transformers_and_peft_read(base, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    l1ra.patch(model, 28)
    shake(model)
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == PLAIN
    expected = computed(model)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        type(model).from_pretrained(tmp_path / "saved"),
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved"),
    ):
        torch.testing.assert_close(computed(again), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(computed(AutoModelForCausalLM.from_pretrained(base)), expected, atol=1e-3)


def test_a_trainer_saves_the_same_at_the_end_and_in_checkpoints(base, tmp_path):
    pytest.importorskip("peft")
    controller, trainer = trained(base, tmp_path / "run")
    trainer.save_model(tmp_path / "saved")
    assert controller.moved > 0 and files(tmp_path / "saved") == PLAIN | {"training_args.bin"}
    expected = computed(trainer.model)
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-20"):
        again = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(computed(again), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_what_is_trained_and_no_frozen_weight(base, tmp_path):
    _, trainer = trained(base, tmp_path)
    held = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert set(held) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in held.items())


def test_resuming_warns_of_no_missing_weights(base, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trained(base, tmp_path)
    with caplog.at_level(logging.WARNING, "transformers"):
        trained(base, tmp_path, resume=str(tmp_path / "checkpoint-10"))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


def test_the_best_checkpoint_brings_its_controller_along(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0)
    best = {}

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            best[state.global_step] = (dict(controller.ranks), controller.moved, list(controller.history))

    settings = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    args = TrainingArguments(**arguments(tmp_path, max_steps=20, **settings))  # the "best" one is then the first
    data = sentences()
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=[Note()])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10") and best[10] != best[20]
    assert (dict(controller.ranks), controller.moved, list(controller.history)) == best[10]
    assert {name: layer.rank for name, layer in find_adapters(model)} == best[10][0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_classifier_is_saved_with_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = livelier(bert())
    plain = copy.deepcopy(model)
    l1ra.patch(model, 40, interval=3, warmup=0.0)
    settings = arguments(tmp_path / "run", save_strategy="steps", save_steps=10, max_steps=10)
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=labelled())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    held = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
    assert torch.equal(held["classifier.weight"], model.classifier.weight)
    expected = computed(model)
    nn.init.normal_(plain.classifier.weight)  # as drawn anew in another process
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "saved")
    torch.testing.assert_close(computed(again), expected, rtol=1e-5, atol=1e-5)


def test_buffers_are_in_a_checkpoint_as_training_changes_them():
    from l1ra.layers.adapted_model import carried_tensors

    model = llama()
    model.model.register_buffer("seen", torch.zeros(2))
    model.model.register_buffer("passing", torch.zeros(2), persistent=False)
    l1ra.patch(model, 28)
    carried = carried_tensors(model)
    assert "model.seen" in carried and "model.passing" not in carried
    assert not [name for name in carried if "base_layer" in name or "norm" in name or "embed" in name]


def test_what_peft_cannot_express_is_saved_by_the_controller(tmp_path):
    model, controller = patched()
    _, layer = next(find_adapters(model))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="no LoRA for PEFT is written: .* trained beside its adapter"):
        model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == {"l1ra"}
    fresh = llama()
    l1ra.load(fresh, tmp_path / "saved" / "l1ra")
    assert {n: a.rank for n, a in find_adapters(fresh)} == controller.ranks
    orphan = copy.deepcopy(model)
    with pytest.raises(ValueError, match="trained beside its adapter"):
        orphan.save_pretrained(tmp_path / "orphan")


def test_what_peft_cannot_express_breaks_no_training(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    l1ra.patch(model, 28, interval=3, warmup=0.0)
    next(find_adapters(model))[1].base_layer.weight.requires_grad_(True)
    settings = arguments(tmp_path / "run", save_strategy="steps", save_steps=5, max_steps=10)
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=sentences())
    with pytest.warns(UserWarning, match="no LoRA for PEFT is written"):
        trainer.train()
    assert {"model.safetensors", "l1ra"} <= files(tmp_path / "run" / "checkpoint-10")
    assert not PLAIN & files(tmp_path / "run" / "checkpoint-10")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(again, tmp_path):
    model, _ = patched()
    model.save_pretrained(tmp_path / "first")
    twin = again(model)
    shake(twin, 2)
    twin.save_pretrained(tmp_path / "second")
    model.save_pretrained(tmp_path / "third")
    first, second, third = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second", "third"))
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_unpatch_gives_the_method_back(tmp_path):
    model, _ = patched()
    l1ra.unpatch(model, merge=True)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(computed(llama().from_pretrained(tmp_path)), computed(model))


def test_a_lora_of_a_second_training_names_no_base_without_the_first(base, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    l1ra.patch(model, 28)
    shake(model, 1.0)
    l1ra.unpatch(model, merge=True)
    model.save_pretrained(tmp_path / "first")
    l1ra.patch(model, 28)
    shake(model, 1.0)
    with pytest.warns(UserWarning, match=r"belongs to the weights that l1ra.unpatch\(model, merge=True\) has left"):
        model.save_pretrained(tmp_path / "second")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again = peft.PeftModel.from_pretrained(first, tmp_path / "second")
    torch.testing.assert_close(computed(again), computed(model), rtol=1e-4, atol=1e-5)


def test_other_processes_write_nothing_and_pushing_goes_another_way(tmp_path):
    model, _ = patched()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    with pytest.raises(ValueError, match=r"call model.push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not files(tmp_path / "other") and not files(tmp_path / "pushed")


def test_pushing_a_model_uploads_the_lora(tmp_path, monkeypatch):
    """With the hub stood in for: transformers calls save_pretrained and uploads what that wrote."""
    hub = pytest.importorskip("transformers.utils.hub")
    model, _ = patched()
    uploaded = set()
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", lambda: Hub())
    else:
        monkeypatch.setattr(hub, "create_repo", Hub().create_repo)
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: uploaded.update(os.listdir(folder))
    )
    model.push_to_hub("somebody/something")
    assert uploaded == PLAIN


class Hub:
    def create_repo(self, repo_id, **kwargs):
        self.repo_id = repo_id
        return self


class Card:
    def save(self, path):
        pass


def test_sharded_adapters_are_left_to_transformers(tmp_path):
    model, _ = patched()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    layer = next(find_adapters(model))[1]
    layer.lora_A.data = layer.lora_A.data.flatten()  # as FSDP does
    with pytest.warns(UserWarning, match="sharded, so the weights are saved under their names in the patched model"):
        model.save_pretrained(tmp_path, state_dict=whole)
    assert "model.safetensors" in files(tmp_path) and not PLAIN & files(tmp_path)


def test_a_model_of_ones_own_gets_no_such_method():
    model = nn.Sequential(nn.Linear(8, 8))
    l1ra.patch(model, 2)
    assert not hasattr(model, "save_pretrained")
