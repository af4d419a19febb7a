"""Saved and loaded: bit for bit, whole or not at all, and never into the wrong model."""

import json
import os
import sys

import pytest
import torch
from helpers import (
    Adapted,
    as_lists,
    assert_untouched,
    bert,
    little_room,
    patched,
    same_bits,
    snapshot,
    step,
    tokens,
    trainable,
)
from torch import nn

import l1ra
from l1ra.files.checkpoint import _digest
from l1ra.layers.adapted_model import find_adapters


def run_to(steps, model, controller, optimizer, x, y):
    while controller.steps < steps:
        step(model, optimizer, x, y)
    return model, controller, optimizer, x, y


def made(**settings):
    torch.manual_seed(0)
    return patched(**settings)


def fresh():
    """The model as it was before it was patched."""
    model = made()[0]
    return l1ra.unpatch(model)


def assert_same(model, other):
    expected = dict(other.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    assert all(same_bits(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("at", [0, 11, 17, 21, 24])
@pytest.mark.parametrize("into", ["a fresh model", "a patched one"])
def test_a_run_goes_on_from_a_folder_bit_for_bit(at, into, tmp_path):
    whole, first = (run_to(steps, *made()) for steps in (60, at))
    first[1].save(tmp_path)
    model = fresh() if into == "a fresh model" else run_to(9, *made(seed=9))[0]
    controller = l1ra.load(model, tmp_path)
    assert controller is l1ra.layers.adapted_model.controller_of(model) and controller.steps == at
    assert_same(model, first[0])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    optimizer.load_state_dict(first[2].state_dict())
    run_to(60, model, controller, optimizer, *first[3:])
    assert controller.history == whole[1].history and controller.moved == whole[1].moved > 0
    assert_same(model, whole[0])


@pytest.mark.parametrize("settings", [{"reserve": 10}, {"adapter_dtype": "bfloat16"}, {"budget_unit": "params"}])
def test_only_live_rows_are_written_in_their_own_dtype(settings, tmp_path):
    from safetensors.torch import load_file

    budget = 16 * 24 if "budget_unit" in settings else 16
    model, controller, *_ = run_to(24, *made(budget=budget, **settings))
    controller.save(tmp_path)
    (file,) = tmp_path.glob("adapters-*.safetensors")
    found = load_file(file)
    for name, layer in find_adapters(model):
        assert found[f"{name}.lora_A"].shape == (layer.rank, 12) and found[f"{name}.gate"].shape == (layer.rank,)
        assert found[f"{name}.lora_B"].dtype == layer.lora_B.dtype
    loaded = fresh()
    assert l1ra.load(loaded, tmp_path).config == controller.config
    assert_same(loaded, model)


def test_a_trained_head_comes_along_and_stays_trainable(tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    plain = model.state_dict()
    controller = l1ra.patch(model, 40, total_steps=10)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not name.endswith("gate"):
                p.add_(0.1 * torch.randn_like(p))
    controller.save(tmp_path)
    other = bert().eval()
    other.load_state_dict(
        {name: value for name, value in plain.items() if not name.startswith("classifier")}, strict=False
    )
    l1ra.load(other, tmp_path)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags and flags["classifier.weight"]


def test_models_of_ones_own_are_saved_and_loaded(tmp_path):
    model = Adapted()
    controller = l1ra.RankController(model, 12, total_steps=50)
    with torch.no_grad():
        model.down.lora_B.normal_()
    controller.save(tmp_path)
    other = Adapted(rank=2)
    other.load_state_dict({n: v for n, v in model.state_dict().items() if "base" in n}, strict=False)
    other.up.scaling = other.down.scaling = model.up.scaling
    controller = l1ra.load(other, tmp_path, auto=False)
    assert controller.ranks == {"up": 4, "down": 4} and controller.spare == 4
    assert torch.equal(other(torch.ones(3, 6)), model(torch.ones(3, 6)))


def damage_json(folder):
    (folder / "l1ra.json").write_text("{")


def cut_off_json(folder):
    file = folder / "l1ra.json"
    file.write_bytes(file.read_bytes()[:-40])


def change_json(signed=True, **values):
    def change(folder):
        file = folder / "l1ra.json"
        index = json.loads(file.read_text())
        digest = index.pop("sha256")
        index |= values
        file.write_text(json.dumps({**index, "sha256": _digest(index) if signed else digest}))

    return change


def tensors(kind, action):
    def change(folder):
        (file,) = folder.glob(f"{kind}-*.safetensors")
        action(file)

    return change


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, "no index of an L1RA checkpoint"),
        (cut_off_json, "no index of an L1RA checkpoint"),
        (change_json(trained=["x"], signed=False), r"l1ra\.json is damaged: its checksum is wrong"),
        (change_json(format=2, signed=False), "format 2, this version of l1ra reads 1: install a newer l1ra"),
        (tensors("adapters", flip_a_bit), "safetensors is damaged: its checksum is wrong"),
        (tensors("controller", lambda file: file.write_bytes(file.read_bytes()[:100])), "its checksum is wrong"),
        (tensors("adapters", os.unlink), "its adapters can't be read"),
        (
            change_json(adapters={"blocks.0": [12, 13]}),
            "12 -> 13 at blocks.0, this model has 12 -> 12 there|other adapters",
        ),
        (
            change_json(adapters={"other": [3, 3]}),
            "at other, this model has no layer that can be adapted|other adapters",
        ),
        (change_json(trained=["blocks.0.lora_A"]), "it has a trained blocks.0.lora_A"),
    ],
)
@pytest.mark.parametrize("patch", [False, True])
def test_a_checkpoint_that_is_damaged_or_of_another_model_changes_nothing(damage, message, patch, tmp_path):
    run_to(20, *made())[1].save(tmp_path)
    damage(tmp_path)
    model = run_to(15, *made())[0] if patch else fresh()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)


