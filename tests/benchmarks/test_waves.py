"""Occupancy of the launches, as compiled for an sm_90; and how many launches a decoder layer takes.

benchmarks/waves.py does it, in a process of its own: here Triton may be in its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to ask")

import triton

import l1ra
from benchmarks import waves
from benchmarks.gpu.problem import DecoderLinears
from benchmarks.roofline import MODELS
from l1ra_kernels import choice, configs
from l1ra_kernels.launch import redirected

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results" / "waves.csv"


def in_a_process(program: str):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rows():
    """Of all settings, compiled by the installed triton."""
    every = "[row for setting in waves.SETTINGS for row in waves.rows('sm_90', *setting, 16)]"
    return in_a_process(f"import json; from benchmarks import waves; print(json.dumps({every}))")


def test_every_streaming_kernel_has_programs_for_all_multiprocessors_two_at_a_time(rows):
    streaming = [row for row in rows if row["kernel"] in waves.STREAMING]
    assert {row["kernel"] for row in streaming} == set(waves.STREAMING)
    for row in streaming:
        assert row["programs"] >= configs.PROCESSORS, row
        assert row["blocks"] >= 2, row


def test_as_many_blocks_fit_a_multiprocessor_as_the_tiles_say(rows):
    for row in rows:
        if row["kernel"] in waves.STREAMING:
            assert row["blocks"] >= row["cut_for"], row


def test_multiprocessors_are_busy_most_of_the_time(rows):
    for row in rows:
        if row["kernel"] in waves.STREAMING:
            assert row["busy"] >= 0.85, row


def test_the_kept_rows_are_those_of_the_installed_triton(rows):
    kept = [row for row in waves.read(KEPT) if row["triton"] == triton.__version__]
    if not kept:
        pytest.skip(f"no rows of triton {triton.__version__} are kept")
    found = [{name: str(value) for name, value in row.items()} for row in rows]
    assert kept == found, f"run python -m benchmarks.waves --csv {KEPT.relative_to(ROOT)} again"


def test_the_page_has_the_table_of_the_kept_rows():
    first = [row for row in waves.read(KEPT) if (row["model"], int(row["tokens"])) == waves.SETTINGS[0]]
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert waves.markdown(first) in page, "put what benchmarks.waves prints into the page"


def test_blocks_are_limited_by_registers_shared_memory_and_warps():
    limits = waves.LIMITS["sm_90"]
    assert limits.blocks(registers=64, shared=0, warps=4) == {"by_registers": 8, "by_shared": 228, "by_warps": 16}
    assert limits.blocks(registers=65, shared=0, warps=4)["by_registers"] == 7  # registers come in eights
    assert limits.blocks(registers=168, shared=0, warps=8)["by_registers"] == 1  # 3 warps on each of four quarters
    assert limits.blocks(registers=32, shared=113 * 1024, warps=8)["by_shared"] == 2
    assert limits.blocks(registers=32, shared=114 * 1024, warps=8)["by_shared"] == 1
    assert limits.blocks(registers=16, shared=0, warps=1)["by_warps"] == 32


@pytest.mark.parametrize("path", waves.PATHS)
@pytest.mark.parametrize("model", MODELS)
def test_a_decoder_layer_is_24_launches_of_the_kernels(model, path):
    found = []
    with redirected(lambda kernel, *args, **meta: found.append(kernel.fn.__name__)):
        for _, inputs, outputs in MODELS[model]:
            waves.run_group(2048, inputs, outputs, 16, path)
    assert len(found) == 24, found


@pytest.mark.parametrize("augment", [False, True], ids=["chain", "augment"])
def test_a_decoder_layer_in_training_is_24_launches_from_its_second_step_on(augment):
    hidden, kv, mlp = 32, 16, 48
    sizes = {
        **{"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)},
        **{"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)},
    }
    model = DecoderLinears({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})
    l1ra.patch(model, budget=4 * 7, target_modules=list(sizes), total_steps=100, augment=augment)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    found = []
    steps = []
    for _ in range(2):
        found.clear()
        with choice.using("fused"), redirected(lambda kernel, *args, **meta: found.append(kernel.fn.__name__)):
            inputs = [torch.randn(8, size).requires_grad_() for size in (hidden, hidden, hidden, mlp)]
            sum(y.sum() for y in model(*inputs)).backward()
        steps.append(len(found))
        optimizer.step()
        optimizer.zero_grad()
    assert steps == [7 * 6, 24]


def test_tiles_and_multiprocessors_are_those_of_the_architecture():
    some = "waves.rows('sm_80', 'Llama-3.2-1B', 2048, 16)"
    found = in_a_process(f"import json; from benchmarks import waves; print(json.dumps({some}))")
    (expand,) = {row["cut_for"] for row in found if row["kernel"] == "expand"}
    assert expand == configs.HALF_80["expand"][16].blocks != configs.HALF["expand"][16].blocks
    rows = [row for row in found if row["kernel"] == "shrink" and row["blocks"] == row["cut_for"]]
    assert rows
    for row in rows:
        assert row["waves"] == round(row["programs"] / (row["blocks"] * waves.LIMITS["sm_80"].processors), 2)
