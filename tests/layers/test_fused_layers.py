"""Adapted layers and models on the fused kernels: the same numbers as plain torch, and which path is taken when."""

import copy
import pickle

import pytest
import torch
from attention_helpers import DEVICE, Wide, as_stepped, attention, calls, randn, wide
from helpers import BRISK, Residual, gpt2, llama, shake, step, task, tokens, trainable
from torch import nn

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.gradient_probe import start_probes
from l1ra.layers.linear import L1RALinear
from l1ra_kernels import choice

if not (choice.interpreting() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

SETTINGS = {**BRISK, "min_interval": 1}


def both(model, *inputs):
    """Outputs and gradients (torch, fused): of the second forward, after a step, at which layers share their input."""
    found = []
    for name in ("torch", "fused"):
        with choice.using(name):
            for _ in range(2):
                model.zero_grad()
                as_stepped(model)
                args = [x.detach().clone().requires_grad_() for x in inputs]
                y = model(*args)
                y.square().sum().backward()
        found.append([y, *(x.grad for x in args), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return found


def partners(model, name):
    layers = dict(find_adapters(model))
    names = {layer: name for name, layer in layers.items()}
    return [names[other] for other in layers[name].sharing.partners(layers[name])]


def assert_same(fused, plain):
    """Two float32 paths that sum in different orders; how exact each is, the tests of the kernels say."""
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()) + 1e-7)


def test_layers_that_read_one_input_are_computed_together(monkeypatch):
    model, seen = attention(), calls(monkeypatch)
    plain, fused = both(model, randn(5, 16))
    assert_same(fused, plain)
    assert seen == [1, 1, 1, 1, 3, 1]
    assert partners(model, "q_proj") == ["k_proj", "v_proj"] and partners(model, "o_proj") == []
    with choice.using("fused"):
        text = str(l1ra.report(model))
    assert "fused (chain), x read together with k_proj, v_proj" in text


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_transformers_model_is_the_same_on_both_paths(build):
    model = build().to(DEVICE).eval()
    l1ra.patch(model, 40)
    shake(model)
    ids = tokens().to(DEVICE)
    found = []
    for name in ("torch", "fused"):
        with choice.using(name):
            for _ in range(2):
                model.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
        found.append([loss, *(p.grad.clone() for p in trainable(model))])
    assert_same(found[1], found[0])


def test_layers_whose_inputs_begin_to_differ_fall_back_and_the_report_says_so(monkeypatch):
    model, x, other = attention(), randn(5, 16), randn(5, 16)
    both(model, x)
    seen = calls(monkeypatch)
    for _ in range(4):
        plain, fused = both(model, x, other)
        assert_same(fused, plain)
    # k was computed for nothing three times; v still rides along.
    assert seen[-3:] == [2, 1, 1] and partners(model, "k_proj") == []
    with choice.using("fused"):
        assert "alone: its inputs differ from its siblings'" in str(l1ra.report(model))


def test_an_input_changed_in_place_is_not_the_same_input():
    model, x = attention(), randn(5, 16)
    both(model, x)
    with choice.using("fused"), torch.no_grad():
        model.q_proj(x)
        x += 1
        shared = model.k_proj(x)
    with choice.using("torch"), torch.no_grad():
        torch.testing.assert_close(shared, model.k_proj(x))


@pytest.mark.parametrize("name", ["lora_A", "gate", "lora_B", "weight"])
def test_an_output_of_parameters_that_have_changed_since_is_not_used(name):
    model, x = attention(), randn(5, 16)
    both(model, x)
    with choice.using("fused"), torch.no_grad():
        model.q_proj(x)
        getattr(model.k_proj, name).mul_(1.5)
        late = model.k_proj(x)
    with choice.using("torch"), torch.no_grad():
        torch.testing.assert_close(late, model.k_proj(x), rtol=1e-4, atol=1e-5)


def test_an_output_computed_without_a_graph_is_not_used_with_one():
    model, x = attention(), randn(5, 16)
    both(model, x)
    with choice.using("fused"):
        with torch.no_grad():
            model.q_proj(x)
        assert model.k_proj(x).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_among_its_own_layers(copied):
    model, x = attention(), randn(5, 16)
    both(model, x)
    twin = copied(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    plain, fused = both(twin, x)
    assert_same(fused, plain)
    assert partners(twin, "q_proj") == ["k_proj", "v_proj"]
    assert twin.q_proj.sharing is twin.k_proj.sharing is not model.q_proj.sharing


def test_a_merged_sibling_does_not_stop_the_others():
    model, x = attention(), randn(5, 16)
    both(model, x)
    model.k_proj.merge()
    plain, fused = both(model, x)
    assert_same(fused, plain)


def test_probing_layers_share_as_well():
    model, x = attention(), randn(5, 16)
    both(model, x)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for name in ("torch", "fused"):
        for _, layer in find_adapters(model):
            sizes = layer.in_features, layer.out_features
            (layer.probe,) = start_probes(2, [(layer.lora_A, *sizes)], generator.manual_seed(1))
        with choice.using(name):
            model(x).square().sum().backward()
        seen.append([layer.probe.gradient for _, layer in find_adapters(model)])
    assert all(gradient.any() for gradient in seen[0])
    assert_same(seen[1], seen[0])


def test_dropout_drops_in_training_alone():
    model = attention(dropout=0.5)
    x = randn(40, 16)
    plain, fused = both(model.eval(), x)
    assert_same(fused, plain)
    with choice.using("fused"):
        first, second = model.train()(x), model(x)
        torch.manual_seed(3)
        third = model(x)
        torch.manual_seed(3)
        fourth = model(x)
    assert not torch.equal(first, second) and torch.equal(third, fourth)


# --- room behind the weights


def test_one_product_of_the_augmented_weight_gives_the_same_numbers(monkeypatch):
    model, seen = wide(), calls(monkeypatch)
    weight = model.gate_proj.weight
    before = weight.detach().clone()
    plain, fused = both(model, randn(5, 16))
    assert_same(fused, plain)
    assert seen == [1, 1, 1, 2, 1]
    with choice.using("fused"):
        paths = {name: layer.kernel_path().name for name, layer in find_adapters(model)}
        assert "fused (aug), x read together with up_proj" in str(l1ra.report(model))
    assert paths == {"gate_proj": "aug", "up_proj": "aug", "down_proj": "chain"}
    assert model.gate_proj.weight is weight and weight.stride() == (16 + 128, 1) and torch.equal(weight, before)


def test_a_whole_training_goes_the_same_way_with_room():
    ends = []
    for augment in (False, True):
        torch.manual_seed(0)
        model = Wide().to(DEVICE)
        x, y = randn(8, 16), randn(8, 16)
        with choice.using("fused"):
            controller = l1ra.patch(model, 12, augment=augment, **{**SETTINGS, "interval": 4})
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
            losses = [step(model, optimizer, x, y).item() for _ in range(14)]
        ends.append((controller.ranks, losses))
    assert controller.moved > 1 and ends[0][0] == ends[1][0]
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


def test_room_shows_in_no_state_dict_and_is_given_back():
    model, x = wide(), randn(5, 16)
    plain = model.state_dict()
    both(model, x)
    saved = model.state_dict()
    assert list(saved) == list(plain) and all(t.is_contiguous() for t in saved.values())
    assert all(torch.equal(saved[name], plain[name]) for name in plain)
    weight = model.up_proj.weight
    l1ra.unpatch(model)
    assert (
        model.up_proj.weight is weight
        and weight.is_contiguous()
        and not weight.untyped_storage().nbytes() > 16 * 48 * 4
    )
    assert not model.up_proj._state_dict_hooks


@pytest.mark.parametrize(
    "change", [lambda m: m.to(torch.float16), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_weight_that_was_cast_or_copied_gets_new_room(change):
    model = wide()
    both(model, randn(5, 16))
    model = change(model)
    plain, fused = both(model, randn(5, 16).to(model.up_proj.weight.dtype))
    tolerance = 2e-2 if plain[0].dtype == torch.float16 else 1e-5
    torch.testing.assert_close(fused[0], plain[0], rtol=tolerance, atol=tolerance)


def test_merging_works_with_room():
    model, x = wide(), randn(5, 16)
    both(model, x)
    kept = model.up_proj.weight.detach().clone()
    with torch.no_grad(), choice.using("fused"):
        before = model(x)
        for _, layer in find_adapters(model):
            layer.merge()
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
        model.up_proj.unmerge()
    assert torch.equal(model.up_proj.weight, kept)


# --- which path


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    base = nn.Linear(16, 16)
    base.register_forward_hook(lambda module, args, output: output + 1)
    return base


def replaced_forward():
    base = nn.Linear(16, 16)
    base.forward = lambda x: torch.nn.functional.linear(x, base.weight) * 3
    return base


FOREIGN = {
    "a Doubling has a forward of its own": lambda: Doubling(16, 16),
    "its base layer has hooks": hooked,
    "its forward was replaced": replaced_forward,
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_what_a_base_layer_does_besides_is_kept(reason):
    layer = shake(L1RALinear.from_linear(FOREIGN[reason]().to(DEVICE), rank=3))
    plain, fused = both(layer, randn(5, 16))
    assert_same(fused, plain)
    with choice.using("fused"):
        assert str(layer.kernel_path()) == f"fused (add: {reason})"


def test_autocast_is_left_to_the_base_layer():
    layer, x = shake(L1RALinear(16, 16, rank=3).to(DEVICE)), randn(5, 16)
    with torch.autocast(DEVICE, torch.float16):
        with choice.using("torch"):
            plain = layer(x)
        with choice.using("fused"):
            fused = layer(x)
            assert "autocast makes float16" in str(layer.kernel_path())
    assert fused.dtype == torch.float16
    # A GPU sums products of float16 in another order.
    tolerance = {} if DEVICE == "cpu" else {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(fused, plain, **tolerance)


def test_a_trained_base_gets_its_gradient():
    layer = shake(L1RALinear(16, 16, rank=3).to(DEVICE))
    layer.base_layer.requires_grad_(True)
    plain, fused = both(layer, randn(5, 16))
    assert len(plain) == 2 + 5
    assert_same(fused, plain)
    with choice.using("fused"):
        assert "its base layer is trained" in str(layer.kernel_path())


def test_doubles_run_as_plain_torch():
    layer = shake(L1RALinear(16, 16, rank=3, dtype=torch.float64, adapter_dtype=torch.float64).to(DEVICE))
    with choice.using("fused"):
        assert str(layer.kernel_path()) == "torch (no fused kernel takes float64)"
        assert layer(randn(2, 16, dtype=torch.float64)).dtype == torch.float64


def test_the_variable_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("L1RA_KERNELS", "torch")
    assert str(L1RALinear(16, 16, rank=3).kernel_path()) == "torch (plain PyTorch was asked for)"
    monkeypatch.setenv("L1RA_KERNELS", "fsued")
    with pytest.raises(ValueError, match="must be one of auto, torch, fused"):
        L1RALinear(16, 16, rank=3).kernel_path()


def test_strict_raises_instead_of_falling_back_and_touches_nothing():
    model = Residual().to(DEVICE)
    kinds = [type(module) for module in model.modules()]
    with choice.using("torch"), pytest.raises(RuntimeError, match="plain PyTorch was asked for"):
        l1ra.patch(model, 16, strict=True)
    assert [type(module) for module in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())
    x = task(Residual())[0].to(DEVICE)
    with choice.using("fused"):
        l1ra.patch(model, 16, strict=True)
        model(x)
    with choice.using("torch"), pytest.raises(RuntimeError, match="strict=True"):
        model(x)
