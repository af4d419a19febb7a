"""A recompute under activation checkpointing is the forward once more, whoever shares an input with whom, and whatever
has come or gone in between."""

import gc
import threading
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import shake, trainable
from test_fused_layers import DEVICE, Attention, as_stepped, attention, calls, randn, wide
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import l1ra
from l1ra_kernels import choice

KINDS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
}


BOTH = pytest.mark.parametrize("kernels", ["fused", "torch"])


@pytest.fixture(autouse=True)
def _path(request):
    with choice.using(request.getfixturevalue("kernels") if "kernels" in request.fixturenames else "fused"):
        yield


def gradients(model, run, x, seed=0):
    """Output and gradients of one forward and backward."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in trainable(model))]


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()) + 1e-7)


def example():
    return randn(5, 16)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_block_does_the_same_at_every_step(kind, dropout):
    model, plain, x = attention(dropout=dropout), attention(dropout=dropout), example()
    for step in range(5):
        found = gradients(model, partial(KINDS[kind], model), x, step)
        assert_same(found, gradients(plain, plain, x, step))
        as_stepped(model)
        as_stepped(plain)


@BOTH
@pytest.mark.parametrize("make", [attention, wide])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_selective_checkpointing_keeps_products(make, dropout, kernels):
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, products)
    model, plain, x = make(dropout=dropout), make(dropout=dropout), example()
    for step in range(3):
        found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context), x, step)
        assert_same(found, gradients(plain, plain, x, step))
        as_stepped(model)
        as_stepped(plain)


def directly(run, x):
    return run(x)


def in_regions(model, kind, regions, x):
    """An attention with each of q, k and v in a checkpointed region, or in none (""); one region is one call."""
    layers = {"q": model.q_proj, "k": model.k_proj, "v": model.v_proj}
    found = {}
    for region in dict.fromkeys(regions.values()):
        names = [name for name in layers if regions[name] == region]

        def run(x, names=names):
            return tuple(torch.tanh(layers[name](x)) for name in names)

        found |= zip(names, directly(run, x) if region == "" else kind(run, x), strict=True)
    return model.o_proj(found["q"] * found["k"] + found["v"])


# Of q, k and v; "" is none.
REGIONS = [
    ("one", "", ""),
    ("", "one", ""),
    ("", "", "one"),
    ("one", "one", ""),
    ("", "one", "one"),
    ("one", "other", ""),
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", REGIONS, ids=lambda places: ",".join(place or "none" for place in places))
def test_siblings_may_stand_in_different_regions(places, kind, dropout):
    regions, x = dict(zip("qkv", places, strict=True)), example()
    model, plain = attention(dropout=dropout), attention(dropout=dropout)
    for step in range(2):
        found = gradients(model, partial(in_regions, model, KINDS[kind], regions), x, step)
        assert_same(found, gradients(plain, partial(in_regions, plain, directly, regions), x, step))
        as_stepped(model)
        as_stepped(plain)


def test_what_is_learned_holds_from_the_next_step_on(monkeypatch):
    model, x, seen = attention(), example(), calls(monkeypatch)
    for _ in range(3):  # micro-batches
        model(x)
    assert seen == [1] * 12
    as_stepped(model)
    model(x)
    assert seen[12:] == [3, 1]


def test_without_a_graph_it_holds_at_once_and_does_not_reach_what_has_one(monkeypatch):
    model, x, seen = attention(), example(), calls(monkeypatch)
    with torch.no_grad():
        model(x)
        model(x)
    assert seen == [1, 1, 1, 1, 3, 1]
    model(x)
    assert seen[6:] == [1, 1, 1, 1]


def test_a_step_within_the_backward_changes_no_group():
    """As of optimizers that step in hooks on gradients."""
    model, x = nn.Sequential(Attention(), Attention()).to(DEVICE), example()
    l1ra.patch(model, 24)
    shake(model)
    # Before the recompute of the first block.
    handle = model[1].o_proj.lora_B.register_post_accumulate_grad_hook(lambda _: as_stepped(model[0]))

    def checkpointed(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    found = gradients(model, checkpointed, x)
    handle.remove()
    assert_same(found, gradients(model, model, x))


@contextmanager
def hooked(layer, hook):
    handle = layer.base_layer.register_forward_hook(hook)
    yield
    handle.remove()


def double(module, args, output):
    return 2 * output


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_a_hook_that_is_gone_before_the_backward_was_there_for_the_recompute_as_well(name):
    model, plain = attention(), attention()
    for _ in range(3):
        x = example().requires_grad_()
        model.zero_grad()
        heard = []
        with hooked(getattr(model, name), lambda *_: heard.append(True)):  # noqa: B023
            y = checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad for p in trainable(model))]
        assert heard == [True]
        assert_same(found, gradients(plain, plain, x.detach()))
        as_stepped(model)
        as_stepped(plain)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_a_hook_that_comes_before_the_backward_was_not_there(name):
    model, plain, x = attention(), attention(), example()
    for _ in range(3):
        x = x.detach().requires_grad_()
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False)
        with hooked(getattr(model, name), double):
            y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad.clone() for p in trainable(model))]
        assert_same(found, gradients(plain, plain, x.detach()))
        as_stepped(model)
        as_stepped(plain)
    with hooked(model.q_proj, double):  # and from the next forward on it is heard
        assert not torch.equal(model(x), plain(x))


@BOTH
def test_what_was_disabled_is_disabled_in_its_recompute(kernels):
    torch.manual_seed(0)
    model = Attention().to(DEVICE)
    expected = gradients(model, model, torch.ones(5, 16, device=DEVICE))[:2]
    controller = l1ra.patch(model, 12)
    shake(model)
    for _ in range(2):
        x = torch.ones(5, 16, device=DEVICE, requires_grad=True)
        with controller.disabled():
            y = checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
        assert_same([y.detach(), x.grad], expected)
        assert all(p.grad is None for p in trainable(model))
        as_stepped(model)


def test_the_path_of_the_recompute_is_that_of_the_forward():
    model, plain, x = attention(), attention(), example().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    with choice.using("torch"):
        y.square().sum().backward()
    assert_same([p.grad for p in trainable(model)], gradients(plain, plain, x.detach())[2:])


def settled_attention():
    model = attention()
    model(example())
    as_stepped(model)
    return model


class Node(torch.autograd.Function):
    """The identity, whose node in the graph lets it be known whether it is still there."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


def broken_off(model):
    """A forward that ends after q: k and v are computed, and nobody takes them. A reference to a node of its graph."""
    hidden = Node.apply(example().requires_grad_())
    model.q_proj(hidden)
    return weakref.ref(hidden.grad_fn)


def test_a_forward_that_was_broken_off_holds_no_graph_once_the_next_one_has_begun():
    first, second = settled_attention(), settled_attention()
    held = broken_off(first)
    assert held() is not None
    second(example())
    assert held() is None


def test_a_model_that_is_gone_leaves_no_graph():
    model = settled_attention()
    held = broken_off(model)
    del model
    gc.collect()
    assert held() is None


def test_an_input_is_not_shared_across_threads(monkeypatch):
    model, x, seen = settled_attention(), example(), calls(monkeypatch)
    model.q_proj(x)
    thread = threading.Thread(target=lambda: model.k_proj(x))
    thread.start()
    thread.join()
    assert seen == [3, 1]  # choice.using is process-wide, and so is what runs
