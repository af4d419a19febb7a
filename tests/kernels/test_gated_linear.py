"""Layers with gated low-rank adapters, by the kernels, against the formula in float64: outputs and every gradient."""

import pytest
import torch
from cases import (
    DEVICE,
    HALF,
    SINGLE,
    USUAL,
    Case,
    assert_as_exact_as_torch,
    assert_close,
    assert_same_bits,
    case,
    formula,
    kernels,
    results,
)

from l1ra_kernels import configs
from l1ra_kernels.autograd import fused
from l1ra_kernels.layer import Layer

GPU = DEVICE == "cuda"
RANKS = [1, 3, 8, 16, 17, 40, 64, 140]


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_is_as_exact_as_plain_torch(rank):
    assert_as_exact_as_torch(case([rank], base="bias"))


@pytest.mark.parametrize(
    "rank, dtypes",
    [(3, (SINGLE, SINGLE)), (40, (SINGLE, SINGLE)), (140, (SINGLE, SINGLE)), (16, (HALF, HALF)), (17, (HALF, HALF))]
    + ([(5, (torch.float16, torch.float16))] if HALF is not torch.float16 else []),
)
def test_every_dtype_is_as_exact_as_plain_torch(rank, dtypes):
    assert_as_exact_as_torch(case([rank], dtypes=dtypes, base="bias"))


@pytest.mark.parametrize("base", ["nothing", "weight", "bias", "output"])
@pytest.mark.parametrize("rank", [5, 140])
def test_every_kind_of_base_is_added(base, rank):
    assert_as_exact_as_torch(case([rank], base=base))


# tokens, in, out. Tiles of float32 are small: here they end in all places.
@pytest.mark.parametrize(
    "tokens, features, out", [(1, 1, 1), (70, 130, 300), (32, 64, 128), (33, 3, 257), (100, 200, 7), (5, 1000, 40)]
)
def test_every_shape_is_as_exact_as_plain_torch(tokens, features, out):
    assert_as_exact_as_torch(case([6], [out], (tokens,), features, dtypes=(SINGLE, SINGLE)))


@pytest.mark.parametrize("tokens, features, out", [(70, 130, 1100), (64, 256, 512)])
def test_shapes_beyond_a_tile_of_2_byte_numbers(tokens, features, out):
    assert_as_exact_as_torch(case([6], [out], (tokens,), features))


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
@pytest.mark.parametrize("ranks, outs", [([16], [4096]), ([12, 5, 16], [2048, 512, 512]), ([64], [1040])])
@pytest.mark.parametrize("lead", [(4, 2049)])
def test_shapes_of_a_language_model(ranks, outs, lead):
    assert_as_exact_as_torch(case(ranks, outs, lead, 2048, base="bias"))


@pytest.mark.parametrize("ranks, dtypes", [((5,), USUAL), ((3, 20), (SINGLE, SINGLE)), ((64,), (SINGLE, SINGLE))])
def test_a_program_that_walks_down_several_blocks_of_tokens(ranks, dtypes, few_processors):
    tokens = 150
    assert_as_exact_as_torch(case(ranks, (150, 33)[: len(ranks)], (tokens,), dtypes=dtypes))
    run, count = configs.splits(-(-tokens // 32), 1, torch.device(DEVICE))
    assert run > 1 and count > 1


@pytest.mark.parametrize(
    "ranks, outs, base",
    [
        ((3, 8), (47, 20), "bias"),
        ((3, 8), (47, 20), "output"),
        ((3, 8, 16), (20, 33, 64), "bias"),
        ((17, 2), (30, 300), "weight"),
        ((64, 65), (47, 20), "bias"),  # 65 takes a tile of 128: each has passes of its own
        ((40, 100, 17), (40, 20, 30), "weight"),
        ((140, 5), (12, 9), "bias"),  # 128, and 12 and 5 together
        ((140, 5), (12, 9), "output"),
        ((4, 4, 4, 4), (9, 10, 11, 12), "weight"),
    ],
)
def test_layers_that_share_an_input(ranks, outs, base):
    assert_as_exact_as_torch(case(ranks, outs, (35,), base=base))


def test_bases_of_different_kinds_share_an_input():
    dense, given = case([3], base="bias"), case([5], [20], base="output")
    assert_as_exact_as_torch(Case(dense.x, dense.layers + given.layers, dense.dys + given.dys))


@pytest.mark.parametrize("rank", [3, 140])
def test_an_empty_batch_gives_zero_gradients(rank):
    shared = case([rank, 4], [47, 20], (0,))
    found = assert_as_exact_as_torch(shared)
    assert all(not found[f"d{name}"].any() for name in shared.leaves)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 4), (5, 0), (1, 7)])