def test_a_checkpoint_of_another_budget_changes_nothing(tmp_path):
    run_to(20, *made(budget=20))[1].save(tmp_path)
    model, controller, *_ = run_to(15, *made())
    before, ranks = snapshot(model), controller.ranks
    with pytest.raises(ValueError, match="budget 20, this controller 16"):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)
    assert controller.ranks == ranks and controller.steps == 15


def test_a_checkpoint_with_more_ranks_than_are_reserved_changes_nothing(tmp_path):
    run = run_to(31, *made())
    run[1].save(tmp_path)
    assert max(run[1].ranks.values()) > 4
    model = made(reserve=4)[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has rank \d in the checkpoint, and room for 4 here"):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)


def test_a_merged_model_is_not_loaded_into(tmp_path):
    model, controller, *_ = run_to(20, *made())
    controller.save(tmp_path)
    run_to(31, model, controller, *_)
    l1ra.merge(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"blocks\.0 is merged: call l1ra\.unmerge\(model\)"):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)


def test_a_checkpoint_whose_gates_hold_a_scale_is_not_loaded_where_they_hold_none(tmp_path):
    run_to(31, *made())[1].save(tmp_path)
    model = made(scale_with_rank=False)[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"scale_with_rank=True at blocks\.0, this model False"):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pass the folder that controller.save\(folder\) has written"):
        l1ra.load(fresh(), tmp_path / "nowhere")


