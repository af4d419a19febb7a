"""The examples, launched by torchrun in two processes: both end alike, ranks move, and PEFT loads what was exported."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_bits
from torch import distributed

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FSDP2 = {  # as accelerate launch --use_fsdp sets it
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO3 = {  # as accelerate launch --use_deepspeed sets it
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_USE_CPU": "false",  # else accelerate takes no DeepSpeed
    "DS_ACCELERATOR": "cpu",
}
CASES = {  # name -> command, needed libraries, environment, what a process holds of the adapters
    "own loop": ("own_loop.py", "", {}, "whole"),
    "TRL, FSDP 2": ("sft.py", "trl", FSDP2, "parts"),
    "TRL, ZeRO 3": ("sft.py", "trl deepspeed", ZERO3, "parts"),
}


def launch(folder, command, environment=None, processes=2):
    """What each process has written, and what all of them have printed."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # it takes minutes
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/pages/launched_example.py"), str(folder), *command.split(), "--steps", "120"],
        env={**inherited, **paths, **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(processes)]
    return found, done.stdout


def check(found, printed, held):
    first, second = found
    assert first["said"] == second["said"] == []
    assert first["held"] == second["held"] == held
    assert first["steps"] == second["steps"] == 120
    assert first["history"] == second["history"] and first["history"][-1]["ranks"] != first["history"][0]["ranks"]
    if held == "whole":
        assert all(same_bits(value, second["trained"][name]) for name, value in first["trained"].items())
    assert printed.count("ranks moved") >= 2  # in the report and below it


def check_export(folder, ranks, monkeypatch):
    """The export holds the ranks that the training ended with, and has learned."""
    peft = pytest.importorskip("peft")
    monkeypatch.syspath_prepend(ROOT / "examples")
    common = importlib.import_module("common")
    model, tokenizer = common.load(None)
    loader = common.loader(None, tokenizer, batch_size=8)
    with torch.no_grad():
        before = sum(model(**batch).loss for batch in loader)
        lora = peft.PeftModel.from_pretrained(model, folder)
        after = sum(lora(**batch).loss for batch in loader)
    assert after < 0.7 * before
    prefix = "base_model.model."
    loaded = {n.removeprefix(prefix): m.r["default"] for n, m in lora.named_modules() if hasattr(m, "lora_A")}
    assert loaded == ranks


@pytest.mark.parametrize("name", CASES)
def test_an_example_trains_in_two_processes_alike(name, tmp_path, monkeypatch):
    command, libraries, environment, held = CASES[name]
    for library in libraries.split():
        pytest.importorskip(library)
    exports = command == "sft.py"
    found, printed = launch(tmp_path / "run", f"{command} --out {tmp_path}/lora" if exports else command, environment)
    check(found, printed, held)
    if exports:
        check_export(tmp_path / "lora", found[0]["history"][-1]["ranks"], monkeypatch)


def test_a_loop_with_fsdp_2_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    whole, printed = launch(tmp_path / "whole", f"fsdp2.py --save-every 60 --out {tmp_path}/lora")
    check(whole, printed, "parts")
    check_export(tmp_path / "lora", whole[0]["history"][-1]["ranks"], monkeypatch)
    again = f"fsdp2.py --resume {tmp_path}/lora/checkpoint-60 --out {tmp_path}"
    resumed, _ = launch(tmp_path / "resumed", f"{again}/again")
    assert [part["history"] for part in resumed] == [part["history"] for part in whole]
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("lora", "again")]
    assert weights[0] == weights[1]


def test_the_example_of_fsdp_2_says_how_it_is_launched(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["fsdp2.py"])
    with pytest.raises(SystemExit, match=r"launch it as torchrun --nproc-per-node 2 examples/fsdp2\.py"):
        runpy.run_path(str(ROOT / "examples/fsdp2.py"), run_name="__main__")
