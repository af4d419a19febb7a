"""patch and unpatch: the same function before and after, and the very objects back."""

import copy
import itertools

import pytest
import torch
from helpers import (
    MLP,
    Adapted,
    Residual,
    assert_untouched,
    bert,
    copied,
    gpt2,
    llama,
    same_bits,
    shake,
    snapshot,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import l1ra
from l1ra import L1RALinear, RankController
from l1ra.layers.adapted_model import controller_of, find_adapters


def output(model):
    x = tokens()
    if isinstance(model, MLP):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(model.layers[0].weight.dtype)
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [MLP, llama, gpt2, bert])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_patch_changes_no_bit_of_the_output(make, dtype, dropout):
    model = make().to(dtype).eval()
    before = output(model)
    l1ra.patch(model, 40, dropout=dropout)
    assert same_bits(output(model), before)
    if make in (MLP, llama):  # without dropout of their own
        assert same_bits(output(model.train()), before)


@pytest.mark.parametrize("make", [MLP, llama])
def test_patch_and_training_steps_spare_the_global_generator(make):
    model = make()
    before = torch.get_rng_state()
    controller = l1ra.patch(model, 40, total_steps=20, interval=2, warmup=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(6):
        out = model(torch.ones(2, 6)) if make is MLP else model(tokens()).logits
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(controller.history) > 1 and torch.equal(before, torch.get_rng_state())


def test_the_seed_decides_the_rows():
    def rows(seed):
        model = MLP()
        l1ra.patch(model, 9, seed=seed)
        return [layer.lora_A for _, layer in find_adapters(model)]

    assert all(itertools.starmap(same_bits, zip(rows(1), rows(1), strict=True)))
    assert not same_bits(rows(1)[0], rows(2)[0])


def test_everything_but_adapters_is_frozen():
    model = llama()
    l1ra.patch(model, 14)
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "gate", "lora_B"}


def test_a_new_head_is_trained_in_full_by_default_and_not_if_told_so():
    model = bert()
    l1ra.patch(model, 40)
    assert isinstance(model.classifier, nn.Linear) and model.classifier.weight.requires_grad
    model = bert()
    l1ra.patch(model, 40, modules_to_save=[])
    assert isinstance(model.classifier, L1RALinear) and not model.classifier.weight.requires_grad


def test_modules_to_save_are_trained_and_not_adapted():
    model = llama()
    l1ra.patch(model, 40, modules_to_save=["embed_tokens", "layers.0.mlp"])
    layers = model.model.layers
    assert model.model.embed_tokens.weight.requires_grad and layers[0].mlp.up_proj.weight.requires_grad
    assert type(layers[0].mlp.up_proj) is nn.Linear and isinstance(layers[1].mlp.up_proj, L1RALinear)


def test_the_budget_is_spread_and_named_by_module():
    model = MLP()
    controller = l1ra.patch(model, 10)
    assert sorted(controller.ranks.values()) == [3, 3, 4] and controller.spare == 0
    assert controller.ranks == {n: model.get_submodule(n).rank for n in ("layers.0", "layers.1", "layers.2")}
    assert controller_of(model) is controller


def test_a_shared_module_is_replaced_in_all_its_parents():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4))})
    model["b"].append(model["a"])
    original = model["a"]
    controller = l1ra.patch(model, 4)
    assert model["a"] is model["b"][1] and isinstance(model["a"], L1RALinear) and len(controller.ranks) == 2
    l1ra.unpatch(model)
    assert model["a"] is model["b"][1] is original


@pytest.mark.parametrize("make", [MLP, llama, gpt2, bert])
def test_unpatch_gives_the_very_objects_and_flags_back(make):
    model = make()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    l1ra.patch(model, 40)
    shake(model)
    assert l1ra.unpatch(model) is model
    assert_untouched(model, before)
    l1ra.patch(model, 40)  # and it can be patched again


def test_unpatch_takes_a_merged_adapter_out_of_the_weight():
    model = MLP()
    before = snapshot(model)
    l1ra.patch(model, 9)
    for _, layer in find_adapters(shake(model)):
        layer.merge()
    l1ra.unpatch(model)
    assert_untouched(model, before)


def test_unpatch_without_patch_is_an_error():
    model = MLP()
    with pytest.raises(ValueError, match="not patched"):
        l1ra.unpatch(model)
    l1ra.patch(model, 9)
    l1ra.unpatch(model)
    with pytest.raises(ValueError, match="unpatched already"):
        l1ra.unpatch(model)


def test_after_unpatch_nobody_listens():
    model = MLP()
    controller = l1ra.patch(model, 9, total_steps=10)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1)
    l1ra.unpatch(model)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert controller.steps == 0


def test_a_failure_at_the_third_layer_leaves_the_model_untouched(monkeypatch):
    model = llama()
    before, made = snapshot(model), []
    from_linear = L1RALinear.from_linear

    def fails(*args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise MemoryError
        return from_linear(*args, **kwargs)

    monkeypatch.setattr(L1RALinear, "from_linear", fails)
    with pytest.raises(MemoryError):
        l1ra.patch(model, 40)
    assert_untouched(model, before)


def test_a_failure_of_the_controller_leaves_the_model_untouched(monkeypatch):
    model = llama()
    before = snapshot(model)
    monkeypatch.setattr("l1ra.training.controller.GateBank", None)
    with pytest.raises(TypeError):
        l1ra.patch(model, 40)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError])
def test_a_model_that_can_not_name_its_embeddings_is_patched_all_the_same(error):
    class Odd(MLP):
        def get_input_embeddings(self):
            raise error("no such thing")

        get_output_embeddings = get_input_embeddings

    model = Odd()
    l1ra.patch(model, 9)
    l1ra.unpatch(model)


