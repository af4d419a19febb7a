"""Plain LoRA written from adapters: PEFT computes the same from it."""

import copy
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    MLP,
    SIZES,
    Adapted,
    assert_untouched,
    bert,
    full,
    gpt2,
    little_room,
    llama,
    same_bits,
    shake,
    snapshot,
)
from peft_helpers import Cut, close, config_of, lively, loaded, logits, uneven
from torch import nn

import l1ra
from l1ra.files.peft_export import CONFIG, DIFFUSERS_WEIGHTS, PREFIX, WEIGHTS
from l1ra.layers.adapted_model import find_adapters

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


def changed(model):
    """Training has changed whatever is trained in full."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    return model


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("make", [MLP, llama, gpt2, bert])
def test_peft_computes_the_same_from_an_export(make, uniform, tmp_path):
    base = lively(make())
    model = uneven(copy.deepcopy(base))
    before, expected = snapshot(model), logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    assert l1ra.export_peft(model, tmp_path / "new" / "dir", uniform=uniform) == tmp_path / "new" / "dir"
    assert_untouched(model, before)
    assert sorted(p.name for p in (tmp_path / "new" / "dir").iterdir()) == [CONFIG, WEIGHTS]
    close(logits(loaded(base, tmp_path / "new" / "dir")), expected)


def test_live_ranks_alone_are_written_and_never_an_empty_one(tmp_path):
    model = uneven(lively(MLP()))
    l1ra.export_peft(model, tmp_path)
    shapes = {key: tuple(value.shape) for key, value in st.load_file(tmp_path / WEIGHTS).items()}
    assert [layer.rank for _, layer in find_adapters(model)] == [1, 2, 3]
    assert shapes == {
        "base_model.model.layers.0.lora_A.weight": (1, 6),
        "base_model.model.layers.0.lora_B.weight": (10, 1),
        "base_model.model.layers.1.lora_A.weight": (1, 10),
        "base_model.model.layers.1.lora_B.weight": (8, 1),
        "base_model.model.layers.2.lora_A.weight": (2, 8),
        "base_model.model.layers.2.lora_B.weight": (4, 2),
    }
    assert not st.load_file(tmp_path / WEIGHTS)["base_model.model.layers.1.lora_B.weight"].any()


def test_exports_of_one_given_rank_are_combined_and_swapped(tmp_path):
    """PEFT does neither with different ranks."""
    from peft.utils.hotswap import hotswap_adapter

    base = lively(llama())
    first, second = uneven(copy.deepcopy(base)), shake(uneven(copy.deepcopy(base)), 1.0)
    for model, name in ((first, "first"), (second, "second")):
        l1ra.export_peft(model, tmp_path / name, uniform=6)
    both = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", adapter_name="first")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    both.add_weighted_adapter(["first", "second"], [1.0, 0.0], "mix", combination_type="linear")
    both.set_adapter("mix")
    close(logits(both), logits(first))
    swapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    hotswap_adapter(swapped, tmp_path / "second", adapter_name="default")
    close(logits(swapped), logits(second))
    assert (logits(second) - logits(first)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("uniform", "error", "message"),
    [
        (2, ValueError, r"uniform=2, but layers\.2 has rank 3: write uniform=3 or more"),
        (0, ValueError, "write uniform=3 or more"),
        (2.5, TypeError, "uniform must be True, False or a rank, not 2.5"),
        ("yes", TypeError, "uniform must be True, False or a rank, not 'yes'"),
    ],
)
def test_a_rank_that_is_too_small_is_refused_with_the_layer(uniform, error, message, tmp_path):
    model = lively(MLP())
    l1ra.patch(model, 6).close()
    layers = [layer for _, layer in find_adapters(model)]
    layers[0].resize(full(1))
    layers[2].resize(full(2, 1))
    with pytest.raises(error, match=message):
        l1ra.export_peft(model, tmp_path / "lora", uniform=uniform)
    assert not (tmp_path / "lora").exists()
    l1ra.export_peft(model, tmp_path / "lora", uniform=3)


@pytest.mark.parametrize(("prefix", "start"), [("", ""), ("unet", "unet."), ("unet.", "unet.")])
def test_a_prefix_writes_diffusers_file_with_the_same_tensors(prefix, start, tmp_path):
    model = uneven(lively(MLP()))
    l1ra.export_peft(model, tmp_path / "peft")
    l1ra.export_peft(model, tmp_path / "diffusers", prefix=prefix)
    assert os.listdir(tmp_path / "diffusers") == [DIFFUSERS_WEIGHTS]
    ours, pefts = st.load_file(tmp_path / "diffusers" / DIFFUSERS_WEIGHTS), st.load_file(tmp_path / "peft" / WEIGHTS)
    assert {start + name.removeprefix(PREFIX) for name in pefts} == ours.keys()
    assert all(same_bits(ours[start + name.removeprefix(PREFIX)], value) for name, value in pefts.items())


def test_uniform_is_one_rank_and_one_scale_for_all(tmp_path):
    model = uneven(lively(llama()))
    l1ra.export_peft(model, tmp_path, uniform=True)
    config, tensors = config_of(tmp_path), st.load_file(tmp_path / WEIGHTS)
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == config["lora_alpha"] == 3
    assert {v.shape[0 if "lora_A" in key else 1] for key, v in tensors.items()} == {3}


def test_each_of_more_than_ten_layers_gets_its_own_rank(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = lively(LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 12})))
    model = uneven(copy.deepcopy(base))
    l1ra.export_peft(model, tmp_path)
    read = loaded(base, tmp_path)
    close(logits(read), logits(model))
    ranks = {name: int((layer.gate != 0).sum()) or 1 for name, layer in find_adapters(model)}
    assert {n: m.r["default"] for n, m in read.base_model.model.named_modules() if hasattr(m, "lora_A")} == ranks
    assert all(m.scaling == {"default": 1.0} for m in read.modules() if hasattr(m, "lora_A"))


class Twins(nn.Module):
    """Names of which one is the ending of another, and one that a dot in a regular expression would fit."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"up": nn.Linear(6, 6), "down": nn.Linear(6, 6)})
        self.block_down = nn.Linear(6, 6)

    def forward(self, x):
        for layer in (self.up, self.block["up"], self.block["down"], self.block_down):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("target_modules", ["all-linear", "up", r"up|block\.down", ["down"]])
