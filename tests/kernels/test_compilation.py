"""Which arguments of the layer compile a kernel anew on a GPU, and which are data."""

import pytest
import torch
import triton
from cases import DEVICE, Case, case, kernels, results

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture
def compiled(monkeypatch):
    """Grows by one with each kernel that is compiled."""
    found = []
    hook = lambda *args, **kwargs: found.append(kwargs.get("repr"))  # noqa: E731
    if hasattr(triton, "knobs"):
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    else:
        monkeypatch.setattr(triton.JITFunction, "cache_hook", hook)
    return found


def run(ranks, tokens=37, scaling=0.7, dropout=0.3, dead=False):
    made = case(ranks, (47, 20), (tokens,), dropout=dropout)
    layers = [layer._replace(scaling=scaling) for layer in made.layers]
    if dead:
        for layer in layers:
            layer.gate.detach().zero_()
    again = Case(made.x.detach(), layers, made.dys, dropout)
    results(again, kernels(again))
    torch.cuda.synchronize()


def test_ranks_within_a_tile_tokens_scalings_and_probabilities_compile_nothing(compiled):
    run((3, 9))
    compiled.clear()
    for ranks in ((1, 1), (16, 16), (8, 15)):
        run(ranks)
    for tokens in (1, 16, 64, 1000, 20000):
        run((3, 9), tokens)
    run((3, 9), scaling=1.0)
    run((3, 9), dropout=0.5)
    run((3, 9), dead=True)
    assert not compiled


def test_the_next_tile_is_noticed(compiled):
    run((17, 9), dropout=0.45)
    count = len(compiled)
    run((33, 9), dropout=0.45)
    assert len(compiled) > count
