"""The benchmark of adapted layers against PEFT, tiny: what it prints and writes, and that a wrong result stops it."""

import json

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import layer

TINY = ["--shapes", "32x48", "--tokens", "16", "--rank", "4", "--rounds", "3", "--batch", "2", "--length", "8"]
LITTLE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True)
def _little_model(monkeypatch):
    more = {"vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    monkeypatch.setattr(layer, "MINILM", {**LITTLE, **more})


def test_layer_and_model_rows_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "results" / "layer.json"
    assert layer.main([*TINY, "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text(encoding="utf-8"))
    linear, *models = results["rows"]
    assert [row["probing"] for row in models] == [False, True]
    assert (linear["M"], linear["K"], linear["N"], linear["r"]) == (16, 32, 48, 4)
    for row in (linear, *models):
        assert layer.name_of(row) in printed
        assert row["path"].startswith("torch (")
        assert row["ours_over_peft_percent"]["n"] == 3
        for name in ("frozen", "PEFT default", "ours"):
            ms = row["ms"][name]
            assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]
    assert set(linear["parts_ms"]["ours"]) == {"forward", "backward"}
    assert all(set(row["parts_ms"]["ours"]) == {"forward", "backward", "update"} for row in models)
    found = results["environment"]
    assert found["processor"] in printed and found["packages"]["torch"] in printed
    assert found["cpu_threads"] == torch.get_num_threads() and found["seed"] == 0
    assert linear["path"] in printed


def test_a_model_that_disagrees_with_peft_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(layer, "MODEL_BOUNDS", {torch.float32: 0.0})
    assert layer.main([*TINY, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing is reported: the model with L1RA differs" in captured.err


def test_shapes_say_how_to_write_them(capsys):
    with pytest.raises(SystemExit):
        layer.main(["--shapes", "384"])
    assert "write inputs and outputs as 384x1536" in capsys.readouterr().err