def test_names_within_names_are_kept_apart(target_modules, tmp_path):
    base = lively(Twins())
    model = uneven(copy.deepcopy(base), target_modules=target_modules)
    l1ra.export_peft(model, tmp_path)
    read = loaded(copy.deepcopy(base), tmp_path)
    names = [n for n, m in read.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert names == [n for n, _ in find_adapters(model)]
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)
    controller = l1ra.from_peft(base, tmp_path)
    assert list(controller.ranks) == names
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-5)


class Heads(nn.Module):
    """A head that PEFT takes others for, by the ending of their names or the dot in its own."""

    def __init__(self):
        super().__init__()
        self.up, self.overhead, self.a_head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.a = nn.ModuleDict({"head": nn.Linear(6, 6)})

    def forward(self, x):
        for layer in (self.up, self.overhead, self.a_head, self.a["head"]):
            x = torch.tanh(layer(x))
        return x


def test_what_peft_takes_for_a_module_to_save_goes_along_or_is_refused(tmp_path):
    base = lively(Heads())
    base.head = nn.Linear(6, 6)
    model = uneven(copy.deepcopy(base), target_modules=["up"], modules_to_save=["head"])
    l1ra.export_peft(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["a.head", "a_head", "head", "overhead"]
    torch.testing.assert_close(logits(loaded(base, tmp_path)), logits(model), rtol=1e-5, atol=1e-5)
    for adapted in ("overhead", "a_head"):
        model = uneven(Heads(), target_modules=["up", adapted], modules_to_save=["a.head"])
        if adapted == "overhead":
            model.head = nn.Linear(6, 6)
        with pytest.raises(ValueError, match=f"PEFT would take the adapted {adapted} for it"):
            l1ra.export_peft(model, tmp_path)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-2), (torch.float32, 1e-5)])
