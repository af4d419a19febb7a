"""Parts, containers and copies of patched models: what is saved loads as what was trained."""

import copy
import os
import pickle
import warnings

import pytest
import torch
from helpers import bert, gpt2, llama, same_bits, shake, tokens
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import livelier
from transformers import AutoModel, EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel

import l1ra
from l1ra.layers.adapted_model import find_adapters


class Wrapper(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or bert().bert
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.inner(ids).last_hidden_state)


class OnTheHub(Wrapper, PyTorchModelHubMixin):
    pass


class ValueHead(nn.Module):
    """As TRL's: it passes its own state dict to the method of the model inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.v_head = nn.Linear(16, 1)

    def save_pretrained(self, folder):
        state = self.inner.state_dict()
        state |= {f"v_head.{name}": value for name, value in self.v_head.state_dict().items()}
        return self.inner.save_pretrained(folder, state_dict=state)


class Container(PreTrainedModel):
    config_class, _supports_sdpa = type(bert().config), True

    def __init__(self, config):
        super().__init__(config)
        self.inner = Wrapper()
        self.post_init()

    def forward(self, ids):
        return self.inner(ids)


class OwnSave(type(llama())):
    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        open(os.path.join(folder, "extra.txt"), "w").close()


def encoder_decoder():
    halves = [bert().config, bert().config]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    config.decoder_start_token_id = config.pad_token_id = 0
    return EncoderDecoderModel(config)


@torch.no_grad()
def computed(model):
    model.eval()
    ids = tokens()
    if isinstance(model, EncoderDecoderModel):
        return model(input_ids=ids, decoder_input_ids=ids).logits
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


# What is patched and what is saved, of a fresh model.
PAIRS = {
    "a part of a module": (Wrapper, lambda m: m, lambda m: m.inner),
    "a part of a transformers model": (llama, lambda m: m, lambda m: m.model),
    "a part with Conv1D": (gpt2, lambda m: m, lambda m: m.transformer),
    "an encoder": (encoder_decoder, lambda m: m, lambda m: m.encoder),
    "a decoder": (encoder_decoder, lambda m: m, lambda m: m.decoder),
    "around an encoder": (encoder_decoder, lambda m: m.encoder, lambda m: m),
    "around a part with a name": (lambda: Container(bert().config), lambda m: m.inner.inner, lambda m: m),
    "around a plain part": (lambda: Container(bert().config), lambda m: m.inner, lambda m: m),
    "a module on the hub": (OnTheHub, lambda m: m, lambda m: m),
    "around it, on the hub": (OnTheHub, lambda m: m.inner, lambda m: m),
    "one with a method of its own": (lambda: OwnSave(llama().config), lambda m: m, lambda m: m),
}


def patched(pair, **kwargs):
    make, inner, outer = PAIRS[pair]
    model = livelier(make())
    controller = l1ra.patch(inner(model), 60, **kwargs)
    shake(model, 1.0)
    return model, outer(model), controller


def again(saved, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = type(saved).from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_saved_loads_as_what_was_trained(pair, tmp_path):
    model, saved, _ = patched(pair)
    expected, before = computed(saved), {name: value.clone() for name, value in model.state_dict().items()}
    saved.save_pretrained(tmp_path)
    torch.testing.assert_close(computed(again(saved, tmp_path)), expected, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(after[name], value) for name, value in before.items())
    for _, layer in find_adapters(model):  # else the test would show nothing
        layer.lora_B.data.zero_()
    assert (computed(saved) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("pair", PAIRS)
def test_after_a_merge_plain_weights_are_saved(pair, tmp_path):
    model, saved, _ = patched(pair)
    l1ra.merge(model)
    expected = computed(saved)
    saved.save_pretrained(tmp_path)
    torch.testing.assert_close(computed(again(saved, tmp_path)), expected, rtol=0, atol=0)


def test_a_patched_model_that_is_merged_saves_its_weights_and_then_a_lora_again(tmp_path):
    model = livelier(llama())
    l1ra.patch(model, 28)
    shake(model, 1.0)
    l1ra.merge(model)
    model.save_pretrained(tmp_path / "merged", max_shard_size="5KB")
    files = os.listdir(tmp_path / "merged")
    assert "model.safetensors.index.json" in files and "config.json" in files and "adapter_config.json" not in files
    assert torch.equal(computed(again(model, tmp_path / "merged")), computed(model))
    l1ra.unmerge(model)
    model.save_pretrained(tmp_path / "lora")
    assert set(os.listdir(tmp_path / "lora")) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("options", [{"max_shard_size": "3KB"}, {"variant": "mine"}, {"save_original_format": False}])
def test_the_options_of_the_class_are_those_of_a_part(options, tmp_path):
    _, saved, _ = patched("a part of a module")
    saved.save_pretrained(tmp_path, **options)
    loaded = AutoModel.from_pretrained(tmp_path, variant=options.get("variant"))
    torch.testing.assert_close(computed(loaded), computed(saved), rtol=1e-4, atol=1e-5)
    assert (len(os.listdir(tmp_path)) > 4) == ("max_shard_size" in options)


def test_a_part_in_16_bits_is_rounded_once_as_by_merge(tmp_path):
    model, saved, _ = patched("a part of a module")
    model.to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    l1ra.merge(model)
    held = load_file(tmp_path / "model.safetensors")
    assert all(
        same_bits(held[f"{name.removeprefix('inner.')}.weight"], layer.weight)
        for name, layer in find_adapters(model)
        if name.startswith("inner.")
    )


def test_a_trained_bias_beside_an_adapter_is_in_the_weights(tmp_path):
    _, saved, _ = patched("a part of a module")
    layer = next(find_adapters(saved))[1]
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
    saved.save_pretrained(tmp_path)
    torch.testing.assert_close(computed(again(saved, tmp_path)), computed(saved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_its_own_adapters(copied, tmp_path):
    model, saved, _ = patched("a part of a module")
    twin = copied(model)
    shake(twin, 2.0)
    twin.inner.save_pretrained(tmp_path / "twin")
    saved.save_pretrained(tmp_path / "model")
    assert not torch.allclose(computed(twin.inner), computed(saved), atol=1e-2)
    for part, name in ((twin.inner, "twin"), (saved, "model")):
        torch.testing.assert_close(computed(again(part, tmp_path / name)), computed(part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_an_unpatched_part_saves_as_it_computes(merge, tmp_path):
    model, saved, _ = patched("a part of a module")
    l1ra.unpatch(model, merge=merge)
    assert "save_pretrained" not in vars(saved)
    saved.save_pretrained(tmp_path)
    assert torch.equal(computed(again(saved, tmp_path)), computed(saved))


def test_a_method_that_others_gave_the_model_is_kept(tmp_path):
    model = livelier(llama())

    def save_pretrained(folder):
        type(model).save_pretrained(model, folder)

    model.save_pretrained = save_pretrained
    l1ra.patch(model, 28)
    shake(model, 1.0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(computed(again(model, tmp_path)), computed(model), rtol=1e-4, atol=1e-5)
    l1ra.unpatch(model)
    assert model.save_pretrained is save_pretrained


def test_a_value_head_is_saved_with_the_model_that_is_patched(tmp_path):
    model = ValueHead(livelier(llama()))
    l1ra.patch(model.inner, 28)
    shake(model, 1.0)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["v_head.weight"], model.v_head.weight)
    assert not [name for name in held if "base_layer" in name or "lora" in name]
    torch.testing.assert_close(computed(again(model.inner, tmp_path)), computed(model.inner), rtol=1e-4, atol=1e-5)


def test_pushing_a_part_uploads_its_weights(tmp_path, monkeypatch):
    _, saved, _ = patched("a module on the hub")
    uploaded = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **kwargs):
            uploaded.update(load_file(os.path.join(folder_path, "model.safetensors")))

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    saved.push_to_hub("somebody/something")
    assert uploaded.keys() == OnTheHub().state_dict().keys()


def test_a_state_dict_is_that_of_the_patched_model(tmp_path):
    """Also one that a user saves in a function of this name, which has no reader."""
    model, _, _ = patched("a part of a module")

    def save_pretrained(model, folder):
        torch.save(model.state_dict(), folder / "own.pt")

    save_pretrained(model, tmp_path)
    fresh = Wrapper()
    l1ra.patch(fresh, 60)
    fresh.load_state_dict(torch.load(tmp_path / "own.pt"))
    assert torch.equal(computed(fresh), computed(model))


def quantised():
    bnb = pytest.importorskip("bitsandbytes")
    model = livelier(Wrapper())
    for layer in model.inner.encoder.layer:
        dense = layer.intermediate.dense
        packed = bnb.nn.Linear4bit(16, 24, quant_type="nf4", compute_dtype=torch.float32)
        packed.load_state_dict(dense.state_dict())
        layer.intermediate.dense = packed.to("cpu")
    return model


def test_a_quantised_part_is_refused_by_name(tmp_path):
    model = quantised()
    l1ra.patch(model, 60)
    with pytest.raises(TypeError, match=r"encoder.layer.0.intermediate.dense can't be saved .* quantised.*export_peft"):
        model.inner.save_pretrained(tmp_path)


def test_a_quantised_model_in_a_container_writes_a_lora(tmp_path):
    class Pipeline:
        def __init__(self, model):
            self.model = model

        def save_pretrained(self, folder):
            self.model.save_pretrained(folder)

    model = quantised()
    l1ra.patch(model.inner, 60)
    Pipeline(model.inner).save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_weight_on_the_meta_device_is_refused(tmp_path):
    _, saved, _ = patched("a part of a module")
    layer = next(find_adapters(saved))[1]
    layer.base_layer.weight = nn.Parameter(torch.empty(16, 16, device="meta"), requires_grad=False)
    with pytest.raises(TypeError, match="can't be saved as a plain weight: its weight is on the meta device"):
        saved.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="can't be merged: its weight is on the meta device"):
        l1ra.merge(saved)
