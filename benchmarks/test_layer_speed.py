"""The layers and the model of benchmarks/layer.py under pytest-benchmark, to save runs and compare them over time.

pytest-benchmark finishes one competitor before it begins the next one: for ratios between them, which need turns in one
run, use ``python -m benchmarks.layer``. Nothing here asserts a time.

    python -m pytest benchmarks/test_layer_speed.py --benchmark-only --benchmark-autosave
    python -m pytest benchmarks/test_layer_speed.py --benchmark-only --benchmark-compare
"""

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("peft")

import torch

from benchmarks.gpu.sizes import Shape
from benchmarks.layer import (
    BATCH,
    COMPETITORS,
    LENGTH,
    MODEL_RANK,
    RANKS,
    ROUNDS,
    SHAPES,
    TOKENS,
    TypedBench,
    layer_works,
    model_works,
)

CASES = [Shape(tokens, *sizes, rank) for sizes in SHAPES for tokens in TOKENS for rank in RANKS]


@pytest.fixture(scope="module")
def bench():
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return TypedBench(torch.device("cuda" if cuda else "cpu"), False, products=dtype)


def measure(benchmark, bench, works, path, name):
    benchmark.extra_info.update(path=path, threads=torch.get_num_threads())
    work = works[name]

    def call():
        for part in work.parts.values():
            part()
        if bench.cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=work.before, rounds=ROUNDS, warmup_rounds=3)


@pytest.mark.parametrize("name", COMPETITORS)
@pytest.mark.parametrize("shape", CASES, ids=lambda s: f"{s.tokens}-{s.inputs}-{s.outputs}-r{s.rank}")
def test_layer(benchmark, bench, shape, name):
    benchmark.group = str(shape)
    measure(benchmark, bench, *layer_works(bench, shape), name)


@pytest.mark.parametrize("probing", [False, True], ids=["no-probes", "probes"])
@pytest.mark.parametrize("name", COMPETITORS)
def test_model_step(benchmark, bench, name, probing):
    benchmark.group = f"MiniLM shape, a training step, {'with' if probing else 'without'} L1RA's probes"
    measure(benchmark, bench, *model_works(bench, MODEL_RANK, BATCH, LENGTH, probing), name)