def test_bf16_adapters_are_written_as_they_are_or_as_asked_for(dtype, tolerance, tmp_path):
    base = lively(llama())
    model = uneven(copy.deepcopy(base), adapter_dtype="bfloat16")
    l1ra.export_peft(model, tmp_path, dtype=dtype)
    assert {v.dtype for v in st.load_file(tmp_path / WEIGHTS).values()} == {dtype or torch.bfloat16}
    folded = st.load_file(tmp_path / WEIGHTS)
    for name, layer in find_adapters(model):
        if layer.gate.any():
            exact = (layer.lora_B.float() * (layer.scaling * layer.gate).unsqueeze(1))[layer.gate != 0].T
            assert same_bits(folded[f"base_model.model.{name}.lora_B.weight"], exact.to(dtype or torch.bfloat16))
    close(logits(loaded(base, tmp_path)), logits(model), tolerance)


@pytest.mark.parametrize("settings", [{"reserve": 6}, {"alpha": 7.0}, {"alpha": 3.0, "rank_stabilized": True}])
def test_reserved_rows_stay_behind_and_every_scaling_is_folded(settings, tmp_path):
    base = lively(llama())
    model = uneven(copy.deepcopy(base), **settings)
    l1ra.export_peft(model, tmp_path)
    ranks = {v.shape[0] for key, v in st.load_file(tmp_path / WEIGHTS).items() if "lora_A" in key}
    assert ranks == {1, 2, 3}
    close(logits(loaded(base, tmp_path)), logits(model))


def test_merged_adapters_are_written_too(tmp_path):
    base = lively(llama())
    model = uneven(copy.deepcopy(base))
    expected = logits(model)
    for _, layer in find_adapters(model):
        layer.merge()
    l1ra.export_peft(model, tmp_path)
    assert all(layer.merged for _, layer in find_adapters(model))
    close(logits(loaded(base, tmp_path)), expected)


