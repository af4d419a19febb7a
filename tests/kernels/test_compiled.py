"""What the compiler makes of the kernels, for GPUs that needn't be there: nothing spilled, tensor cores used, loads
pipelined, and one compilation for all ranks of a tile.

benchmarks/compiled.py does it, in processes of their own: here Triton may be in its interpreter.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to ask")

from benchmarks.every_launch import BF16, CALLS, RAGGED, REGULAR, Problem, Shape, call, problems

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
STREAMING = ("shrink", "output_backward", "input_backward")
PRODUCTS = (*STREAMING, "expand")
TENSOR_CORES = {"sm_80": {"HMMA"}, "sm_90": {"HMMA", "HGMMA"}, "sm_100": {"HMMA", "UTCHMMA"}}
RANKS = (1, 2, 3, 5, 8, 15, 16)


def _usual(problem: Problem) -> bool:
    """bf16 with float32 adapters, rank tiles 16 and 64 of one layer, and once with dropout."""
    if problem.kernel not in PRODUCTS:
        return problem in FIRST
    plain = problem.kind == BF16 and problem.sharing == 1 and problem.shape == REGULAR and not problem.flag
    return plain and problem.width in (16, 64) and (problem.dropout == 0 or problem.width == 16)


# One problem of each kernel, with all that it can do besides.
FIRST = (
    *(Problem(kernel, sharing=3) for kernel in ("expand", "output_backward", "reduce_hidden", "reduce_rows")),
    *(Problem(kernel, sharing=3, dropout=0.1) for kernel in ("shrink", "input_backward")),
    Problem("write_behind", sharing=3),
    Problem("move_rows", flag="UNIT=4"),
    *(p for p in problems() if p.flag == "HAS_SEEN"),
)


def print_rows(architecture: str) -> None:
    """Lines of the table; runs in a process of its own."""
    from benchmarks.compiled import faults, row

    rows = [row(architecture, problem) for problem in problems() if _usual(problem)]
    print(json.dumps([{**row, "faults": faults(row)} for row in rows]))


def print_compilations(architecture: str) -> None:
    """How many kernels a change of ranks, tokens and scaling compiles; runs in a process of its own."""
    from benchmarks.compiled import compiling_for

    found = {}
    for problem in FIRST:
        with compiling_for(architecture) as launches:
            for rank in RANKS:
                call(problem, rank)
            ranks = len({id(launch.compiled) for launch in launches})
            for tokens in (1, 2, 17, 48, 1000, RAGGED.tokens):
                call(problem._replace(shape=Shape(tokens, REGULAR.features)))
            tokens = len({id(launch.compiled) for launch in launches})
            for scaling in (1.0, 0.5, 16.0):  # an int would be another type
                call(problem, scaling=scaling)
            scalings = len({id(launch.compiled) for launch in launches})
        found[problem.kernel] = [ranks, tokens, scalings]
    print(json.dumps(found))


def _asked(function: str, architecture: str):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    environment.pop("TRITON_INTERPRET", None)
    program = f"import test_compiled; test_compiled.{function}({architecture!r})"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def table(request):
    return _asked("print_rows", request.param)


@pytest.fixture(scope="module")
def compilations():
    return _asked("print_compilations", "sm_90")


def _names(tally: str) -> set[str]:
    return {part.partition(":")[0] for part in tally.split()}


def test_every_kernel_is_in_the_table(table):
    assert {row["kernel"] for row in table} == set(CALLS)


def test_nothing_is_spilled_and_shared_memory_suffices(table):
    assert {row["kernel"]: row["faults"] for row in table if row["faults"]} == {}


def test_products_are_taken_by_tensor_cores(table):
    for row in table:
        used = _names(row["tensor_cores"])
        if row["kernel"] in PRODUCTS:
            assert used and used <= TENSOR_CORES[row["architecture"]], row
        else:
            assert not used, row


def test_streams_are_loaded_ahead(table):
    for row in table:
        if row["kernel"] in STREAMING:
            assert _names(row["async_copies"]), row


@pytest.mark.parametrize("kernel", CALLS)
def test_another_rank_within_the_tile_compiles_nothing(compilations, kernel):
    assert compilations[kernel][0] == 1


@pytest.mark.parametrize("kernel", CALLS)
def test_another_number_of_tokens_compiles_nothing(compilations, kernel):
    assert compilations[kernel][1] == 1


@pytest.mark.parametrize("kernel", CALLS)
def test_another_scaling_compiles_nothing(compilations, kernel):
    assert compilations[kernel][2] == 1


def test_the_table_keeps_what_other_versions_and_other_kernels_gave(tmp_path):
    from benchmarks import compiled

    def row(triton, architecture, kernel, registers):
        return {"triton": triton, "architecture": architecture, "kernel": kernel, "registers": registers}

    path = tmp_path / "table.csv"
    compiled.write(path, [row("3.10.0", "sm_90", "shrink", n) for n in (1, 2)] + [row("3.10.0", "sm_90", "expand", 3)])
    compiled.write(path, [row("3.9.0", "sm_90", "shrink", 4)])
    compiled.write(path, [row("3.10.0", "sm_90", "shrink", 5)])
    with path.open(newline="") as file:
        found = [(line["triton"], line["kernel"], line["registers"]) for line in csv.DictReader(file)]
    assert found == [("3.9.0", "shrink", "4"), ("3.10.0", "shrink", "5"), ("3.10.0", "expand", "3")]
