"""The two reductions by themselves: more partial sums than small layers have, and pruned ranks among NaN."""

import pytest
import torch
from cases import DEVICE

from l1ra_kernels.reductions import reduce_hidden, reduce_rows

DEAD = [0, 3, 9]


def gates():
    gate = torch.rand(10, device=DEVICE) + 0.1
    gate[DEAD] = 0.0
    return gate, gate != 0


@pytest.mark.parametrize("blocks", [1, 255, 600])
def test_rows_and_gate_gradients_are_sums_over_all_parts(blocks):
    gate, live = gates()
    parts, dg_parts = torch.randn(7, 16, 300, device=DEVICE), torch.randn(blocks, 16, device=DEVICE)
    parts[:, DEAD], dg_parts[:, DEAD] = torch.nan, torch.nan
    out, dg = reduce_rows(parts, gate, torch.float32, scaling=0.7, dg_parts=dg_parts)
    assert not out[~live].any() and not dg[~live].any()
    torch.testing.assert_close(out[live], (0.7 * gate[:, None] * parts.sum(0)[:10])[live], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dg[live], dg_parts.sum(0)[:10][live], rtol=1e-5, atol=1e-4)
    plain, none = reduce_rows(parts, gate, torch.float32)
    assert none is None and not plain[~live].any()
    torch.testing.assert_close(plain[live], parts.sum(0)[:10][live], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tiles", [1, 5])
def test_the_gradient_of_the_hidden_columns_is_the_scaled_sum_over_tiles(tiles):
    gate, live = gates()
    p, h = torch.randn(tiles, 70, 16, device=DEVICE), torch.randn(70, 16, device=DEVICE)
    p[:, :, DEAD] = torch.nan
    q = torch.full((70, 32), 7.0, device=DEVICE)
    dg = reduce_hidden(p, h, gate, 0.7, q[:, 16:])
    assert (q[:, :16] == 7).all() and not q[:, 26:].any() and not q[:, 16:26][:, ~live].any()
    torch.testing.assert_close(q[:, 16:26][:, live], (0.7 * gate * p.sum(0)[:, :10])[:, live], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dg.sum(0)[:10][live], 0.7 * (p.sum(0) * h).sum(0)[:10][live], rtol=1e-5, atol=1e-4)
    assert not dg[:, :10][:, ~live].any() and not dg[:, 10:].any()
