"""Adapters on quantised bases: the base's own forward runs, the adapter is added, nothing touches packed weights."""

import itertools
import types

import pytest
import torch
from helpers import BRISK, same_bits, shake, tokens, trainable
from quantised_helpers import Packed4, dense, load, logits, quantised, same_state, stored
from torch import nn
from torch.nn import functional as F

import l1ra
from l1ra import L1RALinear
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.base_layers import base_features, fallback_reason, main_tensor
from l1ra_kernels import choice

KINDS = ("nf4", "int8", "torchao")


@pytest.mark.parametrize("sizes", [("in_features", "out_features"), ("infeatures", "outfeatures")])
def test_a_packed_layer_is_known_by_its_sizes_and_its_packed_weight(sizes):
    base = Packed4(nn.Linear(16, 24), sizes)
    assert base_features(base) == (16, 24) and main_tensor(base) is base.qweight
    base.qweight = None
    assert base_features(base) is None


def test_a_layer_with_a_floating_point_weight_is_not_taken_for_quantised():
    router = nn.Module()
    router.in_features, router.out_features = 4, 8
    router.weight = nn.Parameter(torch.zeros(8, 4))
    assert base_features(router) is None
    router.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    assert base_features(router) == (4, 8)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("nf4", "a Linear4bit has a forward of its own"),
        ("int8", "a Linear8bitLt has a forward of its own"),
        ("torchao", "its weight is a Int8Tensor of shape (32, 16)"),
        ("packed4", "a Packed4 has a forward of its own"),
        ("float8", "a Float8 has a forward of its own"),
    ],
)
def test_why_the_base_computes_by_itself_is_said_in_words(kind, reason):
    model = nn.Sequential(quantised(nn.Linear(16, 32), kind))
    assert fallback_reason(model[0], torch.device("cpu"), torch.float32) == reason
    if choice.interpreting():
        with choice.using("fused"):
            l1ra.patch(model, 2, strict=True)
            assert l1ra.report(model).rows[0].path == f"fused (add: {reason})"


