"""Adapters read from the LoRA that PEFT has saved: they compute what it does, and train on."""

import copy
import json
import math

import pytest
import torch
from helpers import MLP, assert_untouched, bert, gpt2, llama, same_bits, snapshot, tokens
from peft_helpers import Cut, close, config_of, lively, loaded, logits, uneven

import l1ra
from l1ra import L1RALinear, RankController
from l1ra.files.peft_export import CONFIG, WEIGHTS
from l1ra.layers.adapted_model import find_adapters

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


def put(directory, tensors=None, **settings):
    """Change what the directory holds; None takes a tensor away."""
    if tensors:
        kept = {**st.load_file(directory / WEIGHTS), **tensors}
        st.save_file({key: value for key, value in kept.items() if value is not None}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({**config_of(directory), **settings}))


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


@pytest.mark.parametrize("settings", [{"alpha": 8.0}, {"alpha": 8.0, "rank_stabilized": True}, {"init": "gaussian"}])
def test_a_checkpoint_of_it_is_loaded_at_the_ranks_it_came_with(settings, tmp_path):
    base = lively(llama())
    saved_by_peft(base, tmp_path, rank_pattern={"up_proj": 6})
    model = copy.deepcopy(base)
    l1ra.from_peft(model, tmp_path, total_steps=20, **settings).save(tmp_path / "saved")
    l1ra.load(base, tmp_path / "saved")
    assert same_bits(logits(base), logits(model))
    assert [layer.initial_rank for _, layer in find_adapters(base)] == [3, 6] * 2


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
        ({}, {"target_modules": ["up_proj"]}, "target_modules, tensors are surplus in"),
        ({"base_model.model.model.norm2.weight": torch.ones(16)}, {}, r"surplus in .*: model\.norm2\.weight"),
        ({"base_model.model.model.norm.weight": torch.ones(17)}, {}, r"norm\.weight is \(17,\) .* should be \(16,\)"),
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
        ({HEAD: torch.ones(50, 17)}, {}, r"lm_head\.weight is \(50, 17\) .* should be \(50, 16\)"),
        ({HEAD: torch.ones(51, 16)}, {}, r"51 rows in .* and 50 .*: call model\.resize_token_embeddings\(51\) first"),
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
    with pytest.raises(ValueError, match="is a PEFT PeftModel: pass the plain model"):
        l1ra.from_peft(plain, tmp_path)
    l1ra.patch(model, 14)
    before = snapshot(model)
    with pytest.raises(ValueError, match="patched already"):
        l1ra.from_peft(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "owner, at", [(L1RALinear, "resize"), (RankController, "close"), (l1ra.model.peft_import, "RankController")]
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
