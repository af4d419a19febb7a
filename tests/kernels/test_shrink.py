"""Shrink by itself: what the layer as a whole does not show."""

import pytest
import torch
from cases import DEVICE, HALF, SINGLE, case

from benchmarks.single_launch import shrink


@pytest.mark.parametrize("dtype, rank, width", [(HALF, 5, 16), (SINGLE, 20, 32)])
def test_the_augmented_input_begins_with_x(dtype, rank, width):
    one = case([rank], lead=(70,), features=130, dtypes=(dtype, SINGLE))
    layer, x = one.layers[0], one.x.detach()
    with torch.no_grad():
        layer.gate[1], layer.a[1] = 0.0, torch.nan
    h, wide = shrink(x, [layer.a.detach()], [layer.gate.detach()], augment=True)
    alone, _ = shrink(x, [layer.a.detach()], [layer.gate.detach()])
    assert torch.equal(h, alone)
    assert not h[..., rank:].any() and not h[..., 1].any()
    assert wide.shape == (70, 130 + width) and torch.equal(wide[:, :130], x)


def test_the_parts_sum_to_the_product_of_all_features(monkeypatch):
    monkeypatch.setattr("l1ra_kernels.shrink.MIN_FEATURES", 64)
    one = case([5], lead=(70,), features=1000, dtypes=(SINGLE, SINGLE))
    x, a = one.x.detach(), one.layers[0].a.detach()
    h, _ = shrink(x, [a], [one.layers[0].gate.detach()])
    assert len(h) > 4
    torch.testing.assert_close(h.sum(0)[:, :5], x @ a.T, rtol=1e-5, atol=1e-5)
    assert all(part[:, :5].any() for part in h)


def test_the_input_is_copied_where_all_gates_are_zero_too():
    one = case([5], dtypes=(SINGLE, SINGLE))
    x, layer = one.x.detach(), one.layers[0]
    h, wide = shrink(x, [layer.a.detach()], [torch.zeros(5, device=DEVICE)], augment=True)
    assert torch.equal(wide[:, :65], x) and not h.any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_all_gates_are_zero_the_input_is_not_read(dropout):
    layers = case([5, 3], [47, 20], dtypes=(SINGLE, SINGLE)).layers
    x, seed = torch.full((37, 65), torch.nan, device=DEVICE), torch.tensor([3], device=DEVICE)
    rows, gates = [layer.a.detach() for layer in layers], [torch.zeros_like(layer.gate) for layer in layers]
    assert not shrink(x, rows, gates, dropout=dropout, seed=seed)[0].any()
    gates[1][2] = 1.0  # one rank alive is enough to read it
    assert shrink(x, rows, gates, dropout=dropout, seed=seed)[0][..., 18].isnan().all()
