"""The pass over dY by itself: what the layer as a whole does not show."""

import pytest
import torch
from cases import DEVICE, SINGLE, case

from benchmarks.single_launch import output_backward


def arguments(dead):
    """(dY, H, gate, B) with the ranks ``dead`` pruned: their rows hold NaN."""
    one = case([20], [150], lead=(70,), dtypes=(SINGLE, SINGLE))
    gate, b = one.layers[0].gate.detach(), one.layers[0].b.detach()
    h = torch.randn(70, 32, device=DEVICE)
    h[:, 20:] = 0.0
    gate[dead], b[dead], h[:, dead] = 0.0, torch.nan, 0.0
    return one.dys[0], h, gate, b


def test_the_partial_sums_are_those_of_the_products_and_zero_for_pruned_ranks(few_processors):
    dy, h, gate, b = arguments([0, 7, 19])
    p, d, _ = output_backward([dy], h, [gate], [b])
    assert p.shape[1:] == (70, 32) and d.shape[1:] == (32, 150)
    assert not p[:, :, [0, 7, 19]].any() and not p[:, :, 20:].any() and not d[:, [0, 7, 19]].any()
    live = gate != 0
    torch.testing.assert_close(p.sum(0)[:, :20][:, live], dy @ b[live].T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d.sum(0), h.T @ dy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needs_d", [True, False])
def test_where_all_gates_are_zero_the_gradient_of_the_output_is_not_read(needs_d):
    dy, h, gate, b = arguments(list(range(20)))
    _, d, _ = output_backward([torch.full_like(dy, torch.nan)], h, [gate], [b], needs_d=needs_d)
    assert not d.any() if needs_d else d is None


def test_the_tiles_and_columns_of_adapters_follow_each_other(few_processors):
    three = case([5, 3, 7], [150, 47, 300], lead=(70,), dtypes=(SINGLE, SINGLE))
    gates, bs = ([getattr(layer, name).detach() for layer in three.layers] for name in ("gate", "b"))
    h = torch.randn(70, 48, device=DEVICE)
    for i, gate in enumerate(gates):
        h[:, 16 * i + len(gate) : 16 * (i + 1)] = 0.0
    p, d, parts = output_backward(three.dys, h, gates, bs)
    assert len(p) == sum(parts.tiles) and len(d) == parts.splits and d.shape[2] == 497
    columns = d.sum(0).split([150, 47, 300], 1)
    for i, (mine, dy, b) in enumerate(zip(p.split(list(parts.tiles)), three.dys, bs, strict=True)):
        torch.testing.assert_close(mine.sum(0)[:, : len(b)], dy @ b.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(columns[i], h[:, 16 * i : 16 * (i + 1)].T @ dy, rtol=1e-5, atol=1e-4)