def test_any_leading_dimensions(lead):
    assert_as_exact_as_torch(case(lead=lead, base="output"))


def test_an_adapter_without_ranks_leaves_the_base():
    shared = case([0, 3], [47, 20], base="bias")
    found = assert_as_exact_as_torch(shared)
    assert found["dA0"].shape == (0, 65) and found["dg0"].shape == (0,) and found["dB0"].shape == (0, 47)


def test_the_dtype_of_a_given_output_settles_that_of_the_products():
    wide = case(base="output", dtypes=(SINGLE, SINGLE))
    narrow = wide.copy(SINGLE)
    layer = narrow.layers[0]
    narrow = Case(narrow.x.detach(), [layer._replace(output=layer.output.detach().to(HALF))], [narrow.dys[0].to(HALF)])
    found, exact = results(narrow, kernels(narrow)), results(wide, formula(wide))
    assert found["y0"].dtype == found["dbase0"].dtype == HALF
    assert {found[f"d{name}"].dtype for name in ("x", "A0", "g0", "B0")} == {SINGLE}
    for name, value in exact.items():
        torch.testing.assert_close(found[name].float(), value, rtol=0, atol=0.02 * value.abs().max().item(), msg=name)


def agree(views, copies, exactly=True):
    """Both give the same: in every bit where the same kernels run, which on a GPU suit the layout."""
    if exactly and not GPU:
        assert_same_bits(results(views, kernels(views)), results(copies, kernels(copies)))
    else:
        assert_as_exact_as_torch(views)


def wider(t):
    """The same numbers as the middle of a larger tensor that holds NaN elsewhere."""
    around = torch.full([n + 6 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    middle = around[tuple(slice(3, n + 3) for n in t.shape)]
    return middle.copy_(t.detach())


def every_second(t):
    """The same numbers as every second row of a larger tensor that holds NaN elsewhere."""
    around = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype, device=t.device)
    return around[::2].copy_(t.detach())


def turned(t):
    return t.detach().mT.contiguous().mT if t.dim() > 1 else every_second(t)


@pytest.mark.parametrize("view", [wider, every_second, turned])
@pytest.mark.parametrize("base", ["bias", "output"])
def test_views_give_the_same_as_copies_and_nothing_around_them_is_read(view, base):
    whole = case([3, 6], [47, 20], base=base)
    layers = [Layer(*(view(t) if isinstance(t, torch.Tensor) else t for t in layer)) for layer in whole.layers]
    views = Case(view(whole.x), layers, [view(dy) for dy in whole.dys])
    # The frozen product may be summed in another order for another layout.
    agree(views, whole, exactly=base == "output")


@pytest.mark.parametrize("which", [0, 1])
def test_layers_that_share_an_input_may_lie_in_memory_differently(which):
    whole = case([3, 6, 4], [47, 20, 9], base="output")
    layers = [
        layer._replace(a=every_second(layer.a), b=wider(layer.b), output=wider(layer.output)) if i == which else layer
        for i, layer in enumerate(whole.layers)
    ]
    layers = [Layer(*(t.detach() if isinstance(t, torch.Tensor) else t for t in layer)) for layer in layers]
    agree(Case(whole.x.detach(), layers, whole.dys), whole)


def test_batches_may_be_turned_sliced_and_expanded():
    whole = case(lead=(4, 5), base="output")
    x = whole.x.detach()
    for twisted in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], -1)[..., :65],
        torch.cat([x, x], 1)[:, ::2],
        x[:1].expand(4, -1, -1),
        x[..., :1].expand(-1, -1, 65),
    ):
        assert not twisted.is_contiguous()
        agree(Case(twisted, whole.layers, whole.dys), Case(twisted.detach().contiguous(), whole.layers, whole.dys))


