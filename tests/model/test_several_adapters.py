"""A model holds one set of adapters; several side by side are PEFT's."""

import copy
import itertools

import pytest
import torch
from helpers import MLP, assert_untouched, bert, gpt2, llama, shake, snapshot
from peft_helpers import lively, loaded, logits
from torch import nn

import l1ra
from l1ra.layers.adapted_model import find_adapters

peft = pytest.importorskip("peft")


def test_a_second_set_and_names_are_refused_with_the_way_to_several():
    model = MLP()
    with pytest.raises(TypeError, match=r"adapter_name: .* l1ra\.export_peft, .* PeftModel\.load_adapter"):
        l1ra.patch(model, 9, adapter_name="own")
    l1ra.patch(model, 9)
    before = snapshot(model)
    for settings in ({}, {"adapter_name": "one"}):
        with pytest.raises(ValueError, match=r"patched already: .* PeftModel\.load_adapter"):
            l1ra.patch(model, 9, **settings)
    assert_untouched(model, before)


def learned(base, seed, **settings):
    """A copy of ``base`` with adapters of uneven ranks, and with another head where it is trained."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    l1ra.patch(model, 45 + seed, **settings)
    for i, (_, layer) in enumerate(find_adapters(shake(model))):
        with torch.no_grad():
            layer.gate[:] = torch.linspace(1.4, 0.7, layer.rank)
            layer.gate[layer.rank - 1 - (i + seed) % 2 :] = 0
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name and "gate" not in name:
            nn.init.normal_(p, 0, 0.3)
    return model


@pytest.mark.parametrize("make, targets", [(llama, ["q_proj", "up_proj"]), (gpt2, ["c_attn"]), (bert, ["query"])])
def test_exported_adapters_live_beside_each_other_and_one_of_pefts_own(make, targets, tmp_path):
    base = lively(make())
    ours = {"one": learned(base, 1), "two": learned(base, 2, target_modules=targets)}
    task = "SEQ_CLS" if make is bert else None
    several = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=targets, task_type=task), adapter_name="own"
    )
    for p in several.parameters():
        if p.requires_grad:
            nn.init.normal_(p, 0, 0.3)
    expected = {"own": logits(several)}
    for name, model in ours.items():
        l1ra.export_peft(model, tmp_path / name)
        result = several.load_adapter(tmp_path / name, adapter_name=name)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if f".{name}." in key]
        expected[name] = logits(model)
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one - other).abs().max() > 0.1
    for name in ("own", "one", "own", "two", "one"):
        several.set_adapter(name)
        torch.testing.assert_close(logits(several), expected[name], rtol=1e-5, atol=1e-5)
    alone = loaded(copy.deepcopy(base), tmp_path / "one")
    torch.testing.assert_close(logits(alone), expected["one"], rtol=1e-5, atol=1e-5)
