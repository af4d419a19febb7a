"""Recovering a damaged model: what the damages do, what counts as error, and that adapters can mend it."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from quality_helpers import CLASSES, examples, put_tiny_tasks, spec
from torch import nn

from benchmarks.quality import damages, recovery, runs, training


def nothing(model):
    pass


def shake(model):
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)


def batch_of(found, numbers):
    batch = training.collate(found.test, np.asarray(numbers), CLASSES, 0, torch.device("cpu"))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(("features", "bits"), [(64, 3), (150, 2), (7, 8)])
def test_rounding_leaves_few_levels_and_half_a_step_of_error(features, bits):
    model = nn.Sequential(nn.Linear(features, 5), nn.LayerNorm(5))
    with torch.no_grad():
        model[0].weight[1, :64] = 0.0
    before = copy.deepcopy(model.state_dict())
    damages.round_weights(model, bits)
    for group, old in zip(model[0].weight.split(64, 1), before["0.weight"].split(64, 1), strict=True):
        for row, was in zip(group, old, strict=True):
            assert len(row.unique()) <= 2**bits
            assert (row - was).abs().max() <= was.abs().max() / (2 ** (bits - 1) - 1) * 0.5001
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize(("features", "share", "gone"), [(64, 0.5, 32), (7, 0.5, 3), (10, 0.0, 0)])
def test_pruning_takes_the_smallest_weights_of_each_row(features, share, gone):
    model = nn.Sequential(nn.Linear(features, 5), nn.LayerNorm(5))
    before = copy.deepcopy(model.state_dict())
    damages.prune_weights(model, share)
    for row, was in zip(model[0].weight, before["0.weight"], strict=True):
        kept = row != 0
        assert torch.equal(row[kept], was[kept]) and int((~kept).sum()) == gone
        assert gone == 0 or was[~kept].abs().max() <= was[kept].abs().min()
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_layers_are_taken_out_of_the_copy_alone(folders):
    model = recovery.load(folders["bert"], partial(damages.without_layers, numbers=(0,)))
    original = model._original[0]
    assert len(model.student.encoder.layer) == model.config.num_hidden_layers == 1
    assert len(original.encoder.layer) == original.config.num_hidden_layers == 2
    kept, old = model.student.encoder.layer[0].state_dict(), original.encoder.layer[1].state_dict()
    assert all(torch.equal(kept[name], old[name]) for name in old)


def test_the_original_is_nobodys_submodule_and_what_is_not_damaged_agrees(folders):
    model, found = recovery.load(folders["bert"], nothing), examples(CLASSES)
    original = model._original[0]
    mine = set(map(id, model.parameters()))
    assert not any(id(p) in mine or p.requires_grad for p in original.parameters())
    model.train()  # there is no dropout
    assert model(**batch_of(found, range(6))).loss == 0
    assert recovery.judge(model, found.test, found) == (0.0, 1.0)


def test_padding_and_batches_make_no_difference_to_the_error(folders, monkeypatch):
    model = recovery.load(folders["bert"], shake).eval()
    found = examples(CLASSES)
    error, agreement = recovery.judge(model, found.test, found)
    assert error > 0 and 0 <= agreement < 1
    alone = [model(**batch_of(found, [n])) for n in range(len(found.test))]
    sizes = [a.wanted.square().sum().item() for a in alone]
    expected = sum(a.loss.item() * size for a, size in zip(alone, sizes, strict=True)) / sum(sizes)
    assert error == pytest.approx(expected, rel=1e-4)
    means = [torch.stack([getattr(a, name)[0].mean(0) for a in alone]) for name in ("hidden", "wanted")]
    nearest = []
    for rows in means:
        cosines = nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
        nearest.append(cosines.argmax(1))
    assert agreement == (nearest[0] == nearest[1]).double().mean().item()
    monkeypatch.setattr(training, "EVALUATED_TOKENS", 20)
    assert recovery.judge(model, found.test, found) == (pytest.approx(error, rel=1e-4), agreement)


def test_a_language_model_agrees_where_the_same_token_is_the_likeliest(folders):
    whole, broken = (recovery.load(folders["llama"], damage) for damage in (nothing, shake))
    found = examples(0)
    assert recovery.judge(whole, found.test, found) == (0.0, 1.0)
    error, agreement = recovery.judge(broken, found.test, found)
    same = []
    for n in range(len(found.test)):
        ids = torch.tensor(found.test.tokens(n))[None]
        told = broken(ids, torch.ones_like(ids))
        same += (told.head(told.hidden).argmax(-1) == told.head(told.wanted).argmax(-1)).flatten().tolist()
    assert error > 0 and 0 < agreement < 1 and agreement == pytest.approx(sum(same) / len(same))


@pytest.mark.filterwarnings("ignore:no rank will move")  # so few steps
@pytest.mark.parametrize("task", ["damaged-bert", "damaged-llama"])
def test_adapters_mend_what_was_damaged(task, tmp_path, monkeypatch, folders):
    put_tiny_tasks(monkeypatch, folders)
    frozen = runs.run(spec(tmp_path, "frozen", 0, rate=0.0, task=task))
    for method in ("lora", "l1ra"):
        record = runs.run(spec(tmp_path, method, task=task, multiplier=4))
        assert record["metric"] == "agreement" and record["head_parameters"] == 0
        assert record["test_loss"] < 0.9 * frozen["test_loss"]
