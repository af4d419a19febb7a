"""l1ra.merge and unmerge: how exact the merged model is, the old bits, and all adapters or none."""

import copy

import pytest
import torch
from helpers import MLP, Adapted, assert_untouched, gpt2, llama, same_bits, shake, snapshot, tokens
from torch import nn
from torch.nn.utils import parametrize, prune

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.linear import L1RALinear
from l1ra.layers.merged_weight import OriginalWeight

ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # the largest relative error of one rounding


def adapted(make=llama, dtype=torch.float32, budget=40):
    model = make().to(dtype).eval()
    l1ra.patch(model, budget, alpha=3.0)
    for _, layer in find_adapters(shake(model, 0.1)):
        with torch.no_grad():
            layer.gate[-1] = 0.5
    return model


@torch.no_grad()
def logits(model):
    return model(tokens()).logits.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_merged_entry_is_the_exact_sum_rounded_once(make, dtype):
    model = adapted(make, dtype)
    layers = [layer for _, layer in find_adapters(model)]
    before = [layer.weight.detach().double() for layer in layers]
    assert l1ra.merge(model) is model
    for layer, weight in zip(layers, before, strict=True):
        a, gate, b = (p.detach().double() for p in (layer.lora_A, layer.gate, layer.lora_B))
        delta, slack = layer.scaling * (b.T * gate) @ a, layer.scaling * (b.abs().T * gate) @ a.abs()
        if make is gpt2:
            delta, slack = delta.T, slack.T
        exact = weight + delta
        # Beside that one rounding, the float32 product of few terms and their sum.
        allowed = ROUNDOFF[dtype] * exact.abs() + 8 * 2**-24 * (slack + weight.abs())
        assert ((layer.weight.detach().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_merged_model_is_as_near_to_float64_as_the_adapted_one(make, dtype):
    model = adapted(make, dtype)
    exact = logits(copy.deepcopy(model).double())
    without = logits(l1ra.unpatch(copy.deepcopy(model)))
    error = (logits(model) - exact).norm()
    merged = (logits(l1ra.merge(model)) - exact).norm()
    # Rounding the weights once more costs as much as rounding what they are multiplied with.
    assert merged <= 2 * error
    assert (without - exact).norm() > 10 * merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_unmerge_gives_every_bit_back(make, dtype):
    model = adapted(make, dtype)
    before, first = snapshot(model), logits(model)
    l1ra.merge(model)
    assert all(layer.merged for _, layer in find_adapters(model))
    assert l1ra.unmerge(model) is model
    assert_untouched(model, before)
    assert same_bits(logits(model), first)


def test_a_copy_of_a_merged_model_has_weights_of_its_own_to_give_back():
    model = adapted()
    before = snapshot(model)["params"]
    twin = copy.deepcopy(l1ra.merge(model))
    l1ra.unmerge(twin)
    assert all(same_bits(p, old[3]) for p, old in zip(twin.parameters(), before, strict=True))
    assert all(layer.merged for _, layer in find_adapters(model))


def test_unpatch_with_merge_leaves_the_plain_model_with_the_adapters_effect():
    model = adapted()
    first = logits(model)
    modules = {name.replace(".base_layer", ""): type(m) for name, m in model.named_modules() if "dropout" not in name}
    assert l1ra.unpatch(model, merge=True) is model
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-6)
    assert next(find_adapters(model), None) is None and not hasattr(model, "_l1ra_controller")
    assert {name: type(m) for name, m in model.named_modules()} == modules


def test_unpatch_with_merge_keeps_what_is_merged_already():
    model = adapted(MLP, budget=9)
    l1ra.merge(model)
    weights = [layer.weight.detach().clone() for _, layer in find_adapters(model)]
    l1ra.unpatch(model, merge=True)
    assert all(same_bits(layer.weight, weight) for layer, weight in zip(model.layers, weights, strict=True))


class Scaled(nn.Linear):
    """To add to this weight is not to add to the output."""

    def forward(self, x):
        return 3 * super().forward(x)


def refused(model, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        l1ra.merge(model)
    assert_untouched(model, before)
    if hasattr(model, "_l1ra_original"):
        with pytest.raises(error, match=message):
            l1ra.unpatch(model, merge=True)
        assert_untouched(model, before)


def test_if_one_layer_refuses_none_is_merged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.float8_e4m3fn), Scaled(4, 4))
    l1ra.patch(model, 6)
    refused(shake(model), TypeError, "1 can't be merged: its weight is float8_e4m3fn.*export_peft")
    l1ra.unpatch(model)
    model[1] = nn.Linear(4, 4)
    l1ra.patch(model, 6)
    refused(shake(model), TypeError, "2 can't be merged: a Scaled has a forward of its own")


