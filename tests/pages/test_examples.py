"""The examples, as they stand, with tiny sizes: they run to their end, the loss falls, ranks move."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMANDS = {
    "sft.py": "trl",
    "sft.py --bf16 --gradient-checkpointing --optim adamw_8bit": "trl bitsandbytes",
    "sft.py --optim schedule_free_adamw": "trl schedulefree",
    "dpo.py": "trl",
    "accelerate_loop.py --mixed-precision bf16": "accelerate",
    "own_loop.py": "",
    "own_loop.py --optimizer adamw-8bit": "bitsandbytes",
    "own_loop.py --optimizer schedule-free": "schedulefree",
    "own_loop.py --compile eager": "",
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run an example as a command would; loss before and after, ranks moved."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # which remembers the precision

    def run(command):
        name, *arguments = command.split()
        out = ["--out", str(tmp_path)] if name in ("sft.py", "dpo.py") else []
        monkeypatch.setattr(sys, "argv", [name, "--steps", "120", *arguments, *out])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        return [float(n) for n in re.search(r"data ([\d.]+) -> ([\d.]+), .*?(\d+) ranks moved", printed).groups()]

    yield run
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_trains_and_moves_ranks(command, run, tmp_path):
    for library in COMMANDS[command].split():
        pytest.importorskip(library)
    before, after, moved = run(command)
    assert after < 0.97 * before and moved > 0
    assert (tmp_path / "adapter_config.json").exists() == command.startswith(("sft", "dpo"))


@pytest.mark.parametrize("name", ["sft.py", "dpo.py", "own_loop.py"])
def test_an_example_takes_a_model_and_data_of_the_users_own(name, run, monkeypatch, tmp_path):
    if name != "own_loop.py":
        pytest.importorskip("trl")
    monkeypatch.syspath_prepend(EXAMPLES)
    common = importlib.import_module("common")
    for part in common.load(None):
        part.save_pretrained(tmp_path / "model")
    rows = common.preferences() if name == "dpo.py" else common.questions()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, after, moved = run(f"{name} --model {tmp_path}/model --data {tmp_path}/data.jsonl --budget 35")
    assert after < 0.97 * before and moved > 0
