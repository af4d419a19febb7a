"""The benchmark of host time, tiny, in processes of its own: here Triton may be in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")

from benchmarks import host

ROOT = Path(__file__).resolve().parents[2]

COUNT = """
from benchmarks import host
launched = []
host._launch_nothing = lambda *args: launched.append(args)
with host.fused_without_a_gpu():
    case = host.CASES["decoder layer, seven linears"]
    model = host.adapted(case)[host.OURS]
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [host.torch.randn(s, dtype=host.torch.bfloat16).requires_grad_() for s in case.inputs]
    for _ in range(3):
        launched.clear()
        host.step(model, inputs, parameters)
        count = len(launched)  # the optimizer's step launches that of the gates
        assert all(p.grad is not None for p in parameters)
        host.torch.optim.SGD(parameters, lr=0.0).step()
    print(count, {layer.probe for layer in model.modules() if hasattr(layer, "probe")})
"""


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_row_for_each_case_with_all_four_and_their_launches():
    printed = run("-m", "benchmarks.host", "--tiny", "--only", "one linear, x (M, K)", "q, k, v")
    rows = [line for line in printed.splitlines() if line.startswith(("| one linear", "| q, k, v"))]
    assert len(rows) == 2
    for row in rows:
        numbers = [float(cell) for cell in row.split("|")[2:6]]
        assert all(number > 0 for number in numbers)
    assert "2 / 17 / 12 / 8" in rows[0] and "8 / 53 / 38 / 12" in rows[1]


def test_a_decoder_layer_launches_as_often_as_the_table_says():
    case = host.CASES["decoder layer, seven linears"]
    products = 2 * 7
    assert (
        run("-c", COUNT).split()
        == [str(case.launches(host.OURS, shared=True) - products), "{None}"]
        == ["24", "{None}"]
    )
