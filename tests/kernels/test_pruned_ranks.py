"""A rank whose gate is exactly 0 is pruned: its rows are not read, and it has no gradient."""

import pytest
import torch
from cases import SINGLE, USUAL, Case, assert_as_exact_as_torch, assert_close, assert_same_bits, case, kernels, results
from torch.nn import functional as F

from l1ra_kernels import reference


def by_the_reference(case):
    """The outputs, by the op that specifies them."""
    ys = []
    for layer in case.layers:
        base = layer.output if layer.weight is None else F.linear(case.x, layer.weight, layer.bias)
        ys.append(reference.gated_lora(base, case.x, layer.a, layer.gate, layer.b, layer.scaling))
    return ys


def pruned(whole, dead):
    """The case with rows ``dead[i]`` of layer i pruned, and the case that does not have them."""
    layers, kept = [], []
    for layer, rows in zip(whole.layers, dead, strict=True):
        a, gate, b = (t.detach().clone() for t in (layer.a, layer.gate, layer.b))
        live = torch.ones(len(gate), dtype=torch.bool, device=gate.device)
        live[list(rows)] = False
        gate[~live], a[~live], b[~live] = 0.0, torch.nan, torch.nan
        if rows:
            gate[rows[0]], a[rows[0], ::2], b[rows[0], ::2] = -0.0, torch.inf, -torch.inf
        layers.append(layer._replace(a=a, gate=gate, b=b))
        kept.append((layer._replace(a=a[live], gate=gate[live], b=b[live]), live))
    make = lambda layers: Case(whole.x.detach(), layers, whole.dys, whole.dropout)  # noqa: E731
    return make(layers), make([layer for layer, _ in kept]), [live for _, live in kept]


@pytest.mark.parametrize("op", [kernels, by_the_reference])
@pytest.mark.parametrize(
    "ranks, dead",
    [
        ((5,), ([0, 3],)),
        ((5,), ([4],)),
        ((20,), (list(range(1, 20, 2)),)),
        ((140,), ([0, 127, 128, 139],)),
        ((140,), (list(range(128, 140)),)),  # a piece that is dead as a whole
        ((140,), (list(range(128)),)),
        ((5, 3), ([1, 2], [0])),
        ((5, 3), ([], [0, 1, 2])),  # a dead neighbour
        ((5, 3, 4), ([0, 1, 2, 3, 4], [1], [0, 1, 2, 3])),
    ],
)
def test_pruned_ranks_change_nothing_whatever_their_rows_hold(op, ranks, dead):
    whole, without, live = pruned(case(ranks, (47, 20, 9)[: len(ranks)], base="output"), dead)
    found = results(whole, op(whole))
    for name, tensor in list(found.items()):
        assert tensor.isfinite().all(), name
        if name[1] in "AgB":
            rows = live[int(name[2:])]
            assert not tensor[~rows].any(), name
            found[name] = tensor[rows]
    assert_as_exact_as_torch(without, ours=found)


@pytest.mark.parametrize("op", [kernels, by_the_reference])
@pytest.mark.parametrize("dtypes", [USUAL, (SINGLE, SINGLE)])
def test_where_all_gates_are_zero_the_output_is_the_base_in_every_bit(op, dtypes):
    whole, *_ = pruned(case([5, 140], [47, 20], base="output", dtypes=dtypes), (range(5), range(140)))
    found = results(whole, op(whole))
    for i, layer in enumerate(whole.layers):
        assert_same_bits({"y": found[f"y{i}"]}, {"y": layer.output.detach()})
        assert not any(found[f"d{name}{i}"].any() for name in "AgB")
    assert not found["dx"].any()


def test_where_all_gates_are_zero_the_base_alone_has_a_gradient():
    whole, without, _ = pruned(case([5], base="bias"), (range(5),))
    found = results(whole, kernels(whole))
    for name in ("A0", "g0", "B0"):
        assert not found[f"d{name}"].any()
        found[f"d{name}"] = found[f"d{name}"][:0]
    assert_as_exact_as_torch(without, ours=found)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_where_all_gates_are_zero_the_input_is_not_read(dropout):
    whole, *_ = pruned(case([5, 3], [47, 20], base="output", dropout=dropout), (range(5), range(3)))
    whole = Case(torch.full_like(whole.x, torch.nan), whole.layers, whole.dys, dropout)
    found = results(whole, kernels(whole))
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("wanted", ["g0 g1", "A0 A1", "B0 B1", "x"])
def test_pruned_ranks_have_no_gradient_where_only_some_gradients_are_needed(wanted):
    whole, *_ = pruned(case([5, 140], [47, 20], base="output"), ([0, 3], [1, 127, 128]))
    everything = results(whole, kernels(whole))
    for name, leaf in whole.leaves.items():
        leaf.requires_grad_(name in wanted.split())
    found = results(whole, kernels(whole))
    same = assert_close if "g0" in wanted else assert_same_bits  # without dB, another kernel adds up dg
    same(found, {name: everything[name] for name in found})


def test_a_gate_that_is_not_zero_however_small_is_read():
    one = case([3], base="nothing", dtypes=(SINGLE, SINGLE))
    with torch.no_grad():
        one.layers[0].gate.fill_(1e-30)
        one.layers[0].b.mul_(1e30)
    assert_as_exact_as_torch(one)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("wanted", ["x A0 g0 B0", "g0"])
def test_pruned_ranks_have_no_gradient_where_others_overflow(wanted):
    whole, *_ = pruned(case([5], base="output"), ([0, 3],))
    x, dy = whole.x.detach().clone(), whole.dys[0].clone()
    x[7, 3], dy[11, 5] = torch.inf, torch.nan
    broken = Case(x, whole.layers, [dy])
    for name, leaf in broken.leaves.items():
        leaf.requires_grad_(name in wanted.split())
    found = results(broken, kernels(broken))
    for name in found.keys() & {"dA0", "dg0", "dB0"}:
        assert not found[name][[0, 3]].any() and found[name][[1, 2, 4]].isfinite().logical_not().any(), name
    fine = torch.arange(37, device=x.device)
    assert found["y0"][fine != 7].isfinite().all()
    assert "dx" not in found or found["dx"][fine != 11].isfinite().all()
