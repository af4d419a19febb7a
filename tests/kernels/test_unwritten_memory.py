"""No result depends on what a buffer held before a kernel wrote it, and no kernel writes beyond its buffer."""

import pytest
import torch
from cases import SINGLE, assert_same_bits, case, kernels, results

from l1ra_kernels.launch import redirected

# Stands in for the package: the fixture poisons what code of this name allocates.
FAKE = """
def leave(source):
    return source.empty(3), source.zeros(2).new_empty(2, 2), source.empty_like(source.zeros(4))

def overrun(source):
    source.empty(5).as_strided((6,), (1,)).fill_(0.0)
"""


def fake():
    names = {"__name__": "l1ra_kernels.fake"}
    exec(FAKE, names)
    return names


def test_the_poison_fills_what_the_package_allocates_and_nothing_else(poison):
    with poison():
        assert all(t.isnan().all() for t in fake()["leave"](torch))
        assert not torch.zeros(4).new_empty(0).numel() and not torch.ones(3).isnan().any()
        torch.empty(2)
        assert len(poison.buffers) == 3
    assert torch.empty.__name__ == "empty"


def test_the_poison_notices_a_write_beyond_a_buffer(poison):
    with pytest.raises(AssertionError, match="outside of its buffer"), poison():
        fake()["overrun"](torch)


KERNELS = ("_shrink", "_expand", "_output_backward", "_input_backward", "_reduce_hidden", "_reduce_rows")


@pytest.mark.parametrize("name", KERNELS)
def test_the_poison_notices_a_kernel_that_writes_nothing(name, poison):
    one = case()
    expected = results(one, kernels(one))

    def all_others(kernel, grid, *args, **meta):
        if kernel.fn.__name__ != name:
            kernel[grid](*args, **meta)

    with poison(), redirected(all_others):
        found = results(one, kernels(one))
    with pytest.raises(AssertionError):
        assert_same_bits(found, expected)


def repeatable(one):
    torch.manual_seed(3)
    return results(one, kernels(one))


@pytest.mark.parametrize(
    "ranks, options",
    [
        ((5,), {}),
        ((5,), {"base": "output", "dropout": 0.3}),
        ((5,), {"lead": (0,)}),
        ((5,), {"lead": (100,), "features": 150, "dtypes": (SINGLE, SINGLE)}),
        ((16,), {"lead": (64,), "features": 128, "outs": (256,)}),
        ((140,), {"base": "bias"}),
        ((0, 4), {}),
        ((3, 20, 40), {"dropout": 0.3}),
    ],
)
def test_unwritten_memory_reaches_no_result(ranks, options, poison, few_processors):
    one = case(ranks, **{"outs": (150, 47, 20)[: len(ranks)], **options})
    expected = repeatable(one)
    with poison():
        found = repeatable(one)
        assert len(poison.buffers) >= 8
    assert_same_bits(found, expected)


@pytest.mark.parametrize("ranks, dead", [((5,), [[1]]), ((5, 3), [[0, 4], [0, 1, 2]]), ((140,), [range(128)])])
def test_unwritten_memory_reaches_no_result_of_pruned_ranks(ranks, dead, poison):
    one = case(ranks, (47, 20)[: len(ranks)])
    with torch.no_grad():
        for layer, rows in zip(one.layers, dead, strict=True):
            layer.gate[list(rows)] = 0.0
    expected = repeatable(one)
    with poison():
        found = repeatable(one)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("wanted", ["x", "A0 A1", "g0 g1", "B0 B1"])
@pytest.mark.parametrize("unused", [None, 0])
def test_unwritten_memory_reaches_no_result_of_a_partial_backward(wanted, unused, poison):
    one = case([3, 140], [47, 20])
    for name, leaf in one.leaves.items():
        leaf.requires_grad_(name in wanted.split())
    if unused is not None:
        one.dys[unused] = None
    expected = repeatable(one)
    with poison():
        found = repeatable(one)
    assert_same_bits(found, expected)
