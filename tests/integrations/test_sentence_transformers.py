"""sentence-transformers, unmodified: its folders load as what was trained, and its Trainer resumes."""

import copy
import logging
import os

import pytest
import torch
from helpers import SIZES, as_lists, bert, shake
from torch import nn
from trainer_helpers import arguments, livelier

import l1ra
from l1ra.layers.adapted_model import find_adapters

st = pytest.importorskip("sentence_transformers")

TEXTS = ["w3 w6 w9 w12", "w20 w23 w26", "w40 w1"]
LEARNING = r".*encoder\.layer.*(query|key|value|dense)"  # the pooler is not called
PATCHED = {"whole": lambda model: model, "inner": lambda model: inner(model)}


def inner(model):
    return next(module for module in model.modules() if type(module).__name__.startswith("Bert"))


@pytest.fixture
def base(tmp_path):
    """A folder with a model and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path / "base"
    PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]", **special).save_pretrained(folder)
    livelier(bert().bert).save_pretrained(folder)
    livelier(BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))).save_pretrained(tmp_path / "cross")
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "cross")
    return folder


def embedder(base, dense=False):
    from sentence_transformers.models import Dense, Pooling, Transformer

    modules = [Transformer(str(base)), Pooling(16)]
    torch.manual_seed(2)
    return st.SentenceTransformer(modules=[*modules, *([Dense(16, 8)] if dense else [])], device="cpu")


def embedded(model):
    return torch.tensor(model.eval().encode(TEXTS))


def patched(base, which, **kwargs):
    model = embedder(base, **kwargs)
    controller = l1ra.patch(PATCHED[which](model), 60)
    shake(model, 1.0)
    return model, controller


def reads_as(folder, model):
    expected = embedded(model)
    torch.testing.assert_close(embedded(st.SentenceTransformer(str(folder), device="cpu")), expected, rtol=0, atol=1e-5)
    for _, layer in find_adapters(model):
        layer.lora_B.data.zero_()
    assert (embedded(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["save_pretrained", "save"])
@pytest.mark.parametrize("which", PATCHED)
def test_a_saved_model_embeds_as_the_trained_one(which, method, base, tmp_path):
    model, _ = patched(base, which, dense=True)
    assert any("linear" in name for name, _ in find_adapters(model)) == (which == "whole")
    getattr(model, method)(str(tmp_path / "saved"))
    reads_as(tmp_path / "saved", model)


def test_a_saved_model_needs_no_folder_of_its_base(base, tmp_path):
    model, _ = patched(base, "inner")
    model.save_pretrained(str(tmp_path / "saved"))
    base.rename(tmp_path / "moved")
    reads_as(tmp_path / "saved", model)


def test_a_copy_and_a_merged_model_are_saved(base, tmp_path):
    model, _ = patched(base, "whole")
    twin = copy.deepcopy(model)
    shake(twin, 2.0)
    l1ra.merge(model)
    model.save_pretrained(str(tmp_path / "merged"))
    twin.save_pretrained(str(tmp_path / "twin"), safe_serialization=False)
    assert torch.equal(embedded(st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")), embedded(model))
    reads_as(tmp_path / "twin", twin)


def test_pushing_uploads_merged_weights(base, monkeypatch, tmp_path):
    model, _ = patched(base, "inner")

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **kwargs):
            assert "adapter_config.json" not in os.listdir(folder_path)
            reads_as(folder_path, model)
            return type("Info", (), {"commit_url": "x", "repo_url": "x", "pr_url": None})()

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    monkeypatch.setattr("sentence_transformers.base.model.HfApi", Api)
    monkeypatch.setattr(model, "_create_model_card", lambda *args: None)
    model.push_to_hub("somebody/something", replace_model_card=True)  # else it asks the hub for one


@pytest.mark.parametrize("which", PATCHED)
def test_a_cross_encoder_scores_as_the_trained_one(which, base, tmp_path):
    model = st.CrossEncoder(str(tmp_path / "cross"), device="cpu", max_length=16)
    l1ra.patch(PATCHED[which](model), 60)
    shake(model, 1.0)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])]
    expected = torch.tensor(model.predict(pairs))
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.CrossEncoder(str(tmp_path / "saved"), device="cpu", max_length=16)
    torch.testing.assert_close(torch.tensor(again.predict(pairs)), expected, rtol=0, atol=1e-5)
    for _, layer in find_adapters(model):
        layer.lora_B.data.zero_()
    assert (torch.tensor(model.predict(pairs)) - expected).abs().max() > 1e-3


def quantised(base):
    bnb = pytest.importorskip("bitsandbytes")
    model = embedder(base)
    layer = inner(model).encoder.layer[0].intermediate
    packed = bnb.nn.Linear4bit(16, 24, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(layer.dense.state_dict())
    layer.dense = packed.to("cpu")
    return model


def test_a_quantised_model_is_saved_as_a_lora(base, tmp_path):
    pytest.importorskip("peft")
    model = quantised(base)
    l1ra.patch(inner(model), 60)
    model.save_pretrained(str(tmp_path / "saved"))
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "saved")


def test_what_contains_a_quantised_model_is_refused_if_it_is_patched_as_a_whole(base, tmp_path):
    model = quantised(base)
    l1ra.patch(model, 60)
    with pytest.raises(TypeError, match=r"quantised .* patch the transformers model alone"):
        model.save_pretrained(str(tmp_path / "saved"))


def texts(count=48):
    return [" ".join(f"w{(k + 3 * j) % 45}" for j in range(6)) for k in range(count)]


def trained(base, folder, which, steps=12, resume=None, note=None, **settings):
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    model = embedder(base)
    controller = l1ra.patch(
        PATCHED[which](model), 26, target_modules=LEARNING, interval=3, warmup=0.0, min_interval=1, margin=1.0
    )
    data = Dataset.from_dict({"anchor": texts(), "positive": texts(49)[1:]})
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": steps, "seed": 5, **settings}
    args = st.SentenceTransformerTrainingArguments(**arguments(folder, **settings))
    trainer = st.SentenceTransformerTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data.select(range(16)),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[note(controller)] if note else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return controller, trainer


@pytest.mark.parametrize("which", PATCHED)
def test_its_trainer_resumes_bit_for_bit(which, base, tmp_path):
    whole, trainer = trained(base, tmp_path / "run", which)
    assert whole.moved > 0 and whole.steps == 12
    resumed, again = trained(base, tmp_path / "run", which, resume=str(tmp_path / "run" / "checkpoint-5"))
    assert as_lists(resumed.state_dict()) == as_lists(whole.state_dict())
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    assert "l1ra" not in os.listdir(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-12"):
        found = embedded(st.SentenceTransformer(str(folder), device="cpu"))
        torch.testing.assert_close(found, embedded(trainer.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", PATCHED)
def test_its_trainer_reads_the_best_checkpoint(which, base, tmp_path, caplog):
    from transformers import TrainerCallback

    states = {}

    class Note(TrainerCallback):
        def __init__(self, controller):
            self.mine = controller

        def on_save(self, args, state, control, **kwargs):
            states[state.global_step] = as_lists(self.mine.state_dict())

    # The greatest loss is the "best": that of the first checkpoint, before ranks have moved any further.
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "greater_is_better": True}
    with caplog.at_level(logging.ERROR):
        controller, trainer = trained(
            base, tmp_path, which, 10, note=Note, metric_for_best_model="loss", save_total_limit=5, **best
        )
    assert "Could not load the best model" not in caplog.text
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5") and states[5] != states[10]
    assert as_lists(controller.state_dict()) == states[5]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_nothing_else_of_a_module_changes(base):
    model = embedder(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    l1ra.patch(model, 60)
    l1ra.unpatch(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not [
        module for module in model.modules() if isinstance(module, nn.Module) and "save_pretrained" in vars(module)
    ]
