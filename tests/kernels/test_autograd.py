"""The fused layer as a library op, under torch.compile, and under gradient checkpointing."""

import pytest
import torch
from cases import DEVICE, SINGLE, Case, assert_close, assert_same_bits, case, kernels, results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from l1ra_kernels.autograd import fused, gated_linear_op
from l1ra_kernels.layer import Layer


@pytest.fixture(autouse=True)
def _nothing_traced_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op_args(one, seed=None):
    layer = one.layers[0]
    return (
        one.x,
        layer.a,
        layer.gate,
        layer.b,
        layer.weight,
        layer.bias,
        layer.output,
        seed,
        layer.scaling,
        one.dropout,
    )


@pytest.mark.parametrize(
    "rank, base, dropout",
    [(5, "bias", 0.0), (5, "weight", 0.0), (5, "output", 0.0), (5, "output", 0.3), (140, "bias", 0.0)],
)
def test_the_library_op_keeps_the_rules_of_library_ops(rank, base, dropout):
    one = case([rank], lead=(9,), base=base, dropout=dropout, dtypes=(SINGLE, SINGLE))
    seed = torch.tensor([3], device=DEVICE) if dropout else None
    torch.library.opcheck(gated_linear_op, op_args(one, seed))


@pytest.mark.parametrize("wanted", ["x", "A0", "g0", "B0", "x base0", "A0 B0"])
def test_the_library_op_gives_the_gradients_that_are_needed(wanted):
    one = case(base="output")
    expected = results(one, kernels(one))
    for name, leaf in one.leaves.items():
        leaf.requires_grad_(name in wanted.split())
    y, hidden = gated_linear_op(*op_args(one))
    assert hidden.shape == (37, 16)
    found = results(one, [y])
    assert_close(found, {name: expected[name] for name in found})


def compiled(one, **options):
    def call(x, *layers):
        return fused(x, layers, one.dropout)

    ys = torch.compile(call, fullgraph=True, backend="aot_eager", **options)(one.x, *one.layers)
    return list(ys)


@pytest.mark.parametrize("base", ["nothing", "bias", "output"])
@pytest.mark.parametrize("ranks, lead", [((5,), (37,)), ((5, 3), (4, 5)), ((140,), (37,))])
def test_the_compiled_layer_equals_the_eager_one(base, ranks, lead):
    one = case(ranks, (47, 20)[: len(ranks)], lead, base=base, dtypes=(SINGLE, SINGLE))
    expected = results(one, kernels(one))
    found = results(one, compiled(one))
    assert_close(found, expected)


def test_the_compiled_layer_takes_views():
    whole = case(lead=(4, 5), base="output", dtypes=(SINGLE, SINGLE))
    expected = results(whole, kernels(whole))
    turned = lambda t: t.detach().transpose(0, 1).contiguous().transpose(0, 1)  # noqa: E731
    layer = whole.layers[0]
    views = Case(turned(whole.x), [layer._replace(output=turned(layer.output))], [turned(whole.dys[0])])
    found = results(views, compiled(views))
    assert_close(found, expected)


def test_the_compiled_layer_drops_out_alike_in_forward_and_backward():
    one = case(base="output", dropout=0.5, dtypes=(SINGLE, SINGLE))
    found = results(one, compiled(one))
    kept = found["dx"] != 0
    assert 0.4 < kept.float().mean() < 0.6
    layer = one.layers[0]
    with torch.no_grad():
        y = layer.output + layer.scaling * ((torch.where(kept, one.x, 0) * 2 @ layer.a.T) * layer.gate) @ layer.b
    torch.testing.assert_close(found["y0"], y, rtol=1e-5, atol=1e-4)


class Adapted(nn.Module):
    def __init__(self, features=32, out=24, rank=5):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, features)), nn.Parameter(torch.randn(rank, out))
        self.gate = nn.Parameter(torch.rand(rank) + 0.1)
        self.weight = nn.Parameter(torch.randn(out, features), requires_grad=False)

    def forward(self, x):
        return fused(x, [Layer(self.A, self.gate, self.B, 0.5, self.weight)])[0]

    def resize(self, rank):
        with torch.no_grad():
            for p in (self.A, self.gate, self.B):
                p.set_(torch.randn(rank, *p.shape[1:], device=p.device))
                p.grad = None


def test_a_rank_that_changes_within_its_tile_is_traced_anew_at_most_once():
    counter = CompileCounterWithBackend("aot_eager")
    model, x = Adapted().to(DEVICE), torch.randn(20, 32, device=DEVICE)
    traced = torch.compile(model, backend=counter, fullgraph=True)
    seen = {}
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        for rank in (5, 7, 3, 9, 12, 16, 2, 11, 17, 20, 30):
            model.resize(rank)
            y = traced(x)
            y.sum().backward()
            expected = torch.autograd.grad(model(x).sum(), [model.A, model.gate, model.B])
            for p, grad in zip((model.A, model.gate, model.B), expected, strict=True):
                torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)
            seen[rank] = counter.frame_count
    assert all(seen[rank] == seen[7] <= 2 for rank in (3, 9, 12, 16, 2, 11))
    assert seen[17] == seen[20] == seen[30] <= seen[7] + 1  # the next tile


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_drops_the_same_and_changes_no_bit(use_reentrant):
    one = case([3, 20, 4], [47, 20, 9], dropout=0.4)
    torch.manual_seed(5)
    expected = results(one, kernels(one))
    torch.manual_seed(5)
    ys = checkpoint(lambda x: tuple(fused(x, one.layers, one.dropout)), one.x, use_reentrant=use_reentrant)
    torch.manual_seed(99)  # what happens in between must not matter
    if not use_reentrant:
        assert_same_bits(results(one, list(ys)), expected)
        return
    # The reentrant kind gives gradients to .grad only.
    torch.autograd.backward(ys, one.dys)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"d{n}": leaf.grad for n, leaf in one.leaves.items()}
    assert_same_bits(found, expected)
