"""The dense layer in plain torch against the reference, float64 and autograd's own derivatives."""

import pytest
import torch
from op_helpers import DTYPES, TOKENS, error, inputs

from l1ra.layers.linear import L1RALinear
from l1ra_kernels.dispatch import Layer
from l1ra_kernels.plain import plain_linear
from l1ra_kernels.reference import gated_lora


def results(op, args, dy):
    y = op(*args)
    return [y, *torch.autograd.grad(y, [t for t in args if t is not None and t.requires_grad], dy.to(y.dtype))]


def plain(x, a, g, b, weight, bias):
    return plain_linear(x, Layer(a, g, b, 0.5, weight, bias))


def composed(x, a, g, b, weight, bias):
    return gated_lora(torch.nn.functional.linear(x, weight, bias), x, a, g, b, 0.5)


def naive(x, a, g, b, weight, bias):
    return torch.nn.functional.linear(x, weight, bias) + 0.5 * ((x @ a.T) * g) @ b


@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [*TOKENS, ((0,), 5, 4, 2)])
def test_it_is_as_exact_as_the_reference(shape, with_bias, dtype, adapter):
    lead, k, n, _ = shape
    _, x, a, g, b = inputs(*shape, dtype, adapter)
    weight = (torch.randn(n, k, dtype=torch.float64) / k**0.5).to(dtype)
    args = (x, a, g, b, weight, torch.randn(n, dtype=torch.float64).to(dtype) if with_bias else None)
    dy = torch.randn(*lead, n, dtype=torch.float64).to(dtype)
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in args]
    exact = results(naive, wide, dy.double())
    mine, theirs = results(plain, args, dy), results(composed, args, dy)
    eps = torch.finfo(dtype).eps
    for ours, other, value in zip(error(mine, exact), error(theirs, exact), exact, strict=True):
        assert ours <= 1.2 * other + eps * (value.abs().max() if value.numel() else 0)
    assert [t.dtype for t in mine[1:]] == [t.dtype for t in (x, a, g, b)]


def test_gradcheck_passes():
    _, x, a, g, b = inputs((2, 3), 5, 4, 3)
    weight = torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: plain(*t, weight, None), (x, a, g, b))


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_can_be_had_alone(wanted):
    _, x, a, g, b = inputs((6,), 5, 4, 3)
    weight = torch.randn(4, 5, dtype=torch.float64)
    dy = torch.randn(6, 4, dtype=torch.float64)
    expected = results(naive, (x, a, g, b, weight, None), dy)[1 + wanted]
    args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((x, a, g, b))]
    torch.testing.assert_close(results(plain, (*args, weight, None), dy)[1], expected)


def test_pruned_ranks_leave_no_trace():
    _, x, a, g, b = inputs((6,), 5, 4, 3)
    weight, dy = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        g[1] = 0
        a[1] = b[1] = torch.nan
    y, dx, *grads = results(plain, (x, a, g, b, weight, None), dy)
    rest = [t.detach()[[0, 2]].requires_grad_() for t in (a, g, b)]
    expected = results(naive, (x, *rest, weight, None), dy)
    torch.testing.assert_close([y, dx, *(t[[0, 2]] for t in grads)], expected)
    assert not any(t[1].any() for t in grads)


def test_transforms_of_functions_see_through_the_layer():
    layer = L1RALinear(5, 4, rank=2)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 5)
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    torch.testing.assert_close(jacobian, (layer.weight + layer.delta_weight()).expand(3, 4, 5))
