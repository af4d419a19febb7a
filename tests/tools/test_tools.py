"""A training with each tool of ``tools.py``: ranks move, it is broken off, resumed, saved, and loaded elsewhere."""

import warnings
from pathlib import Path

import pytest
import torch
from tools import EXACT, HALF, STEPS, TOOLS, rows, table
from trainer_helpers import livelier, tokenizer

from l1ra.layers.adapted_model import find_adapters

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_ranks_move_and_the_training_resumes_and_its_result_is_loaded_elsewhere(tool, tmp_path):
    pytest.importorskip(tool.package.replace("-", "_"))
    torch.manual_seed(0)
    base = tmp_path / "base"
    livelier(tool.base()).save_pretrained(base)
    tokenizer().save_pretrained(base)
    whole_folder, folder = tmp_path / "whole", tmp_path / "broken"
    for made in (whole_folder, folder):
        made.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(L1RA|ranks? |adapter)")
        if tool.warns:
            warnings.filterwarnings("ignore", message=f".*{tool.warns}")
        whole, unbroken = tool.train(base, whole_folder, STEPS, STEPS, False)
        tool.train(base, folder, STEPS, HALF, False)
        model, controller = tool.train(base, folder, STEPS, STEPS, True)
    assert unbroken.moved > 0 and unbroken.steps == unbroken.total_steps == STEPS
    assert [entry["step"] for entry in unbroken.history] == [0, 3, 6, 9]
    if tool.resumes == EXACT:
        assert controller.history == unbroken.history
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    else:
        assert (controller.steps, controller.total_steps) == (STEPS, STEPS)

    want = tool.outputs(model, tool.inputs)
    loaded = tool.load(model, base, tmp_path / "saved")
    torch.testing.assert_close(tool.outputs(loaded, tool.inputs), want, atol=1e-5, rtol=1e-5)
    for _, layer in find_adapters(model):
        layer.lora_B.data.zero_()
    assert not torch.allclose(tool.outputs(model, tool.inputs), want, atol=1e-3)  # it has learnt something
    assert len({layer.rank for _, layer in find_adapters(model)}) > 1


def test_the_page_has_the_tools_that_are_tested():
    page = Path(__file__).resolve().parents[2] / "docs" / "tools.md"
    cells = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    found = [(tool, tested.split()[0], how, by, *(note or [""])) for tool, tested, how, by, *note in cells]
    assert found == rows(), f"docs/tools.md should have:\n{table()}"
