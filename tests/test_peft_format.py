"""Plain LoRA in PEFT's files: PEFT itself computes the same from them, and so do adapters read from PEFT's own."""

import copy
import json
import math
import warnings

import pytest
import torch
from helpers import MLP, SIZES, Adapted, assert_untouched, bert, full, gpt2, llama, same_bits, shake, snapshot, tokens
from torch import nn

import l1ra
from l1ra import L1RALinear, RankController
from l1ra.linear import find_adapters
from l1ra.peft_format import CONFIG, WEIGHTS

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


def logits(model):
    reads_tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    x = tokens() if reads_tokens else torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def lively(model):
    """Weights that are not tiny, so that a wrong scale shows."""
    torch.manual_seed(5)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    return model.eval()


def uneven(model, **settings):
    """Patched: ranks 1, 2, 3, ..., gates from 1.4 to -0.7, some of them 0, and an adapter whose gates are all 0."""
    controller = l1ra.patch(
        model, 4 * sum(1 for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")), **settings
    )
    controller.close()
    for i, (_, layer) in enumerate(find_adapters(model)):
        layer.resize(full(min(layer.rank, 1 + i % 4), 0))
    for i, (_, layer) in enumerate(find_adapters(shake(model))):
        with torch.no_grad():
            layer.gate[: layer.rank] = torch.linspace(1.4, -0.7, layer.rank).masked_fill(
                torch.arange(layer.rank) == 2, 0
            )
            if i == 1:
                layer.gate.zero_()
    return model


def loaded(base, directory):
    """What PEFT makes of it; a missing or unexpected tensor, which PEFT only warns of, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|not found|unexpected).*")
        return peft.PeftModel.from_pretrained(base, directory).eval()


def close(a, b, tolerance=1e-5):
    assert a.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())


def put(directory, tensors=None, **settings):
    """Change what the directory holds; None takes a tensor away."""
    if tensors:
        kept = {**st.load_file(directory / WEIGHTS), **tensors}
        st.save_file({key: value for key, value in kept.items() if value is not None}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({**config_of(directory), **settings}))


# --- export


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


def changed(model):
    """Training has changed whatever is trained in full."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    return model


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


class Cut(Exception):
    pass


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


# --- from_peft


def saved_by_peft(base, directory, **settings):
    """What PEFT saves of a LoRA on a copy of ``base`` with a B that matters."""
    kwargs = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], **settings}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**kwargs))
    torch.manual_seed(6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or (p.requires_grad and "lora_" not in name):
                p.normal_(0, 0.3)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize(
    "make, settings",
    [
        (llama, {}),
        (llama, {"use_rslora": True}),
        (
            llama,
            {
                "rank_pattern": {"up_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 4},
                "alpha_pattern": {"q_proj": 9},
            },
        ),
        (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        (llama, {"target_modules": r".*\.1\..*_proj", "exclude_modules": ["up_proj"], "modules_to_save": ["lm_head"]}),
        (llama, {"layers_to_transform": [1], "lora_dropout": 0.1, "init_lora_weights": "gaussian"}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        (MLP, {"target_modules": ["0", "2"]}),
    ],
)
def test_the_model_computes_what_it_does_with_the_lora_in_peft(make, settings, tmp_path):
    base = lively(make())
    plain = saved_by_peft(base, tmp_path, **settings)
    expected = logits(plain)
    assert (expected - logits(base)).abs().max() > 0.01
    controller = l1ra.from_peft(base, tmp_path, total_steps=100)
    close(logits(base), expected)
    ranks = {n: m.r["default"] for n, m in plain.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert controller.ranks == controller.initial_ranks == ranks
    assert controller.budget == sum(ranks.values()) and controller.spare == 0 and controller.total_steps == 100
    assert controller.history[0]["ranks"] == ranks
    assert all((layer.gate == 1).all() and layer.initial_rank == layer.rank for _, layer in find_adapters(base))
    trained = {name.replace(".default", "") for name, p in plain.base_model.model.named_parameters() if p.requires_grad}
    mine = {name for name, p in base.named_parameters() if p.requires_grad and not name.endswith("gate")}
    assert mine == {
        name.removesuffix(".weight") if ".lora_" in name else name.replace(".modules_to_save", "") for name in trained
    }
    l1ra.export_peft(base, tmp_path / "again")
    close(logits(loaded(lively(make()), tmp_path / "again")), expected)


@pytest.mark.parametrize("uniform", [False, True])
def test_an_export_comes_back_at_its_ranks(uniform, tmp_path):
    base = lively(llama())
    model = uneven(copy.deepcopy(base))
    l1ra.export_peft(model, tmp_path, uniform=uniform)
    controller = l1ra.from_peft(base, tmp_path)
    live = {name: int((layer.gate != 0).sum()) or 1 for name, layer in find_adapters(model)}
    assert controller.ranks == live
    close(logits(base), logits(model))
    assert all(layer.lora_A.any(1).all() for _, layer in find_adapters(base))  # no rank without a gradient


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 8.0},
        {"alpha": 8.0, "rank_stabilized": True},
        {"reserve": 6},
        {"adapter_dtype": "float64"},
        {"budget_unit": "params", "rule": "l1"},
        {"min_rank": 3, "max_rank": 3},
    ],
)
def test_settings_hold_and_do_not_change_the_function(settings, tmp_path):
    base = lively(llama())
    expected = logits(saved_by_peft(base, tmp_path))
    controller = l1ra.from_peft(base, tmp_path, **settings)
    close(logits(base), expected)
    assert all(getattr(controller.config, name) == value for name, value in settings.items())
    layer = next(iter(controller.adapters.values()))
    scaling = settings.get("alpha", 3.0) / (math.sqrt(3) if "rank_stabilized" in settings else 3)
    assert layer.scaling == scaling and layer.reserve == settings.get("reserve")
    assert controller.spare == 0


def test_it_trains_on_ranks_move_and_it_can_be_taken_out(tmp_path):
    base = lively(llama())
    before, plain = snapshot(base), logits(base)
    saved_by_peft(base, tmp_path)
    controller = l1ra.from_peft(base, tmp_path, 16, total_steps=20, interval=4, warmup=0.0, margin=1.0)
    assert controller.budget == 16 and controller.spare == 4
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        base(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.steps == 12 and controller.moved > 0 and sum(controller.ranks.values()) <= 16
    l1ra.unpatch(base)
    assert_untouched(base, before)
    assert same_bits(logits(base), plain)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    "tensors, settings, message",
    [
        ({}, {"peft_type": "IA3"}, "type 'IA3': only 'LORA'"),
        ({}, {"use_dora": True}, "use_dora=True can't be read"),
        ({}, {"bias": "lora_only"}, "bias='lora_only' can't be read"),
        ({}, {"lora_bias": True}, "lora_bias=True can't be read"),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' can't be read"),
        ({}, {"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3 can't be read"),
        ({A: None}, {}, "q_proj has a lora_B without its other half"),
        ({A: None, B: None}, {}, r"missing from .*: model\.layers\.0\.self_attn\.q_proj\."),
        ({HEAD: None}, {}, r"modules_to_save, tensors are missing from .*: lm_head\.weight"),
        ({}, {"modules_to_save": None}, r"modules_to_save, tensors are surplus in .*: lm_head\.weight"),
        ({}, {"target_modules": ["up_proj"]}, "target_modules, tensors are surplus in"),
        ({"base_model.model.model.norm.weight": torch.ones(16)}, {}, r"surplus in .*: model\.norm\.weight"),
        ({"model.norm.weight": torch.ones(16)}, {}, r"model\.norm\.weight, which is no part"),
        (
            {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)},
            {},
            "magnitude_vector, which is no part",
        ),
        ({A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(3, 2)}, {}, "lora_embedding_A, which is no part"),
        ({A.replace("q_proj", "qq"): torch.ones(3, 2)}, {}, r"self_attn\.qq, which is not in the model"),
        ({A.replace("self_attn.q_proj", "mlp"): torch.ones(3, 2)}, {}, r"layers\.0\.mlp, which is a LlamaMLP"),
        ({A: torch.ones(3, 17)}, {}, r"q_proj\.lora_A is \(3, 17\) .* should be \(3, 16\)"),
        ({B: torch.ones(17, 3)}, {}, r"q_proj\.lora_B is \(17, 3\) .* should be \(16, 3\)"),
        ({A: torch.ones(2, 16), B: torch.ones(16, 2)}, {}, r"is \(2, 16\) .* should be \(3, 16\)"),
        ({HEAD: torch.ones(51, 16)}, {}, r"lm_head\.weight is \(51, 16\) .* should be \(50, 16\)"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_and_the_model_is_untouched(tensors, settings, message, tmp_path):
    model = llama()
    saved_by_peft(model, tmp_path, modules_to_save=["lm_head"])
    put(tmp_path, tensors, **settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        l1ra.from_peft(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "args, settings, error, message",
    [
        ((11,), {}, ValueError, "write budget=12 or more"),
        ((12.0,), {}, TypeError, "must be an int"),
        ((0,), {}, ValueError, "must be positive"),
        ((), {"min_rank": 4}, ValueError, "has rank 3 in the LoRA, and may have from 4 to"),
        ((), {"max_rank": 2}, ValueError, "may have from 1 to 2"),
        ((), {"reserve": 2}, ValueError, "may have from 1 to 2"),
        ((), {"ranks": 2}, TypeError, "no setting of L1RA"),
        ((), {"config": "default"}, TypeError, "must be an L1RAConfig"),
    ],
)
def test_bad_settings_are_refused_and_the_model_is_untouched(args, settings, error, message, tmp_path):
    model = llama()
    saved_by_peft(model, tmp_path)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        l1ra.from_peft(model, tmp_path, *args, **settings)
    assert_untouched(model, before)


def test_what_is_no_lora_or_no_plain_model_is_refused(tmp_path):
    model = llama()
    plain = saved_by_peft(model, tmp_path)
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}"):
        l1ra.from_peft(model, tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / CONFIG).write_text("{")
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        l1ra.from_peft(model, tmp_path / "broken")
    (tmp_path / "broken" / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="is no JSON"):
        l1ra.from_peft(model, tmp_path / "broken")
    (tmp_path / "broken" / CONFIG).write_text((tmp_path / CONFIG).read_text())
    with pytest.raises(ValueError, match="can't be read"):
        l1ra.from_peft(model, tmp_path / "broken")
    assert_untouched(model, before)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        l1ra.from_peft([], tmp_path)
    with pytest.raises(ValueError, match="base model"):
        l1ra.from_peft(plain, tmp_path)
    l1ra.patch(model, 14)
    before = snapshot(model)
    with pytest.raises(ValueError, match="patched already"):
        l1ra.from_peft(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "owner, at", [(L1RALinear, "resize"), (RankController, "close"), (l1ra.peft_format, "RankController")]
)
def test_a_failure_halfway_leaves_the_model_untouched(owner, at, tmp_path, monkeypatch):
    model = llama()
    saved_by_peft(model, tmp_path, modules_to_save=["lm_head"])
    before = snapshot(model)
    tries = []

    def cut(*args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise Cut
        return works(*args, **kwargs)

    works = getattr(owner, at)
    monkeypatch.setattr(owner, at, cut)
    with pytest.raises(Cut):
        l1ra.from_peft(model, tmp_path)
    assert_untouched(model, before)
