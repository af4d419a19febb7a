"""Adapters merged into quantised weights, and out again."""

import copy

import pytest
import torch
from helpers import same_bits, shake
from quantised_helpers import dense, load, logits, quantised, same_state, stored
from torch import nn
from torch.nn import functional as F

import l1ra
from l1ra import L1RALinear
from l1ra.layers.adapted_model import find_adapters

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
def test_a_merged_model_says_once_what_rounding_cost_and_can_be_copied(llama_folder, kind):
    model = load(llama_folder, kind)
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
