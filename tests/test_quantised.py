"""Adapters on quantised bases: the base's own forward runs, the adapter is added, nothing touches packed weights."""

import copy
import itertools
import types

import pytest
import torch
from helpers import BRISK, same_bits, shake, tokens, trainable
from torch import nn
from torch.nn import functional as F

import l1ra
from l1ra import L1RALinear
from l1ra.base_layers import base_features, foreign, main_tensor
from l1ra.linear import find_adapters
from l1ra_kernels import choice

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
KINDS = ("nf4", "int8", "torchao")


class Packed4(nn.Module):
    """As GPTQ's and AWQ's layers: no Linear, no weight, eight 4-bit numbers in an int32, and a forward of its own."""

    def __init__(self, linear, sizes=("in_features", "out_features"), differentiable=True):
        super().__init__()
        for name, size in zip(sizes, (linear.in_features, linear.out_features), strict=True):
            setattr(self, name, size)
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 7
        shifts = 4 * torch.arange(8)
        nibbles = ((weight / scales).round().long() + 8).view(len(weight), -1, 8)
        self.register_buffer("qweight", (nibbles << shifts).sum(-1).sub(2**31).to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.differentiable = differentiable

    def dense(self):
        nibbles = (self.qweight.long() + 2**31).unsqueeze(-1) >> 4 * torch.arange(8) & 15
        return (nibbles.flatten(1) - 8) * self.scales

    def forward(self, x):
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return F.linear(x, self.dense().to(x.dtype), self.bias)


class Float8(nn.Linear):
    """As the fp8 layers of transformers: a Linear whose weight means nothing without its scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight_scale_inv = nn.Parameter(linear.weight.detach().abs().amax() / 448)
        self.weight = nn.Parameter((linear.weight.detach() / self.weight_scale_inv).to(torch.float8_e4m3fn))
        self.bias = linear.bias

    def dense(self):
        return self.weight.float() * self.weight_scale_inv

    def forward(self, x):
        return F.linear(x, self.dense(), self.bias)


def quantised(linear, kind):
    """A layer of the ``kind`` that holds the weight of ``linear``."""
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        twin = nn.Sequential(copy.deepcopy(linear))
        torchao.quantize_(twin, torchao.Int8WeightOnlyConfig())
        return twin[0]
    if kind in ("nf4", "int8"):
        bnb = pytest.importorskip("bitsandbytes").nn
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        layer = bnb.Linear4bit(*sizes, quant_type="nf4") if kind == "nf4" else bnb.Linear8bitLt(*sizes, False)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")
    return {"packed4": Packed4, "float8": Float8}[kind](linear)


def dense(base):
    """The weight that a quantised layer computes with."""
    if hasattr(base, "dense"):
        return base.dense()
    if type(base) is nn.Linear:
        return base.weight.dequantize()
    from bitsandbytes import functional

    if type(base).__name__ == "Linear4bit":
        return functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
    return base.weight.data * scales[:, None] / 127


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def load(folder, kind, **settings):
    """That Llama with weights of the ``kind``, as users load it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    pytest.importorskip("torchao" if kind == "torchao" else "bitsandbytes")
    if kind == "nf4":
        double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double, **settings)
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **settings)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return model.train()


def logits(model):
    return model(tokens()).logits


def stored(model):
    """Copies of the state dict, the parts of tensor subclasses one by one."""
    found = {}
    for name, value in model.state_dict().items():
        inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        found |= {f"{name}.{part}": getattr(value, part).clone() for part in inner} or {name: value.clone()}
    return found


