"""Layers and models with quantised weights, and what they hold."""

import copy

import pytest
import torch
from helpers import same_bits, tokens
from torch import nn
from torch.nn import functional as F

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


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


def save_llama(folder):
    """A tiny Llama, to be loaded with quantised weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)


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
