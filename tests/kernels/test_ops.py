"""The ops of l1ra_kernels against formulas written out by hand."""

import math

import pytest
import torch
from helpers import same_bits
from op_helpers import DTYPES, TOKENS, error, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from l1ra_kernels.reference import (
    adam_elastic_net_step,
    gated_lora,
    importance_step,
    move_rows,
    weighted_l1_step,
)

# tokens, in, out, rank: ragged on purpose
SHAPES = [
    ((5,), 7, 3, 2),
    ((2, 3), 5, 9, 1),
    ((3, 1, 2), 4, 4, 4),
    ((), 6, 5, 3),
    ((2, 2, 3), 3, 11, 2),
    ((0,), 5, 4, 2),
]


def naive(y0, x, a, g, b, s):
    return y0 + s * ((x @ a.T) * g) @ b


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_lora_is_its_formula(shape):
    args = inputs(*shape)
    torch.testing.assert_close(gated_lora(*args, 0.7), naive(*args, 0.7))


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_lora_passes_gradcheck(shape):
    assert torch.autograd.gradcheck(lambda *t: gated_lora(*t, 0.7), inputs(*shape))


def test_move_rows_passes_gradcheck():
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: move_rows(t, (0, 2), 2), rows)


def test_gate_ops_pass_gradcheck_away_from_their_corners():
    gate = (0.3 + 0.4 * torch.rand(5, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(5, dtype=torch.float64).abs().add(0.1).requires_grad_()
    other = torch.rand(5, dtype=torch.float64).add(0.1).requires_grad_()
    age = torch.tensor([0.0, 1.0, 5.0, 20.0, 100.0], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda g, d, m: importance_step(g, d, m, age, 10.0), (gate, grad, other))
    assert check(lambda g, w: weighted_l1_step(g, w, lr=0.01, l1=1.0), (gate, other))
    assert check(lambda g, d, m: adam_elastic_net_step(g, d, m, m, age, lr=0.01, l1=0.1, l2=0.1), (gate, grad, other))


def all_results(op, args, dy, s):
    y = op(*args, s)
    return [y, *torch.autograd.grad(y, args, dy.to(y.dtype))]


@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TOKENS)
def test_gated_lora_is_as_exact_as_plain_torch_in_the_same_dtype(shape, dtype, adapter):
    args = inputs(*shape, dtype, adapter)
    dy = torch.randn(*shape[0], shape[2], dtype=torch.float64).to(dtype)
    exact = all_results(naive, [t.detach().double().requires_grad_() for t in args], dy.double(), 0.5)
    ours = all_results(gated_lora, args, dy, 0.5)
    plain = all_results(naive, [t.detach().to(dtype).requires_grad_() for t in args], dy, 0.5)
    eps = torch.finfo(dtype).eps
    errors = zip(("y", "y0", "x", "A", "g", "B"), error(ours, exact), error(plain, exact), exact, strict=True)
    for name, mine, theirs, value in errors:
        assert mine <= 1.2 * theirs + eps * value.abs().max(), name
    for result, arg in zip(ours[1:], args, strict=True):
        assert result.dtype == arg.dtype  # fp32 adapters get fp32 gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_b_of_zero_changes_no_bit(dtype):
    y0, x, a, g, b = inputs((9,), 8, 6, 3, dtype, torch.float32)
    assert same_bits(gated_lora(y0, x, a, g, torch.zeros_like(b), 2.0), y0)


def test_strides_of_the_input_do_not_matter():
    y0, x, a, g, b = inputs((4, 5), 6, 7, 2)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for twisted in (turned, torch.cat([x, x], -1)[..., :6], x[:1].expand(4, 5, 6)):
        assert not twisted.is_contiguous()
        torch.testing.assert_close(gated_lora(y0, twisted, a, g, b, 1.0), naive(y0, twisted, a, g, b, 1.0))
    turned = y0.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(gated_lora(turned, x, a, g, b, 1.0), naive(y0, x, a, g, b, 1.0))


def test_an_enclosing_autocast_does_not_lower_the_dtype():
    args = inputs((4,), 6, 7, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_lora(*args, 1.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, gated_lora(*args, 1.0), rtol=0, atol=0)


class BigTensors(TorchDispatchMode):
    """Collects the dtype of every result with at least ``numel`` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.dtypes = numel, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.dtypes.add(t.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_make_no_fp32_copy_of_the_tokens(dtype):
    args = inputs((64,), 16, 16, 2, dtype, torch.float32)
    dy = torch.ones(64, 16, dtype=dtype)
    with BigTensors(64 * 16) as ours:
        all_results(gated_lora, args, dy, 1.0)
    with BigTensors(64 * 16) as theirs:  # the mode does see such a copy where there is one
        naive(args[0], args[1].float(), *args[2:], 1.0)
    assert ours.dtypes == {dtype}
    assert torch.float32 in theirs.dtypes


def adam_e(g, grads, lr, l1, l2, beta1=0.9, beta2=0.999, eps=1e-8):
    """The same in plain Python, one gate."""
    m = v = 0.0
    for t, d in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d * d
        g -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
        g = g - lr * l2 * g
        g = max(g - lr * l1, 0.0)
        g = min(g, 1.0)
    return g, m, v


@pytest.mark.parametrize("l1, l2", [(0.0, 0.0), (1e-3, 0.0), (0.5, 0.1), (5.0, 0.0)])
def test_adam_elastic_net_step_is_adam_then_decoupled_elastic_net_then_clamp(l1, l2):
    start = [0.9, 0.02, 1.0, 0.5]
    grads = torch.randn(40, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 100.0, 1.0])
    gate = torch.tensor(start, dtype=torch.float64)
    m, v, age = torch.zeros_like(gate), torch.zeros_like(gate), torch.zeros_like(gate)
    for grad in grads:
        gate, m, v = adam_elastic_net_step(gate, grad, m, v, age, lr=0.02, l1=l1, l2=l2)
        age = age + 1
    expected = [adam_e(g, grads[:, i].tolist(), 0.02, l1, l2) for i, g in enumerate(start)]
    for mine, theirs in zip((gate, m, v), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.float64))


def test_each_gate_has_the_bias_correction_of_its_own_age():
    zeros = torch.zeros(2)
    gate, *_ = adam_elastic_net_step(
        torch.full((2,), 0.5), torch.ones(2), zeros, zeros, torch.tensor([0.0, 999.0]), lr=0.1, l1=0.0, l2=0.0
    )
    old = 0.5 - 0.1 * 0.1 / math.sqrt(1e-3 / (1 - 0.999**1000))
    torch.testing.assert_close(gate, torch.tensor([0.4, old]))


def test_adam_elastic_net_step_reaches_exactly_zero_and_leaves_its_inputs():
    gate, zeros = torch.full((1,), 1e-3), torch.zeros(1)
    new, *_ = adam_elastic_net_step(gate, zeros, zeros, zeros, zeros, lr=0.1, l1=0.1, l2=0.0)
    assert new.item() == 0.0 and gate.item() == pytest.approx(1e-3) and zeros.item() == 0.0


def test_importance_is_a_mean_at_first_and_an_exponential_one_later():
    gates, grads = torch.rand(12), torch.randn(12)
    value, age = torch.zeros(1), torch.zeros(1)
    for g, d in zip(gates[:5], grads[:5], strict=True):
        value = importance_step(g[None], d[None], value, age, 5.0)
        age = age + 1
    torch.testing.assert_close(value[0], (gates[:5] * grads[:5]).square().mean())
    expected = value
    for g, d in zip(gates[5:], grads[5:], strict=True):
        value = importance_step(g[None], d[None], value, age, 5.0)
        age = age + 1
        expected = 0.8 * expected + 0.2 * (g * d).square()
    torch.testing.assert_close(value, expected)


def test_weighted_l1_step_pulls_up_pushes_down_and_leaves_the_dead():
    gate = torch.tensor([0.5, 0.5, 0.5, 0.95, 0.1, 0.0])
    weight = torch.tensor([0.0, 1.0, 4.0, 0.0, 4.0, 0.0])
    new = weighted_l1_step(gate, weight, lr=0.1, l1=1.0)
    torch.testing.assert_close(new, torch.tensor([0.6, 0.5, 0.2, 1.0, 0.0, 0.0]))
    assert new[4] == 0.0  # exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 3)])
def test_move_rows_keeps_bits_and_never_reads_what_is_dropped(dtype, shape):
    rows = torch.randn(shape).to(dtype)
    rows[1] = torch.nan
    rows[3] = -0.0
    moved = move_rows(rows, (0, 3), 2, 1.5)
    assert same_bits(moved[:2], rows[[0, 3]])
    assert moved.shape == (4, *shape[1:]) and (moved[2:] == 1.5).all()


def test_move_rows_keeps_nothing_or_everything():
    rows = torch.randn(3, 2)
    assert move_rows(rows, (), 2).shape == (2, 2) and not move_rows(rows, (), 2).any()
    everything = move_rows(rows, (0, 1, 2), 0)
    assert same_bits(everything, rows) and everything.data_ptr() != rows.data_ptr()