@pytest.mark.parametrize(
    "make, named, saved",
    [
        (bert, None, ["classifier"]),
        (llama, ["layers.0.mlp"], [f"model.layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")]),
        (llama, ["norm", "layers.1.input_layernorm"], ["model.layers.1.input_layernorm", "model.norm"]),
        (gpt2, ["ln_f"], ["transformer.ln_f"]),
        (gpt2, ["wte"], ["lm_head", "transformer.wte"]),  # tied: PEFT would leave the head as it was
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_what_is_trained_in_full_goes_along(make, named, saved, tmp_path):
    base = lively(make())
    model = changed(uneven(copy.deepcopy(base), modules_to_save=named))
    l1ra.export_peft(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == saved
    close(logits(loaded(copy.deepcopy(base), tmp_path)), logits(model))
    l1ra.from_peft(base, tmp_path)
    close(logits(base), logits(model))
    flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (base, model)]
    assert flags[0] == flags[1]


def test_an_adapted_head_is_not_taken_for_one_trained_in_full(tmp_path):
    base = lively(bert())
    model = uneven(copy.deepcopy(base), modules_to_save=[])
    l1ra.export_peft(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] is None
    close(logits(loaded(base, tmp_path)), logits(model))


def test_a_frozen_fresh_head_goes_along(tmp_path):
    model = uneven(lively(bert())).requires_grad_(False)
    l1ra.export_peft(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier"]


def test_a_model_of_ones_own_and_a_wrapped_one(tmp_path):
    model = shake(Adapted())
    l1ra.export_peft(model, tmp_path / "own")
    plain = nn.Module()
    plain.up, plain.down = model.up.base_layer, model.down.base_layer
    plain.forward = lambda x: plain.down(torch.tanh(plain.up(x)))
    close(logits(loaded(plain, tmp_path / "own")), logits(model))
    model.up = torch.compile(model.up)
    l1ra.export_peft(torch.compile(model), tmp_path / "compiled")
    assert config_of(tmp_path / "compiled") == config_of(tmp_path / "own")
    assert (tmp_path / "compiled" / WEIGHTS).read_bytes() == (tmp_path / "own" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("make, task", [(llama, "CAUSAL_LM"), (gpt2, "CAUSAL_LM"), (bert, "SEQ_CLS"), (MLP, None)])
def test_peft_reads_the_settings_as_its_own(make, task, tmp_path):
    model = uneven(lively(make()))
    l1ra.export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(config) is peft.LoraConfig and config.inference_mode and config.task_type == task
    assert config.fan_in_fan_out is (make is gpt2)
    assert set(config.target_modules) == {name for name, _ in find_adapters(model)}


@pytest.mark.parametrize("at", ["weights", "settings"])
def test_an_interrupted_export_leaves_the_old_adapter_as_it_was(at, tmp_path, monkeypatch):
    model = uneven(lively(MLP()))
    l1ra.export_peft(model, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changed(model)

    def half(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise Cut

    def cut(*args, **kwargs):
        raise Cut

    monkeypatch.setattr(*((st, "save_file", half) if at == "weights" else (json, "dumps", cut)))
    with pytest.raises(Cut):
        l1ra.export_peft(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    monkeypatch.undo()
    l1ra.export_peft(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() != old[WEIGHTS]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_an_export_onto_a_full_disk_says_where_and_leaves_the_old_adapter_as_it_was(tmp_path):
    model = uneven(lively(MLP()))
    l1ra.export_peft(model, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changed(model)
    for room in (0, len(old[WEIGHTS]) - 1):
        with little_room(room), pytest.raises(OSError, match=str(tmp_path)):
            l1ra.export_peft(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


@pytest.mark.parametrize("onto", ["nothing", "an older adapter"])
def test_an_export_that_is_killed_leaves_the_old_adapter_or_none(onto, tmp_path, monkeypatch):
    base = lively(MLP())
    directory = tmp_path / "adapter"
    if onto == "an older adapter":
        old = uneven(copy.deepcopy(base), alpha=2.0)
        l1ra.export_peft(old, directory)
    left, replace, unlink = [], os.replace, Path.unlink

    def noted(works):
        def noting(*args, **kwargs):
            left.append(shutil.copytree(directory, tmp_path / f"left {len(left)}"))  # what a kill would leave here
            return works(*args, **kwargs)

        return noting

    monkeypatch.setattr(os, "replace", noted(replace))
    monkeypatch.setattr(Path, "unlink", noted(unlink))
    model = uneven(copy.deepcopy(base))
    l1ra.export_peft(model, directory)
    monkeypatch.undo()
    found = []
    for state in left:
        if (state / CONFIG).exists():
            read = logits(loaded(copy.deepcopy(base), state))
            found.append("new" if torch.allclose(read, logits(model), atol=1e-5) else "old")
            if found[-1] == "old":
                close(read, logits(old))
        else:
            with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}"):
                l1ra.from_peft(copy.deepcopy(base), state)
            with pytest.raises(ValueError, match="Can't find"):
                peft.PeftModel.from_pretrained(copy.deepcopy(base), state)
            found.append("none")
    assert list(dict.fromkeys(found)) == (["none", "new"] if onto == "nothing" else ["old", "none", "new"])


def test_what_a_plain_lora_can_not_say_is_refused(tmp_path):
    def refused(model, message):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            l1ra.export_peft(model, tmp_path / "never")
        assert_untouched(model, before)
        assert not (tmp_path / "never").exists()

    refused(MLP(), r"call l1ra\.patch\(model, budget")
    model = uneven(MLP())
    model.layers[0].base_layer.bias.requires_grad_(True)
    refused(model, r"layers\.0\.base_layer is trained beside its adapter")
    model = uneven(MLP())
    model.layers.shift = nn.Parameter(torch.zeros(3))
    refused(model, "layers has parameters of its own")
    model.layers.shift, model.shift = None, nn.Parameter(torch.zeros(3))
    refused(model, "the model itself has parameters")
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    l1ra.patch(model, 2)
    refused(model, "a is shared between parents")
