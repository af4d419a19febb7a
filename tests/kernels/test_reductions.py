"""The two reductions by themselves: more partial sums than small layers have, and pruned ranks among NaN."""

import pytest
import torch
from cases import DEVICE

from benchmarks.single_launch import reduce_hidden, reduce_rows

DEAD = [0, 3, 9]


def gates(rank=10):
    gate = torch.rand(rank, device=DEVICE) + 0.1
    gate[DEAD] = 0.0
    return gate, gate != 0


@pytest.mark.parametrize("blocks", [1, 255, 600])
@pytest.mark.parametrize("splits", [1, 7, 8, 21])
def test_rows_and_gate_gradients_are_sums_over_all_parts(blocks, splits):
    (first, live), (second, live_too) = gates(), gates(13)
    outputs, scalings = [300, 40], [0.7, 1.5]
    da, d = torch.randn(splits, 32, 270, device=DEVICE), torch.randn(splits + 1, 16, 340, device=DEVICE)
    dg = torch.randn(blocks, 32, device=DEVICE)
    for i in (0, 16):
        dead = [i + row for row in DEAD]
        da[:, dead], dg[:, dead] = torch.nan, torch.nan
    d[:, DEAD] = torch.nan
    das, dbs, dgs = reduce_rows(da, d, dg, [first, second], outputs, scalings, tokens=32 * blocks)
    for i, (gate, alive, scaling) in enumerate(zip((first, second), (live, live_too), scalings, strict=True)):
        rank = len(gate)
        assert not any(out[~alive].any() for out in (das[i], dbs[i], dgs[i]))
        mine = slice(16 * i, 16 * i + rank)
        factor = scaling * gate[:, None]
        expected = factor * d.sum(0)[:rank].split(outputs, 1)[i]
        torch.testing.assert_close(dbs[i][alive], expected[alive], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(das[i][alive], da.sum(0)[mine][alive], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dgs[i][alive], dg.sum(0)[mine][alive], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tiles", [[1, 1], [5, 9], [0, 8], [16, 0]])
def test_the_gradient_of_the_hidden_columns_is_the_scaled_sum_over_tiles(tiles):
    (first, live), (second, live_too) = gates(), gates(13)
    p, h = torch.randn(sum(tiles), 70, 16, device=DEVICE), torch.randn(70, 32, device=DEVICE)
    p[:, :, DEAD] = torch.nan
    q, dg = reduce_hidden(p, tiles, h, [first, second], [0.7, 1.5])
    for i, (gate, alive, scaling) in enumerate(zip((first, second), (live, live_too), (0.7, 1.5), strict=True)):
        mine, sums = slice(16 * i, 16 * i + len(gate)), p.split(tiles)[i].sum(0)[:, : len(gate)]
        assert not q[:, 16 * i + len(gate) : 16 * (i + 1)].any() and not q[:, mine][:, ~alive].any()
        torch.testing.assert_close(q[:, mine][:, alive], (scaling * gate * sums)[:, alive], rtol=1e-5, atol=1e-4)
        expected = scaling * (sums * h[:, mine]).sum(0)
        torch.testing.assert_close(dg.sum(0)[mine][alive], expected[alive], rtol=1e-5, atol=1e-4)
        assert not dg[:, mine][:, ~alive].any()
