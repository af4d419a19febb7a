"""The tuner of tiles, in Triton's interpreter: wrong tiles are found, the table stays, the row can be pasted."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.gpu.sizes import Shape
from l1ra_kernels import choice, configs
from l1ra_kernels.configs import Tile
from l1ra_kernels.launch import redirected

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not choice.interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _tables_stay():
    before = copy.deepcopy((configs.HALF, configs.SINGLE, configs.TILES))
    yield
    for table, kept in zip((configs.HALF, configs.SINGLE, configs.TILES), before, strict=True):
        assert table == kept


def pasted(text):
    """What a row means in configs.py."""
    return eval("{" + text + "}", {"Tile": Tile, "HALF": configs.HALF, "SINGLE": configs.SINGLE})


@interpreted
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dry_run_tries_every_kernel_and_prints_the_present_row(dtype, capsys):
    assert tune.main(["--dry-run", "--rank-tile", "16", "--dtype", dtype]) == 0
    captured = capsys.readouterr()
    assert pasted(captured.out) == {"default": (configs.HALF, configs.SINGLE)}
    for kernel in tune.KERNELS:
        assert f"{kernel}, rank tile 16: 3 tiles are right, 0 left out" in captured.err
    assert "nothing was timed" in captured.err and " us " not in captured.err


@interpreted
def test_tiles_that_fail_or_give_another_result_are_named_and_left_out(monkeypatch, capsys):
    real = tune.KERNELS["expand"]

    def broken(bench, operands, precision):
        tile = configs.tile("expand", 16, bench.dtype, bench.device)
        if tile.tokens == 16:
            raise RuntimeError("out of resource: shared memory")
        (y,) = real(bench, operands, precision)
        if tile.tokens == 32:
            y[-1] = torch.nan
        return (y,)

    monkeypatch.setitem(tune.KERNELS, "expand", broken)
    assert tune.main(["--dry-run", "--kernel", "expand", "--rank-tile", "16"]) == 0
    said = capsys.readouterr().err
    assert "1 tiles are right, 2 left out" in said
    assert "left out: Tile(16, 32, 4, 2, blocks=3): RuntimeError: out of resource: shared memory" in said
    assert "left out: Tile(32, 32, 4, 2, blocks=3): its result differs by nan" in said


@interpreted
def test_the_fastest_right_tile_is_taken_and_all_are_named(monkeypatch, capsys):
    present = configs.HALF["expand"][16]
    slow, fast = (tune.Tile(size, size, 4, 1, blocks=present.blocks) for size in (32, 64))
    monkeypatch.setitem(tune.GRIDS, "expand", ((32, 64), (32, 64), (4,), (1,)))
    ms = {tune.show(tile): 2.0 for tile in tune.grid("expand", present, tiny=False)} | {tune.show(fast): 1.0}
    monkeypatch.setattr(
        tune, "interleave", lambda clock, works, *rest: {n: [SimpleNamespace(total=ms[n])] * 3 for n in works}
    )
    bench = tune.TypedBench(CPU, False, products=torch.float16)
    assert tune.tune(bench, "expand", Shape(24, 40, 72, 16), "fp16", rounds=3) == fast
    said = capsys.readouterr().err
    assert "5 tiles are right, 0 left out" in said and tune.show(slow) in said
    taken = next(line for line in said.splitlines() if "taken" in line)
    assert tune.show(fast) in taken and "-50.0 (-50.0 to -50.0) %" in taken
    assert any(tune.show(present) in line and line.endswith("present") for line in said.splitlines())


def test_the_launcher_takes_the_tile_that_is_tried():
    from benchmarks.single_launch import expand

    seen = []
    arguments = torch.zeros(1, 64, 16), [torch.ones(16)], [torch.zeros(16, 64)], [1.0]
    with redirected(lambda kernel, grid, *args, **meta: seen.append((meta["BM"], meta["BN"], meta["num_warps"]))):
        with tune.using_tile("expand", 16, Tile(16, 32, 2, 1), torch.float32, CPU):
            expand(*arguments, dtype=torch.float32)
        expand(*arguments, dtype=torch.float32)
    present = configs.SINGLE["expand"][16]
    assert seen == [(16, 32, 2), (present.tokens, present.features, present.warps)]


def test_the_present_tile_stays_unless_another_is_clearly_faster():
    present, other = Tile(64, 64), Tile(32, 64)
    assert tune.best({present: [1.0] * 5, other: [0.9] * 5}, present) == other
    assert tune.best({present: [1.0] * 5, other: [0.9, 0.9, 0.9, 1.2, 1.2]}, present) == present
    assert tune.best({present: [1.0] * 5, other: [1.1] * 5}, present) == present


def test_row_holds_tuned_entries_and_all_others_and_the_other_table():
    tuned = {("shrink", 32): Tile(128, 64, 8, 2), ("expand", 16): Tile(32, 512, 4, 1)}
    half, single = pasted(tune.row(CPU, torch.bfloat16, tuned))["default"]
    expected = copy.deepcopy(configs.HALF)
    expected["shrink"][32], expected["expand"][16] = tuned["shrink", 32], tuned["expand", 16]
    assert half == expected and single is configs.SINGLE
    half, single = pasted(tune.row(CPU, torch.float32, tuned))["default"]
    assert half is configs.HALF and single["shrink"][32] == tuned["shrink", 32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "There is no GPU to tune for" in captured.err