def test_gradients_of_outputs_may_be_turned_sliced_and_expanded():
    whole = case(lead=(4, 5), base="output")
    dy = whole.dys[0]
    for twisted in (
        dy.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([dy, dy], -1)[..., :47],
        torch.ones((), dtype=dy.dtype, device=DEVICE).expand(dy.shape),
        dy[:, :, :1].expand(dy.shape),
    ):
        assert not twisted.is_contiguous()
        agree(Case(whole.x, whole.layers, [twisted]), Case(whole.x, whole.layers, [twisted.contiguous()]))


@pytest.mark.parametrize("wanted", ["x", "A0 A1", "B0 B1", "g0 g1", "A0 B1", "x g0 g1", "base0 base1", "x A0 B1 g1"])
def test_only_the_gradients_that_are_needed_are_made(wanted):
    shared = case([3, 6], [47, 20], base="output")
    everything = results(shared, kernels(shared))
    for name, leaf in shared.leaves.items():
        leaf.requires_grad_(name in wanted.split())
    # An output that depends on nothing has no gradient to take.
    shared.dys = [dy if "x" in wanted or str(i) in wanted else None for i, dy in enumerate(shared.dys)]
    found = results(shared, kernels(shared))
    assert {name for name in found if name.startswith("d")} == {f"d{name}" for name in wanted.split()}
    same = assert_close if "g" in wanted else assert_same_bits  # without dB, another kernel adds up dg
    same(found, {name: everything[name] for name in found})


def test_nothing_is_kept_where_no_gradient_is_needed():
    frozen = case()
    for leaf in frozen.leaves.values():
        leaf.requires_grad_(False)
    assert not kernels(frozen)[0].requires_grad
    with torch.no_grad():
        assert not kernels(case())[0].requires_grad


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_output_that_is_not_used_gives_its_layer_no_gradient(unused):
    shared = case([3, 140 if unused == 1 else 4, 5], [47, 20, 9])
    shared.dys[unused] = None
    found = assert_as_exact_as_torch(shared)
    assert all(found[f"d{name}{unused}"] is None for name in "AgB")


def test_two_outputs_unused():
    shared = case([3, 4, 5], [47, 20, 9])
    shared.dys[0] = shared.dys[2] = None
    assert_as_exact_as_torch(shared)


def test_gradients_of_gradients_are_refused():
    one = case()
    y = kernels(one)[0].float()
    (dx,) = torch.autograd.grad(y.square().sum(), one.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.float().sum().backward()


def test_two_runs_agree_in_every_bit(few_processors):
    shared = case([3, 20], [150, 33], (100,))
    assert_same_bits(results(shared, kernels(shared)), results(shared, kernels(shared)))


def test_a_token_does_not_depend_on_its_neighbours():
    whole = case(base="output", lead=(80,))
    layer = whole.layers[0]
    part = Case(whole.x[:41].detach(), [layer._replace(output=layer.output[:41].detach())], [whole.dys[0][:41]])
    many, few = results(whole, kernels(whole)), results(part, kernels(part))
    assert_same_bits({k: many[k][:41] for k in ("y0", "dx")}, {k: few[k] for k in ("y0", "dx")})


def test_the_number_of_processors_does_not_change_outputs(monkeypatch):
    shared = case([3, 20], [150, 33], (100,))
    many = results(shared, kernels(shared))
    monkeypatch.setattr(configs, "processors", lambda device: 2)
    few = results(shared, kernels(shared))
    assert_same_bits({k: many[k] for k in ("y0", "y1", "dx")}, {k: few[k] for k in ("y0", "y1", "dx")})


def test_inputs_are_not_changed():
    shared = case([3, 20], [47, 20], base="output")
    kept = shared.copy(torch.float64)
    results(shared, kernels(shared))
    for name, leaf in shared.leaves.items():
        assert torch.equal(leaf.double(), kept.leaves[name]), name


def test_outputs_accumulate_into_a_gradient_that_is_there():
    one = case()
    for _ in range(2):
        fused(one.x, one.layers)[0].backward(one.dys[0])
    (expected,) = torch.autograd.grad(fused(one.x, one.layers), one.layers[0].a, one.dys)
    torch.testing.assert_close(one.layers[0].a.grad, 2 * expected)