def checkpointed_gradients(reentrant, patched=True):
    model = llama().train()
    torch.manual_seed(4)
    model.apply(lambda m: nn.init.normal_(m.weight, 0, 0.2) if hasattr(m, "weight") and m.weight.dim() == 2 else None)
    if patched:
        l1ra.patch(model, 28)
        shake(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_both_kinds_gives_the_same_gradients(reentrant):
    plain, saved = checkpointed_gradients(None), checkpointed_gradients(reentrant)
    assert plain.keys() == saved.keys() and all(grad is not None for grad in saved.values())
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [MLP, llama])
def test_a_copy_of_a_patched_model_works_by_itself_and_is_not_driven(make, how):
    model = make().eval()
    controller = l1ra.patch(model, 40, total_steps=10)
    shake(model)
    twin = copied(model, how)
    assert same_bits(output(twin), output(model))
    assert controller_of(twin) is None and controller_of(model) is controller
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    gates = [layer.gate for _, layer in find_adapters(twin)]
    torch.optim.SGD(gates, lr=0.25).step()
    assert controller.steps == 0 and all((gate == 0.75).all() for gate in gates)
    assert all((layer.gate == 1).all() for _, layer in find_adapters(model))

    second = RankController(twin, 40)  # it may have a controller of its own
    second.close()
    twin_linear = next(layer.base_layer for _, layer in find_adapters(twin))
    l1ra.unpatch(twin)
    assert not list(find_adapters(twin)) and any(m is twin_linear for m in twin.modules())
    assert list(find_adapters(model))


class Frozen(nn.Module):
    """Checkpoints the reentrant way over frozen embeddings, without the help that newer transformers give."""

    is_gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(50, 8), nn.Linear(8, 8)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return checkpoint(self.block, self.embed(ids), use_reentrant=True)


def test_reentrant_checkpointing_works_over_frozen_embeddings_in_a_copy_too():
    model = Frozen()
    l1ra.patch(model, 2)
    twin = copy.deepcopy(model)
    twin.is_gradient_checkpointing = True  # of the copy alone
    assert twin(tokens()).requires_grad
    twin(tokens()).sum().backward()
    assert twin.block.lora_B.grad.any() and twin.embed.weight.grad is None
    assert not model.embed(tokens()).requires_grad
    l1ra.unpatch(twin).requires_grad_(False)
    assert not twin.embed(tokens()).requires_grad  # the hook is gone


def test_a_model_of_ones_own_needs_no_patch():
    model = Adapted(rank=4)
    controller = RankController(model, budget=10)
    assert controller.ranks == {"up": 4, "down": 4} and controller.spare == 2
    with pytest.raises(ValueError, match="was not patched"):
        l1ra.unpatch(model)
    controller.close()
    assert controller_of(model) is None


# --- what patch refuses, with the model as it was


def refused(model, message, *args, error=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        l1ra.patch(model, *args, **kwargs)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "budget, error, message",
    [
        (0, ValueError, "must be positive"),
        (-3, ValueError, "must be positive"),
        (2, ValueError, "write a budget of at least 3"),
        (8.0, TypeError, "8 \\* number_of_adapters"),
        (True, TypeError, "must be an int"),
        ("16", TypeError, "must be an int"),
        (None, TypeError, "must be an int"),
    ],
)
def test_a_bad_budget_is_refused(budget, error, message):
    refused(MLP(), message, budget, error=error)


def test_a_budget_below_min_rank_is_refused():
    refused(MLP(), "write 9 or more", 8, min_rank=3)
    refused(MLP(), "min_rank 5 is above the largest rank of layers.2, 4", 30, min_rank=5)
    refused(MLP(), "write a budget of at least 46", 45, budget_unit="params")


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"rule": "l2"}, ValueError, "rule must be one of 'adaptive-l1', 'l1', not 'l2'"),
        ({"preset": "paper"}, ValueError, "preset must be one of 'default', 'reference'"),
        ({"gate_learning_rate": 1.0}, TypeError, "no setting of L1RA"),
        ({"budget_units": "ranks"}, TypeError, "did you mean 'budget_unit'"),
        ({"config": "reference"}, TypeError, "goes into preset="),
        ({"config": l1ra.L1RAConfig(), "preset": "default"}, ValueError, "not both"),
        ({"modules_to_save": "head"}, TypeError, r"write \['head'\]"),
        ({"modules_to_save": ["head"]}, ValueError, "no module is named 'head'"),
        ({"modules_to_save": [1]}, TypeError, "list of names"),
    ],
)
def test_bad_settings_are_refused(kwargs, error, message):
    refused(MLP(), message, 9, error=error, **kwargs)


def test_no_model_is_refused():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, not list"):
        l1ra.patch([], 9)


def test_a_second_patch_is_refused():
    model = MLP()
    l1ra.patch(model, 9)
    refused(model, "patched already", 9)
    refused(nn.Sequential(model), "patched already", 9)
    refused(Adapted(), "patched already", 9)


def test_a_second_controller_is_refused():
    model = Adapted()
    RankController(model, 10)
    with pytest.raises(ValueError, match="has a controller already"):
        RankController(model, 10)
    with pytest.raises(ValueError, match="no L1RALinear"):
        RankController(Residual(), 10)
    with pytest.raises(ValueError, match="budget=8 or more"):
        RankController(Adapted(), 7)


def test_a_peft_model_is_refused():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    refused(wrapped, "merge_and_unload", 40)
    refused(wrapped.base_model.model, "PEFT", 40)
    l1ra.patch(wrapped.merge_and_unload(), 40)  # as the message advises
