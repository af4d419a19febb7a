"""The report's numbers, its text and its pictures."""

import pytest
import torch
from helpers import MLP, Adapted, bert, full, llama, patched, step
from matplotlib.image import imread
from torch import nn

import l1ra
from l1ra.allocation.plan import LayerPlan
from l1ra.layers.linear import L1RALinear
from l1ra_kernels import choice


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
        numbers = [f"{row.smallest_gate:.3f}", f"{row.coherence:.2f}", f"{row.params:,}"]
        assert cells[1:7] == ["12 -> 12", str(row.rank), "4", *numbers]
    assert f"4 adapters  {'':8}  {sum(controller.ranks.values()):4}" in text
    assert f"budget 16 ranks, spare {controller.spare}; {controller.moved} ranks moved" in text
    assert "path: torch (plain PyTorch" in text
    limit = max(controller.config.min_coherence, max(row.coherence for row in report.rows) / 2)
    assert report.least_coherence == limit
    learning = [row.name for row in report.rows if row.coherence >= limit]
    assert f"{len(learning)} of 4 adapters could use more ranks: a coherence of {limit:.2f} or more" in text


def test_coherence_is_that_of_the_last_reallocation_once_there_was_one():
    model, controller, optimizer, x, y = patched(16)
    for number in range(1, 7):
        assert "more to learn" not in str(l1ra.report(model)), number
        step(model, optimizer, x, y)
    rows = l1ra.report(model).rows
    assert {row.name: row.coherence for row in rows} == controller.history[-1]["coherence"]
    assert all(-1 <= row.coherence <= 1 for row in rows)


def test_the_text_of_a_params_budget_and_a_head():
    model = bert()
    l1ra.patch(model, 5000, budget_unit="params")
    text = str(l1ra.report(model))
    assert "budget 5,000 params, spare" in text and "trained in full besides: 51 parameters" in text


def test_the_text_shows_projections_and_depths():
    model = bert()
    l1ra.patch(model, 60)
    model.bert.encoder.layer[0].output.dense.resize(full(4, 3))
    report = l1ra.report(model)
    lines = str(report).splitlines()
    lines = lines[lines.index("") + 1 :]
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert list(cells) == list(report.by_projection)
    assert cells["output.dense"] == ["2", "6.00", "4.50", "19.0%", f"{12 * 41 / report.params:.1%}"]
    assert lines[-1] == "ranks by depth, block by block: 0: 30, 1: 28, outside of blocks: 5"


def test_a_model_without_blocks_has_no_line_of_depths():
    report = l1ra.report(Adapted(rank=4))
    assert list(report.by_projection) == ["up", "down"] and report.by_depth == {None: 8}
    assert "by depth" not in str(report)


def test_without_a_controller_the_adapters_are_still_told():
    report = l1ra.report(Adapted(rank=4))
    assert [row.rank for row in report.rows] == [row.initial_rank for row in report.rows] == [4, 4]
    assert report.budget is None and "budget" not in str(report) and "2 adapters" in str(report)


def test_an_adapter_that_came_after_the_controller_is_told_too():
    model = MLP()
    l1ra.patch(model, 9)
    model.late = L1RALinear(4, 5, rank=2)
    *_, late = l1ra.report(model).rows
    assert (late.name, late.rank, late.initial_rank, late.coherence) == ("late", 2, 2, None)


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(ValueError, match="no adapter: call"):
        l1ra.report(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no controller"):
        l1ra.plot_ranks(Adapted(), "never.png")


def test_strict_raises_and_names_the_layers_that_run_as_plain_torch():
    model = patched()[0]
    message = r"plain PyTorch: blocks\.0, blocks\.1, blocks\.2, blocks\.3 \(plain PyTorch was asked for\)\.$"
    with choice.using("torch"), pytest.raises(RuntimeError, match=message):
        l1ra.report(model, strict=True)


@pytest.mark.skipif(not (choice.interpreting() or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
def test_strict_leaves_out_what_is_fused():
    model = patched()[0]
    with choice.using("fused"):
        assert {row.path for row in l1ra.report(model, strict=True).rows} == {"fused (chain)"}
        model.blocks[2].double()
        with pytest.raises(RuntimeError, match=r"plain PyTorch: blocks\.2 \(no fused kernel takes float64\)\.$"):
            l1ra.report(model, strict=True)


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