@pytest.mark.parametrize("kind", [*KINDS, "packed4", "float8"])
@pytest.mark.parametrize("path", ["torch", "fused"])
def test_output_and_gradients_are_those_of_the_dequantised_weight(kind, path):
    if path == "fused" and not choice.interpreting():
        pytest.skip("needs triton's interpreter: TRITON_INTERPRET=1")
    base = quantised(nn.Linear(32, 64), kind)
    layer = shake(L1RALinear.from_linear(base, rank=3, alpha=6.0))
    x = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, 64)
    inputs = [x, layer.lora_A, layer.gate, layer.lora_B]
    with choice.using(path):
        y = layer(x)
        grads = torch.autograd.grad(y, inputs, upstream)
    x64, a, gate, b = (p.detach().double().requires_grad_() for p in inputs)
    bias = layer.bias.detach().double()
    exact = F.linear(x64, dense(base).double(), bias) + 2.0 * ((x64 @ a.T) * gate) @ b
    exact_grads = torch.autograd.grad(exact, [x64, a, gate, b], upstream.double())
    for mine, right in zip([y, *grads], [exact, *exact_grads], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5 * float(right.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_finds_every_layer_and_patch_changes_no_bit(llama_folder, kind):
    model = load(llama_folder, kind)
    state, before = stored(model), logits(model)
    l1ra.patch(model, 56)
    layers = dict(find_adapters(model))
    assert len(layers) == 14 and "lm_head" not in layers
    assert same_bits(logits(model), before)
    shake(model)
    assert not torch.equal(logits(model), before)
    l1ra.unpatch(model)
    assert same_state(stored(model), state) and same_bits(logits(model), before) and model.is_quantized


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_trains_and_moves_ranks_and_leaves_the_base_alone(llama_folder, kind, reentrant):
    peft = pytest.importorskip("peft")
    model = load(llama_folder, kind)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    bases = [module for name, module in model.named_modules() if name.endswith("proj")]
    before = [stored(base) for base in bases]
    controller = l1ra.patch(model, 28, **{**BRISK, "total_steps": 32}, min_interval=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(32):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None for layer in controller.adapters.values() for p in (layer.lora_A, layer.lora_B))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert controller.moved > 0 and len(controller.history) > 2
    assert losses[-1] < 0.8 * losses[0]
    assert len(bases) == 14 and all(itertools.starmap(same_state, zip(map(stored, bases), before, strict=True)))


def test_ranks_move_between_adapters_that_were_cast_as_sft_trainer_casts_them(llama_folder):
    model = load(llama_folder, "nf4")
    controller = l1ra.patch(model, 28, **{**BRISK, "total_steps": 24}, min_interval=1)
    for param in trainable(model):
        param.data = param.data.bfloat16()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(24):
        losses.append(model(tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.moved > 0 and losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in trainable(model)} == {torch.bfloat16}


def test_a_trainer_takes_the_model_evaluates_it_between_and_resumes(llama_folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    pytest.importorskip("accelerate")
    data = [{"input_ids": t, "labels": t} for t in tokens(8)]

    def run(out, **resume):
        model = load(llama_folder, "nf4")
        controller = l1ra.patch(model, 28, interval=2, warmup=0.0, min_interval=1, total_steps=6)
        common = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        when = {"save_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
        args = TrainingArguments(str(out), max_steps=6, **common, **when)
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        trainer.train(**resume)
        return model, controller, trainer

    model, controller, trainer = run(tmp_path / "whole")
    assert controller.steps == 6 and len(controller.history) > 1
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    again, resumed, _ = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.ranks == controller.ranks
    assert all(itertools.starmap(same_bits, zip(trainable(again), trainable(model), strict=True)))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_computes_the_same_on_the_same_quantised_base(llama_folder, kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(llama_folder, kind)
    l1ra.patch(model, 21)
    l1ra.export_peft(shake(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(llama_folder, kind), tmp_path).train()
    mine = logits(model)
    torch.testing.assert_close(logits(theirs), mine, rtol=1e-5, atol=1e-5 * float(mine.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_are_saved_and_go_onto_a_fresh_quantised_base(llama_folder, kind, tmp_path):
    from safetensors.torch import load_file

    model = load(llama_folder, kind)
    l1ra.patch(model, 21, total_steps=10).save(tmp_path)
    shake(model)._l1ra_controller.save(tmp_path)
    (file,) = tmp_path.glob("adapters-*")
    assert {name.rsplit(".", 1)[-1] for name in load_file(file)} == {"lora_A", "gate", "lora_B"}
    fresh = load(llama_folder, kind)
    l1ra.load(fresh, tmp_path)
    assert same_bits(logits(fresh), logits(model))


def test_kernels_without_a_backward_are_an_error_in_training_alone():
    model = nn.Sequential(nn.Linear(16, 16), Packed4(nn.Linear(16, 24), differentiable=False))
    l1ra.patch(model, 4)
    with pytest.raises(RuntimeError, match=r"no gradient passes through the Packed4.*kernels that have a backward"):
        model(torch.randn(2, 16))
    with torch.no_grad():
        model(torch.randn(2, 16))
    model.eval()(torch.randn(2, 16))


def test_a_4_bit_weight_is_not_packed_for_inference_while_it_is_adapted():
    base = quantised(nn.Linear(32, 24), "nf4")
    if not hasattr(base, "support_avx512bf16_for_cpu"):
        pytest.skip("this bitsandbytes does not pack")
    base.support_avx512bf16_for_cpu = True
    model = nn.Sequential(nn.Linear(32, 32), base)
    l1ra.patch(model, 4)
    x, shape = torch.randn(3, 32), base.weight.shape
    with torch.no_grad():
        model.eval()(x)
    assert base.weight.shape == shape
    model.train()(x).sum().backward()
    assert model[0].gate.grad.any() or model[0].lora_B.grad.any()
    assert l1ra.unpatch(model)[1].support_avx512bf16_for_cpu is True
    base.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match=r"packed the weight.*load the model anew"):
        l1ra.patch(model, 4)
    assert type(model[0]) is nn.Linear


def test_an_error_in_patch_gives_the_packing_back():
    base = quantised(nn.Linear(32, 24), "nf4")
    base.support_avx512bf16_for_cpu = True
    model = nn.Sequential(base, nn.Linear(24, 2))
    with choice.using("torch"), pytest.raises(RuntimeError, match="strict=True"):
        l1ra.patch(model, 4, strict=True)
    assert base.support_avx512bf16_for_cpu is True and model[0] is base