COMPUTED = {
    "the parametrization WeightNorm": nn.utils.parametrizations.weight_norm,
    "the parametrization SpectralNorm": nn.utils.parametrizations.spectral_norm,
    "the parametrization Orthogonal": nn.utils.parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}
ENDS = {
    "parametrize.remove_parametrizations": lambda base: parametrize.remove_parametrizations(base, "weight"),
    "prune.remove": lambda base: prune.remove(base, "weight"),
    "remove_weight_norm": nn.utils.remove_weight_norm,
    "remove_spectral_norm": nn.utils.remove_spectral_norm,
}


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_that_is_computed_is_merged_once_it_is_plain(what):
    model = nn.Sequential(nn.Linear(8, 6), COMPUTED[what](nn.Linear(6, 6)))
    l1ra.patch(model, 4, total_steps=10)
    shake(model).eval()
    x = torch.randn(5, 8)
    want = model(x).detach()
    refused(model, TypeError, f"1 can't be merged: its weight is computed by {what}; torch.nn.utils")
    with pytest.raises(TypeError) as info:
        l1ra.merge(model)
    end = next(end for name, end in ENDS.items() if f"{name} for its base_layer" in str(info.value))
    end(model[1].base_layer)
    l1ra.merge(model)
    torch.testing.assert_close(model(x), want)


def test_a_weight_that_another_module_has_too_is_not_merged_into():
    model = llama()
    l1ra.patch(model, 6, target_modules=["lm_head", "q_proj"])
    model.lm_head.base_layer.weight = model.model.embed_tokens.weight  # patch refuses what is tied before
    refused(shake(model), ValueError, "lm_head shares its weight with model.embed_tokens")


def test_one_that_is_merged_already_is_named():
    model = adapted(MLP, budget=9)
    model.layers[1].merge()
    refused(model, RuntimeError, r"layers.1 is merged already: call l1ra.unmerge\(model\)")
    l1ra.unmerge(model)
    l1ra.merge(model)


def test_what_was_merged_before_a_failure_is_taken_out_again(monkeypatch):
    model = adapted(MLP, budget=9)
    before = snapshot(model)
    last = list(find_adapters(model))[-1][1]
    merge = L1RALinear.merge_without_warning
    monkeypatch.setattr(L1RALinear, "merge_without_warning", lambda layer: 1 / 0 if layer is last else merge(layer))
    with pytest.raises(ZeroDivisionError):
        l1ra.merge(model)
    assert_untouched(model, before)


def test_nothing_to_merge_or_to_unmerge_is_an_error():
    with pytest.raises(ValueError, match="no adapter"):
        l1ra.merge(MLP())
    with pytest.raises(RuntimeError, match=r"call l1ra.merge\(model\) first"):
        l1ra.unmerge(Adapted())


def test_a_model_of_ones_own_is_merged_without_a_controller():
    model, x = shake(Adapted()), torch.randn(3, 6)
    y = model(x)
    torch.testing.assert_close(l1ra.merge(model)(x), y)
    assert isinstance(model.up._original_weight, OriginalWeight) and same_bits(l1ra.unmerge(model)(x), y)
