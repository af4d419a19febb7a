"""Offsets of 2**31 elements and more: rows that lie far apart, in memory of which little is touched."""

import pytest
import torch
from cases import DEVICE, HALF, Case, case, kernels, results

FAR = 2**30 + 17  # elements from a row to the next: the third begins beyond 2**31


@pytest.fixture(scope="module")
def plain():
    try:
        return torch.empty(2 * FAR + 2**12, dtype=HALF, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        pytest.skip(f"4.3 GB of address space are wanted: {error}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("far", ["x", "A", "B", "base", "dy"])
def test_rows_that_lie_far_apart_are_read_where_they_are(far, dropout, plain):
    near = case([3], lead=(3,), base="output", dtypes=(HALF, HALF), dropout=dropout)
    layer, dy = near.layers[0], near.dys[0]
    torch.manual_seed(3)
    expected = results(near, kernels(near))

    def place(name, t):
        return torch.as_strided(plain, t.shape, (FAR, 1), 64).copy_(t) if name == far else t.detach()

    spread = layer._replace(a=place("A", layer.a), b=place("B", layer.b), output=place("base", layer.output))
    apart = Case(place("x", near.x), [spread], [place("dy", dy)], dropout)
    torch.manual_seed(3)
    found = results(apart, kernels(apart))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 40e9, reason="needs a GPU with 40 GB of free memory"
)
@pytest.mark.parametrize("features, out", [(64, 2**15), (2**15, 64)])
def test_more_than_2_to_the_31_elements_are_written_where_they_belong(features, out):
    tokens = 2**16 + 33
    few = case([3], [out], (64,), features, base="nothing")
    few.x.detach()[1:] = few.x.detach()[:1]
    few.dys[0][1:] = few.dys[0][:1]
    many = Case(few.x.detach()[:1].expand(tokens, -1), few.layers, [few.dys[0][:1].expand(tokens, -1)])
    expected, found = results(few, kernels(few)), results(many, kernels(many))
    for name in ("y0", "dx"):
        for rows in found[name].split(2**12):
            assert torch.equal(rows, expected[name][:1].expand_as(rows)), name
    for name in ("dA0", "dg0", "dB0"):
        torch.testing.assert_close(found[name], expected[name] * (tokens / 64), rtol=1e-3, atol=1e-2 * tokens / 64)
