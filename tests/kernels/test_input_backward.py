"""The pass over x by itself: what the layer as a whole does not show."""

import pytest
import torch
from cases import DEVICE, SINGLE, case

from benchmarks.single_launch import input_backward


def arguments(dead):
    """(x, Q, As, gates) of two adapters with the ranks ``dead`` pruned in both: their rows of A hold NaN."""
    one = case([5, 3], [47, 20], lead=(70,), features=130, dtypes=(SINGLE, SINGLE))
    q = torch.zeros(70, 32, device=DEVICE)
    q[:, :5], q[:, 16:19] = torch.randn(70, 5, device=DEVICE), torch.randn(70, 3, device=DEVICE)
    rows, gates = [layer.a.detach() for layer in one.layers], [layer.gate.detach() for layer in one.layers]
    for i in dead:
        for a, gate in zip(rows, gates, strict=True):
            a[i], gate[i] = torch.nan, 0.0
        q[:, i], q[:, 16 + i] = 0.0, 0.0
    return one.x.detach(), q, rows, gates


def test_both_results_are_those_of_the_products(few_processors):
    x, q, rows, gates = arguments([1])
    dx, da = input_backward(x, q, rows, gates)
    a, b = (torch.where(gate[:, None] != 0, r, 0.0) for r, gate in zip(rows, gates, strict=True))
    torch.testing.assert_close(dx, q[:, :5] @ a + q[:, 16:19] @ b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(da.sum(0), q.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_all_gates_are_zero_the_input_is_not_read(dropout):
    x, q, rows, gates = arguments([0, 1, 2])
    gates[0].zero_()
    rows[0].fill_(torch.nan)
    q.zero_()
    seed = torch.tensor([3], device=DEVICE)
    dx, da = input_backward(torch.full_like(x, torch.nan), q, rows, gates, dropout=dropout, seed=seed)
    assert not dx.any() and not da.any()