@pytest.mark.parametrize("broken", range(3))
def test_a_save_that_is_broken_off_leaves_the_old_checkpoint_whole(broken, tmp_path, monkeypatch):
    first = run_to(20, *made())
    first[1].save(tmp_path)
    expected = {name: p.detach().clone() for name, p in first[0].named_parameters()}
    run_to(31, *first)
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == broken + 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        first[1].save(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.partial"))
    model = fresh()
    assert l1ra.load(model, tmp_path).steps == 20
    assert all(same_bits(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
@pytest.mark.parametrize("fits", ["nothing", "the adapters"])
def test_a_save_onto_a_full_disk_says_where_and_leaves_the_old_checkpoint_whole(fits, tmp_path):
    run = run_to(20, *made())
    run[1].save(tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    sizes = [len(content) for name, content in old.items() if name.startswith(("adapters", "controller"))]
    run_to(31, *run)
    with little_room(0 if fits == "nothing" else sum(sizes) // 2), pytest.raises(OSError, match=str(tmp_path)):
        run[1].save(tmp_path)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert left.items() >= old.items() and not any(name.endswith(".partial") for name in left)
    assert l1ra.load(fresh(), tmp_path).steps == 20
    run[1].save(tmp_path)
    assert l1ra.load(fresh(), tmp_path).steps == 31 and len(list(tmp_path.iterdir())) == 3


class Cut(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("owner, when", [(l1ra.RankController, "after"), (nn.Module, "before"), (nn.Module, "after")])
@pytest.mark.parametrize("patch", [False, True])
def test_a_load_that_is_broken_off_changes_nothing(patch, owner, when, tmp_path, monkeypatch):
    run_to(20, *made())[1].save(tmp_path)
    model, controller, *_ = run_to(15, *made()) if patch else (fresh(), None)
    before, state = snapshot(model), controller and as_lists(controller.state_dict())
    works, tries = owner.load_state_dict, []

    def cut(*args, **kwargs):
        tries.append(1)
        if len(tries) > 1 or when == "after":
            found = works(*args, **kwargs)
        if len(tries) == 1:
            raise Cut
        return found

    monkeypatch.setattr(owner, "load_state_dict", cut)
    with pytest.raises(Cut):
        l1ra.load(model, tmp_path)
    assert_untouched(model, before)
    assert l1ra.layers.adapted_model.controller_of(model) is controller
    assert controller is None or as_lists(controller.state_dict()) == state
    assert l1ra.load(model, tmp_path).steps == 20


def test_saving_again_replaces_the_old_checkpoint_and_nothing_else(tmp_path):
    run = run_to(20, *made())
    run[1].save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run_to(31, *run)[1].save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / "notes.txt").read_text() == "mine"
    assert l1ra.load(fresh(), tmp_path).steps == 31


def test_a_model_put_back_to_an_earlier_state_is_what_is_saved(tmp_path):
    """As early stopping does: the best state dict, then the end of the training, then the best once more."""
    model, controller, *rest = run_to(22, *made())
    best = {name: value.clone() for name, value in model.state_dict().items()}
    ranks = dict(controller.ranks)
    run_to(60, model, controller, *rest)
    assert controller.ranks != ranks
    model.load_state_dict(best)
    assert {name: len(row) for name, row in controller.gates().items()} == controller.ranks == ranks
    controller.save(tmp_path)
    again = fresh()
    l1ra.load(again, tmp_path)
    assert_same(again, model)


def test_what_is_trained_beside_an_adapter_is_saved(tmp_path):
    model, controller, *rest = made()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.requires_grad_(True)
    rest[0].add_param_group({"params": [p for n, p in model.named_parameters() if n.endswith("base_layer.bias")]})
    run_to(10, model, controller, *rest)
    controller.save(tmp_path)
    for again in (fresh(), made(seed=9)[0]):
        l1ra.load(again, tmp_path)
        assert_same(again, model)
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_buffers_and_tensors_in_another_order_are_saved(tmp_path):
    def model():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))
        return body.to(memory_format=torch.channels_last)

    first = model()
    controller = l1ra.patch(first, 2, modules_to_save=["0", "1"])
    first(torch.randn(8, 3, 4, 4) + 3)
    controller.save(tmp_path)
    again = model()
    l1ra.load(again, tmp_path)
    assert torch.equal(again[1].running_mean, first[1].running_mean) and first[1].running_mean.abs().sum() > 0
    assert_same(again, first)