def same_state(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


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
    assert foreign(model[0], torch.device("cpu"), torch.float32) == reason
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
def test_all_linear_finds_every_layer_and_patch_changes_no_bit(folder, kind):
    model = load(folder, kind)
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
def test_the_recipe_trains_and_moves_ranks_and_leaves_the_base_alone(folder, kind, reentrant):
    peft = pytest.importorskip("peft")
    model = load(folder, kind)
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


def test_ranks_move_between_adapters_that_were_cast_as_sft_trainer_casts_them(folder):
    model = load(folder, "nf4")
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


def test_a_trainer_takes_the_model_evaluates_it_between_and_resumes(folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    pytest.importorskip("accelerate")
    data = [{"input_ids": t, "labels": t} for t in tokens(8)]

    def run(out, **resume):
        model = load(folder, "nf4")
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
def test_peft_computes_the_same_on_the_same_quantised_base(folder, kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder, kind)
    l1ra.patch(model, 21)
    l1ra.export_peft(shake(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path).train()
    mine = logits(model)
    torch.testing.assert_close(logits(theirs), mine, rtol=1e-5, atol=1e-5 * float(mine.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_are_saved_and_go_onto_a_fresh_quantised_base(folder, kind, tmp_path):
    from safetensors.torch import load_file

    model = load(folder, kind)
    l1ra.patch(model, 21, total_steps=10).save(tmp_path)
    shake(model)._l1ra_controller.save(tmp_path)
    (file,) = tmp_path.glob("adapters-*")
    assert {name.rsplit(".", 1)[-1] for name in load_file(file)} == {"lora_A", "gate", "lora_B"}
    fresh = load(folder, kind)
    l1ra.load(fresh, tmp_path)
    assert same_bits(logits(fresh), logits(model))


# The largest distance to the nearest number, relative to the largest one. 8-bit numbers are made from float16.
HALF_STEPS = {"nf4": (1 - 0.69619) / 2, "int8": 0.5 / 127 + 2**-11}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("called", [False, True])
def test_merging_rounds_to_the_nearest_and_says_by_how_much(kind, called):
    base = quantised(nn.Linear(64, 32), kind)
    layer, x = shake(L1RALinear.from_linear(base, rank=3)), torch.randn(4, 64)
    if called:
        layer(x)  # the scales of 8-bit weights move at the first call
    state, wanted, old = stored(layer), dense(base) + layer.delta_weight(), base.weight
    first = layer(x) if called else None
    with pytest.warns(UserWarning, match=r"merged into [48]-bit weights") as caught:
        layer.merge()
    error = dense(base) - wanted
    blocks = (error / wanted.abs().amax(1, keepdim=True)).abs()  # a row of 64 is one block, and has one scale
    assert blocks.max() <= HALF_STEPS[kind] * 1.001
    told = error.norm() / wanted.norm(), layer.delta_weight().norm() / wanted.norm()
    assert all(f"{share:.2%}" in str(caught[0].message) for share in told)
    torch.testing.assert_close(layer(x), F.linear(x, dense(base), layer.bias), rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert base.weight is old and same_state(stored(layer), state)
    assert first is None or same_bits(layer(x), first)


def test_a_merged_4_bit_weight_has_the_settings_it_had():
    linear, bnb = nn.Linear(64, 32), pytest.importorskip("bitsandbytes").nn
    settings = {"compress_statistics": False, "quant_type": "fp4", "quant_storage": torch.bfloat16}
    base = bnb.Linear4bit(64, 32, **settings)
    base.load_state_dict(linear.bfloat16().state_dict(), assign=True)
    base.weight = bnb.Params4bit(linear.weight.data, blocksize=128, module=base, **settings)
    layer = shake(L1RALinear.from_linear(base.to("cpu"), rank=3))
    old, state = base.weight, base.quant_state
    with pytest.warns(UserWarning, match="merged into 4-bit"):
        layer.merge()
    assert base.weight is not old and base.quant_state is base.weight.quant_state is not state
    assert {name: getattr(base.weight, name) for name in settings} == settings and base.weight.module is base
    for name in ("blocksize", "quant_type", "nested", "dtype", "shape"):
        assert getattr(base.quant_state, name) == getattr(state, name)
    assert base.weight.dtype == torch.bfloat16 and base.weight.shape == old.shape
    layer.unmerge()
    assert base.weight is old and base.quant_state is state is old.quant_state


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merged_model_says_once_what_rounding_cost_and_can_be_copied(folder, kind):
    model = load(folder, kind)
    l1ra.patch(model, 21)
    before, first = stored(shake(model, 0.02)), logits(model)
    plain = logits(l1ra.unpatch(copy.deepcopy(model)))
    with pytest.warns(UserWarning, match="l1ra.export_peft keeps the adapters apart") as caught:
        l1ra.merge(model)
    assert len(caught) == 1
    merged = logits(model)
    assert (merged - first).norm() < (plain - first).norm()
    twin = copy.deepcopy(model)
    assert same_bits(logits(twin), merged)
    for one in (model, twin):
        l1ra.unmerge(one)
        assert same_state(stored(one), before) and same_bits(logits(one), first)
    with pytest.warns(UserWarning, match="merged into"):
        l1ra.unpatch(model, merge=True)
    assert same_bits(logits(model), merged) and not any(True for _ in find_adapters(model))


@pytest.mark.parametrize(
    "kind, reason",
    [("torchao", "its weight is a Int8Tensor"), ("packed4", "a Packed4 has"), ("float8", "a Float8 has")],
)
def test_where_nothing_can_be_merged_no_layer_is(kind, reason):
    model = nn.Sequential(nn.Linear(16, 16), quantised(nn.Linear(16, 32), kind))
    l1ra.patch(model, 4)
    before = stored(shake(model))
    with pytest.raises(TypeError, match=f"1 can't be merged: {reason}.*l1ra.export_peft"):
        l1ra.merge(model)
    assert same_state(stored(model), before) and not model[0].merged and not model[1].merged


def test_kernels_without_a_backward_are_an_error_in_training_alone():
    model = nn.Sequential(nn.Linear(16, 16), Packed4(nn.Linear(16, 24), differentiable=False))
    l1ra.patch(model, 4)
    with pytest.raises(RuntimeError, match=r"no gradient passes the Packed4.*kernels that have a backward"):
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
