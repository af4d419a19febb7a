"""Shrink by itself: what the layer as a whole does not show."""

import pytest
import torch
from cases import DEVICE, HALF, SINGLE, case

from l1ra_kernels.shrink import shrink


@pytest.mark.parametrize("dtype, rank, width", [(HALF, 5, 16), (SINGLE, 20, 32)])
def test_the_augmented_input_is_x_and_behind_it_the_hidden_columns(dtype, rank, width):
    one = case([rank], lead=(70,), features=130, dtypes=(dtype, SINGLE))
    layer, x = one.layers[0], one.x.detach()
    with torch.no_grad():
        layer.gate[1], layer.a[1] = 0.0, torch.nan
    around = torch.full((74, 130 + width + 8), 7.0, dtype=dtype, device=DEVICE)
    augmented = around[:70, : 130 + width]
    h, alone = (torch.full((70, width), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    shrink(x, [layer.a.detach()], [layer.gate.detach()], h, augmented=augmented)
    shrink(x, [layer.a.detach()], [layer.gate.detach()], alone)
    assert torch.equal(h, alone)
    assert not h[:, rank:].any() and not h[:, 1].any()
    assert torch.equal(augmented[:, :130], x)
    assert torch.equal(augmented[:, 130:], h)
    assert (around[70:] == 7).all() and (around[:, 130 + width :] == 7).all()


def test_the_input_is_copied_where_all_gates_are_zero_too():
    one = case([5], dtypes=(SINGLE, SINGLE))
    x, layer = one.x.detach(), one.layers[0]
    h, augmented = torch.full((37, 16), torch.nan, device=DEVICE), torch.full((37, 81), torch.nan, device=DEVICE)
    shrink(x, [layer.a.detach()], [torch.zeros(5, device=DEVICE)], h, augmented=augmented)
    assert torch.equal(augmented[:, :65], x) and not augmented[:, 65:].any() and not h.any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_all_gates_are_zero_the_input_is_not_read(dropout):
    layers = case([5, 3], [47, 20], dtypes=(SINGLE, SINGLE)).layers
    x, h = torch.full((37, 65), torch.nan, device=DEVICE), torch.full((37, 32), torch.nan, device=DEVICE)
    rows, gates = [layer.a.detach() for layer in layers], [torch.zeros_like(layer.gate) for layer in layers]
    shrink(x, rows, gates, h, dropout=dropout, seed=torch.tensor([3], device=DEVICE))
    assert not h.any()
    gates[1][2] = 1.0  # one rank alive is enough to read it
    shrink(x, rows, gates, h, dropout=dropout, seed=torch.tensor([3], device=DEVICE))
    assert h[:, 18].isnan().all()
