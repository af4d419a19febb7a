"""Forward and backward in a CUDA graph: ranks whose gate is 0 as a reserve, which come alive without a new capture."""

import pytest
import torch
from cases import DEVICE, assert_same_bits, case, kernels, results

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def captured(one):
    """The graph of a forward and backward, and the tensors that each replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels, and lets cuBLAS allocate
            results(one, kernels(one))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = results(one, kernels(one))
    return graph, filled


def with_reserve(**options):
    """Layers of 16 and 20 ranks of which some are a reserve: gate 0, rows that hold NaN."""
    one = case([16, 20], [47, 20], base="output", **options)
    with torch.no_grad():
        for layer in one.layers:
            layer.gate[5:] = 0.0
            layer.a[5:], layer.b[5:] = torch.nan, torch.nan
    return one


def test_ranks_come_and_go_without_a_new_capture():
    one = with_reserve()
    graph, filled = captured(one)
    changes = [(slice(5, 9), 0.5), (slice(0, 3), 0.0), (slice(9, 16), 0.25), (slice(0, 16), 0.0)]
    for rows, gate in changes:
        with torch.no_grad():
            for layer in one.layers:
                layer.gate[rows] = gate
                layer.a[rows] = torch.randn_like(layer.a[rows]) if gate else torch.nan
                layer.b[rows] = torch.randn_like(layer.b[rows]) if gate else torch.nan
            one.x.copy_(torch.randn_like(one.x))
        graph.replay()
        expected = results(one, kernels(one))
        assert all(tensor.isfinite().all() for tensor in expected.values())
        assert_same_bits(filled, expected)


def test_each_replay_drops_something_else():
    one = with_reserve(dropout=0.5)
    graph, filled = captured(one)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(filled["dx"] != 0)
        assert 0.4 < masks[-1].float().mean() < 0.6
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
