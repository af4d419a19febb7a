"""The report's numbers, its text and its pictures."""

import pytest
import torch
from helpers import MLP, Adapted, bert, full, llama, patched, step
from matplotlib.image import imread
from torch import nn

import l1ra
from l1ra.allocation import LayerPlan
from l1ra.report import grid


def test_rows_say_what_is_there():
    model = MLP()
    controller = l1ra.patch(model, 9)
    model.layers[0].resize(full(3, 2))
    with torch.no_grad():
        model.layers[1].gate[2] = 0.25
    first, second, third = l1ra.report(model).rows
    assert (first.name, first.in_features, first.out_features) == ("layers.0", 6, 10)
    assert (first.rank, first.initial_rank, first.params) == (5, 3, 5 * (6 + 10 + 1))
    assert (second.rank, second.smallest_gate, third.smallest_gate) == (3, 0.25, 1.0)
    assert "torch" in first.path and controller.initial_ranks["layers.0"] == 3


def test_totals_add_up_to_the_trainable_parameters():
    model = bert()
    l1ra.patch(model, 40)
    report = l1ra.report(model)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert report.trained_in_full == head
    assert report.params + head == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (report.budget, report.spare, report.moved, report.budget_unit) == (40, 0, 0, "ranks")


def test_the_text_holds_every_layer_and_the_totals():
    model, controller, optimizer, x, y = patched(16)
    for _ in range(60):
        step(model, optimizer, x, y)
    report = l1ra.report(model)
    text = str(report)
    for row in report.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(row.name + " ")]
        cells = line.split("  ")
        cells = [cell.strip() for cell in cells if cell.strip()]
        assert cells[1:6] == ["12 -> 12", str(row.rank), "4", f"{row.smallest_gate:.3f}", f"{row.params:,}"]
    assert f"4 adapters  {'':8}  {sum(controller.ranks.values()):4}" in text
    assert f"budget 16 ranks, spare {controller.spare}; {controller.moved} ranks moved" in text
    assert "path: torch (plain PyTorch" in text


def test_the_text_of_a_params_budget_and_a_head():
    model = bert()
    l1ra.patch(model, 5000, budget_unit="params")
    text = str(l1ra.report(model))
    assert "budget 5,000 params, spare" in text and "trained in full besides: 51 parameters" in text


def test_without_a_controller_the_adapters_are_still_told():
    report = l1ra.report(Adapted(rank=4))
    assert [row.rank for row in report.rows] == [row.initial_rank for row in report.rows] == [4, 4]
    assert report.budget is None and "budget" not in str(report) and "2 adapters" in str(report)


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(ValueError, match="no adapter: call"):
        l1ra.report(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no controller"):
        l1ra.plot_ranks(Adapted(), "never.png")


def test_names_are_cut_into_layer_and_projection():
    ranks = {"model.layers.0.mlp.up": 3, "model.layers.10.mlp.up": 5, "model.layers.10.q": 2, "pooler.dense": 7}
    layers, projections, cells = grid(ranks)
    assert layers == [-1, 0, 10] and projections == ["mlp.up", "q", "pooler.dense"]
    assert cells == {(0, "mlp.up"): 3, (10, "mlp.up"): 5, (10, "q"): 2, (-1, "pooler.dense"): 7}


def test_layers_that_have_no_parts_are_one_projection():
    assert grid({"blocks.0": 1, "blocks.1": 4}) == ([0, 1], ["blocks"], {(0, "blocks"): 1, (1, "blocks"): 4})
    assert grid({"0": 1, "2": 4}) == ([0, 2], ["layer"], {(0, "layer"): 1, (2, "layer"): 4})


def test_stacks_of_layers_are_kept_apart():
    cells = grid({"encoder.layer.0.q": 1, "decoder.layer.0.q": 4, "encoder.layer.0.experts.3.up": 2})[2]
    expected = {"encoder.layer.q": 1, "decoder.layer.q": 4, "encoder.layer.experts.3.up": 2}
    assert cells == {(0, name): rank for name, rank in expected.items()}


@pytest.mark.parametrize("make", [MLP, llama])
def test_plot_ranks_writes_a_picture(tmp_path, make):
    model = make()
    l1ra.patch(model, 40)
    path = tmp_path / "new" / "ranks.png"
    assert l1ra.plot_ranks(model, path) == path
    picture = imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 500 and picture[..., :3].std() > 0.05


def test_the_picture_follows_the_ranks(tmp_path):
    model, controller, optimizer, x, y = patched()
    before = imread(l1ra.plot_ranks(model, tmp_path / "before.png"))
    for _ in range(60):
        step(model, optimizer, x, y)
    after = imread(l1ra.plot_ranks(model, tmp_path / "after.png"))
    assert controller.moved > 0 and (before.shape != after.shape or (before != after).any())


def test_a_layer_resized_by_hand_shows_at_once():
    model = Adapted(rank=4)
    l1ra.RankController(model, 8)
    model.up.resize(LayerPlan((0, 2)))
    assert [row.rank for row in l1ra.report(model).rows] == [2, 4] and l1ra.report(model).spare == 2
