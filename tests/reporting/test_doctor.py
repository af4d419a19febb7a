"""The doctor: it says what is there and which path runs and why, and finds what is wrong, in words."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import little_room

import l1ra
from l1ra.reporting import self_check
from l1ra.training.controller import RankController
from l1ra.training.reallocation import Reallocation
from l1ra_kernels import choice, dispatch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def failed(found):
    return {check.name: check.message for check in found if check.ok is False}


def test_a_machine_that_is_well():
    state = torch.get_rng_state()
    diagnosis = l1ra.doctor()
    assert diagnosis.ok and torch.equal(torch.get_rng_state(), state)
    tried = {(check.name, check.dtype) for check in diagnosis.checks}
    assert {("nn.Linear", str(dtype).removeprefix("torch.")) for dtype in self_check.DTYPES} < tried
    assert {"transformers' Conv1D", "bitsandbytes' Linear4bit", "a reallocation", "save and load"} < {
        w for w, _ in tried
    }
    text = str(diagnosis)
    assert f"torch {torch.__version__}" in text and f"l1ra {l1ra.__version__}" in text
    assert f"tried on {diagnosis.device}:" in text and "cpu: " in text
    if diagnosis.device == "cpu":
        assert "path [1]: torch (plain PyTorch is the path on cpu)" in text
    assert text.splitlines()[-1].startswith(f"all {sum(c.ok is not None for c in diagnosis.checks)} checks are ok (")


@pytest.mark.skipif(not choice.interpreting(), reason="needs triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "what, path",
    [
        ("nn.Linear", "fused (chain)"),
        (self_check.AUGMENTED, "fused (aug)"),
        ("bitsandbytes' Linear4bit", "fused (add: a Linear4bit has a forward of its own)"),
    ],
)
def test_the_kernels_are_tried_where_they_run(what, path):
    if "bitsandbytes" in what:
        pytest.importorskip("bitsandbytes")
    with choice.using("fused"):
        check = self_check._check_layer(what, self_check.LAYERS[what], CPU, torch.float16)
        assert (check.path, check.ok) == (path, True), check
        assert self_check._check_layer(what, self_check.LAYERS[what], CPU, torch.bfloat16).ok is None


def scaled(index, factor):
    """``plain_linear`` with a wrong output (0) or a wrong gradient of x, A, gate or B (1 to 4)."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    def wrong(x, layer):
        parts = [x, layer.a, layer.gate, layer.b]
        if index:
            parts[index - 1] = Scaled.apply(parts[index - 1])
        y = right(parts[0], layer._replace(a=parts[1], gate=parts[2], b=parts[3]))
        return y if index else y * factor

    right = dispatch.plain_linear
    return wrong


@pytest.mark.parametrize("index, part", list(enumerate(self_check.COMPARED)))
def test_a_wrong_output_or_gradient_is_found(index, part, monkeypatch):
    monkeypatch.setattr(dispatch, "plain_linear", scaled(index, 1.1))
    with choice.using("torch"):
        found = failed(self_check.run_checks(CPU))
    assert found["nn.Linear"].startswith(f"{part} has a relative error of 1.0e-01")
    assert "bitsandbytes' Linear4bit" not in found  # which has another path


def test_a_reallocation_that_changes_the_model_is_found(monkeypatch):
    inner = RankController._reallocate

    def wrong(self):
        inner(self)
        self._layers[0].lora_B.mul_(1.01)

    monkeypatch.setattr(RankController, "_reallocate", wrong)
    assert self_check._check_operation("a reallocation", self_check._reallocate, CPU).message.startswith(
        "it changes the model's"
    )
    monkeypatch.setattr(RankController, "_reallocate", lambda self: self._record(Reallocation(0, 0, {})))
    assert "0 ranks have moved" in self_check._check_operation("a reallocation", self_check._reallocate, CPU).message


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_a_checkpoint_that_does_not_come_back_is_found(monkeypatch):
    def lossy(model, folder, **kwargs):
        controller = l1ra.load(model, folder, **kwargs)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1)
        return controller

    with little_room(100):
        found = self_check._check_operation("save and load", self_check._save_and_load, CPU)
    assert found.ok is False and found.message.startswith("OSError: ")
    monkeypatch.setattr(self_check, "load", lossy)
    assert (
        self_check._check_operation("save and load", self_check._save_and_load, CPU).message
        == "the loaded model differs from the saved one"
    )


def test_the_command_fails_if_a_check_does(monkeypatch, capsys):
    def run_checks(device):
        return [self_check.Check("a reallocation", "", "", False, "it was wrong")]

    monkeypatch.setattr(sys.modules["l1ra.reporting.doctor"], "run_checks", run_checks)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("l1ra", run_name="__main__")
    assert ended.value.code
    assert "FAILED: it was wrong" in (text := capsys.readouterr().out) and "1 of 1 checks FAILED" in text


@pytest.mark.parametrize(
    "blocked, kernels, status, told",
    [
        (["triton", "transformers", "bitsandbytes"], "auto", 0, ["not tried: bitsandbytes can't be imported"]),
        (["triton"], "fused", 1, ["RuntimeError: fused kernels are wanted for tensors on", "checks FAILED"]),
        ([], "fsued", 1, ["ValueError: L1RA_KERNELS must be one of auto, torch, fused", "L1RA_KERNELS=fsued"]),
    ],
)
def test_what_is_missing_or_set_wrong_is_told_without_a_traceback(blocked, kernels, status, told):
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({blocked}); runpy.run_module('l1ra', None, '__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "L1RA_KERNELS": kernels, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == status, done.stderr
    assert all(words in done.stdout for words in told), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
