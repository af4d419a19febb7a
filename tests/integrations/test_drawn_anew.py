"""Weights that the pretrained checkpoint does not have: whoever loads what was saved gets the trained model."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft_helpers import lively
from torch import nn
from trainer_helpers import arguments, labelled
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerModel,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
    YolosConfig,
    YolosForObjectDetection,
    YolosModel,
)

import l1ra
from l1ra.layers.adapted_model import find_adapters, frozen_and_drawn_anew
from l1ra.model.drawn_anew import drawn_anew

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 does not tell what it has drawn anew"
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 50, "max_position_embeddings": 32, **SIZES}
SPEECH = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
STAGES = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1]}
IDS = {"input_ids": torch.arange(20).reshape(2, 10)}
# The pretrained model, the model made from its checkpoint, the input, the modules that are trained in full.
FRESH = {
    "pooler": (
        lambda: BertForMaskedLM(BertConfig(**TEXT)),
        BertForSequenceClassification,
        IDS,
        {"bert.pooler", "classifier"},
    ),
    "deberta": (
        lambda: DebertaV2Model(DebertaV2Config(**TEXT, type_vocab_size=0, pooler_hidden_size=16)),
        DebertaV2ForSequenceClassification,
        IDS,
        {"pooler", "classifier"},
    ),
    "masked": (lambda: BertModel(BertConfig(**TEXT)), BertForMaskedLM, IDS, {"cls.predictions.transform"}),
    "answers": (lambda: BertModel(BertConfig(**TEXT)), BertForQuestionAnswering, IDS, {"qa_outputs"}),
    "no head": (
        lambda: LlamaModel(LlamaConfig(**TEXT, num_key_value_heads=2)),
        LlamaForCausalLM,
        IDS,
        {"lm_head"},
    ),
    "speech": (
        lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES, **SPEECH)),
        Wav2Vec2ForSequenceClassification,
        {"input_values": torch.randn(2, 80, generator=torch.Generator().manual_seed(0))},
        {"projector", "classifier"},
    ),
    "segments": (
        lambda: SegformerModel(SegformerConfig(**STAGES, decoder_hidden_size=8)),
        SegformerForSemanticSegmentation,
        {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
        {"decode_head"},
    ),
    "boxes": (
        lambda: YolosModel(YolosConfig(**SIZES, image_size=[32, 32], num_detection_tokens=4)),
        YolosForObjectDetection,
        {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
        {"class_labels_classifier", "bbox_predictor"},
    ),
}


def checkpoint_of(base, path):
    """Saves a pretrained model; returns a function that loads it as another class, with other random numbers each
    time."""
    lively(base).save_pretrained(path)
    seeds = iter(range(100))

    def load(cls, **kwargs):
        torch.manual_seed(next(seeds))
        return cls.from_pretrained(path, **kwargs).eval()

    return load


def trainable(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def outputs(model, inputs):
    with torch.no_grad():
        return next(iter(model.eval()(**inputs).values()))


def patched(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        controller = l1ra.patch(model, 400, total_steps=100, **settings)
    with torch.no_grad():
        for _, layer in find_adapters(model):
            layer.lora_B.normal_(0, 0.1)
    return controller


def assert_all_readers_get(want, inputs, make, model, controller, path):
    """PEFT, transformers, ``l1ra.load`` and ``l1ra.from_peft``, from a base that was loaded anew."""
    model.save_pretrained(path / "lora")
    controller.save(path / "own")
    loaded, imported = make(), make()
    l1ra.load(loaded, path / "own")
    l1ra.from_peft(imported, path / "lora")
    readers = [loaded, imported, peft.PeftModel.from_pretrained(make(), path / "lora")]
    if "adapter_attn_dim" not in vars(model.config):  # Wav2Vec2's load_adapter is of adapters of its own
        readers.append(type(model).from_pretrained(path / "lora"))
    for reader in readers:
        torch.testing.assert_close(outputs(reader, inputs), want, atol=1e-5, rtol=1e-5)
    assert trainable(loaded) == trainable(model)
    imported.save_pretrained(path / "again")
    again = peft.PeftModel.from_pretrained(make(), path / "again")
    torch.testing.assert_close(outputs(again, inputs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FRESH)
def test_what_was_drawn_anew_is_trained_in_full_and_saved(kind, tmp_path):
    base, cls, inputs, new = FRESH[kind]
    load = checkpoint_of(base(), tmp_path / "base")
    make = lambda: load(cls)  # noqa: E731
    assert not torch.equal(outputs(make(), inputs), outputs(make(), inputs))  # the test can fail
    model = make()
    controller = patched(model)
    names = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in names if name not in controller.adapters}
    assert all(any(f"{name}.".startswith(f"{module}.") for module in new) for name in heads)
    assert {module for module in new if any(f"{name}.".startswith(f"{module}.") for name in heads)} == new
    assert_all_readers_get(outputs(model, inputs), inputs, make, model, controller, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": []}, {"modules_to_save": ["classifier"]}, {"target_modules": ["query", "dense"]}],
)
def test_what_stays_frozen_or_is_adapted_is_saved_too(settings, tmp_path):
    load = checkpoint_of(BertForMaskedLM(BertConfig(**TEXT)), tmp_path / "base")
    make = lambda: load(BertForSequenceClassification)  # noqa: E731
    model = make()
    controller = patched(model, **settings)
    assert {"bert.pooler.dense.base_layer.weight", "bert.pooler.dense.base_layer.bias"} <= set(
        frozen_and_drawn_anew(model)
    )
    assert_all_readers_get(outputs(model, IDS), IDS, make, model, controller, tmp_path)
    assert frozen_and_drawn_anew(copy.deepcopy(model)).keys() == frozen_and_drawn_anew(model).keys()
    l1ra.unpatch(model)
    assert not frozen_and_drawn_anew(model)


def test_a_head_of_another_size_is_drawn_anew(tmp_path):
    load = checkpoint_of(BertForSequenceClassification(BertConfig(**TEXT, num_labels=2)), tmp_path / "base")
    model = load(BertForSequenceClassification, num_labels=5, ignore_mismatched_sizes=True)
    assert set(drawn_anew(model)) == {"classifier.weight", "classifier.bias"}


def test_cross_attention_that_two_pretrained_models_never_had_stays_adapted_and_is_saved(tmp_path):
    checkpoint_of(BertForMaskedLM(BertConfig(**TEXT)), tmp_path / "base")
    seeds = iter(range(9))

    def make():
        torch.manual_seed(next(seeds))
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path / "base"), str(tmp_path / "base"))
        return model.eval()

    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"]}
    assert not torch.equal(outputs(make(), inputs), outputs(make(), inputs))
    model = make()
    controller = patched(model)
    want = outputs(model, inputs)
    controller.save(tmp_path / "own")
    l1ra.export_peft(model, tmp_path / "lora")
    other = make()
    l1ra.load(other, tmp_path / "own")
    for reader in (other, peft.PeftModel.from_pretrained(make(), tmp_path / "lora")):
        torch.testing.assert_close(outputs(reader, inputs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_with_new_tokens_are_saved_and_stay_frozen(tied, tmp_path):
    config = LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=tied)
    load = checkpoint_of(LlamaForCausalLM(config), tmp_path / "base")

    def make():
        model = load(LlamaForCausalLM)
        model.resize_token_embeddings(56)
        with torch.no_grad():
            model.get_input_embeddings().weight[50:].normal_()
        return model

    inputs = {"input_ids": torch.arange(40, 56)[None]}
    model = make()
    controller = patched(model)
    assert trainable(model) == {f"{n}.{p}" for n in controller.adapters for p in ("lora_A", "gate", "lora_B")}
    want = outputs(model, inputs)
    model.save_pretrained(tmp_path / "lora")
    controller.save(tmp_path / "own")
    loaded, imported = make(), make()
    l1ra.load(loaded, tmp_path / "own")
    l1ra.from_peft(imported, tmp_path / "lora")
    for reader in (loaded, imported, peft.PeftModel.from_pretrained(make(), tmp_path / "lora")):
        torch.testing.assert_close(outputs(reader, inputs), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(56\) first"):
        l1ra.from_peft(load(LlamaForCausalLM), tmp_path / "lora")


def test_a_trainer_that_resumes_has_the_weights_that_were_drawn_anew(tmp_path):
    """In a process that draws other random numbers."""
    load = checkpoint_of(BertForMaskedLM(BertConfig(**TEXT)), tmp_path / "base")

    def train(resume=None):
        model = load(BertForSequenceClassification, num_labels=3)
        l1ra.patch(model, 30, modules_to_save=[], interval=3, min_interval=3, warmup=0.0)
        args = TrainingArguments(**arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=6, seed=5))
        Trainer(model, args, train_dataset=labelled()).train(resume_from_checkpoint=resume)
        return outputs(model, IDS)

    whole = train()
    resumed = train(str(tmp_path / "checkpoint-6"))
    assert torch.equal(whole, resumed)


def test_a_model_that_was_not_loaded_has_nothing_drawn_anew():
    assert not drawn_anew(BertForSequenceClassification(BertConfig(**TEXT)))


def test_parameters_that_were_replaced_after_loading_are_not_taken_for_new(tmp_path):
    load = checkpoint_of(BertModel(BertConfig(**TEXT)), tmp_path / "base")
    model = load(BertForSequenceClassification)
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    assert set(drawn_anew(model)) == set()


class WithHead(nn.Module):
    def __init__(self, bert, trained):
        super().__init__()
        self.bert, self.trained, self.head = bert, trained, nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.head(self.bert(input_ids).last_hidden_state[:, 0])


def test_weights_beside_a_pretrained_model_are_named(tmp_path):
    load = checkpoint_of(BertModel(BertConfig(**TEXT)), tmp_path / "base")
    make = lambda: WithHead(load(BertModel), nn.LayerNorm(16))  # noqa: E731
    with pytest.warns(UserWarning, match=r"head, trained are outside .* modules_to_save=\['head', 'trained'\]"):
        l1ra.patch(make(), 100)
    with pytest.warns(UserWarning, match=r"trained is outside .* modules_to_save=\['head', 'trained'\]"):
        l1ra.patch(make(), 100, modules_to_save=["head"])
    model = make()
    model.scale = nn.Parameter(torch.rand(3))
    with pytest.warns(UserWarning, match=r"scale is outside .* model\.scale\.requires_grad_\(True\) after l1ra.patch"):
        l1ra.patch(model, 100, modules_to_save=["head", "trained"])
    for modules_to_save in (["head", "trained"], []):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            controller = l1ra.patch(make(), 100, modules_to_save=modules_to_save)
        assert ("head" in controller.adapters) == (not modules_to_save)


def test_a_checkpoint_from_before_frozen_weights_were_noted_is_read(tmp_path):
    from l1ra.files import checkpoint

    load = checkpoint_of(BertModel(BertConfig(**TEXT)), tmp_path / "base")
    model = load(BertForSequenceClassification)
    controller = patched(model)
    controller.save(tmp_path / "own")
    index = json.loads((tmp_path / "own" / "l1ra.json").read_text())
    del index["frozen"], index["sha256"]
    index["sha256"] = checkpoint._digest(index)
    (tmp_path / "own" / "l1ra.json").write_text(json.dumps(index))
    other = load(BertForSequenceClassification)
    l1ra.load(other, tmp_path / "own")
    assert torch.equal(outputs(other, IDS), outputs(model, IDS)) and trainable(other) == trainable(model)


def test_more_than_half_of_a_model_may_be_new(tmp_path):
    """A larger vocabulary, with which the embeddings are drawn anew, and a head."""
    load = checkpoint_of(BertForMaskedLM(BertConfig(**TEXT)), tmp_path / "base")
    make = lambda: load(BertForSequenceClassification, vocab_size=2000, ignore_mismatched_sizes=True)  # noqa: E731
    model = make()
    assert model.get_input_embeddings().weight.numel() > sum(p.numel() for p in model.parameters()) / 2
    controller = patched(model)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= trainable(model)
    want = outputs(model, IDS)
    model.save_pretrained(tmp_path / "lora")
    controller.save(tmp_path / "own")
    other = make()
    l1ra.load(other, tmp_path / "own")
    for reader in (other, peft.PeftModel.from_pretrained(make(), tmp_path / "lora")):
        torch.testing.assert_close(outputs(reader, IDS), want, atol=1e-5, rtol=1e-5)


def test_moving_statistics_of_a_frozen_normalisation_are_saved(tmp_path):
    base = SegformerForSemanticSegmentation(SegformerConfig(**STAGES, decoder_hidden_size=8, num_labels=2))
    load = checkpoint_of(base, tmp_path / "base")
    make = lambda: load(SegformerForSemanticSegmentation, num_labels=3, ignore_mismatched_sizes=True)  # noqa: E731
    model = make()
    controller = patched(model)
    assert "decode_head.batch_norm.weight" not in trainable(model)
    inputs = FRESH["segments"][2]
    model.train()
    model(**inputs)
    want = outputs(model, inputs)
    model.save_pretrained(tmp_path / "lora")
    controller.save(tmp_path / "own")
    loaded, imported = make(), make()
    l1ra.load(loaded, tmp_path / "own")
    l1ra.from_peft(imported, tmp_path / "lora")
    for reader in (loaded, imported, peft.PeftModel.from_pretrained(make(), tmp_path / "lora")):
        torch.testing.assert_close(outputs(reader, inputs), want, atol=1e-5, rtol=1e-5)
