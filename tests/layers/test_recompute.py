"""A recompute under activation checkpointing is the forward once more, whoever shares an input with whom, and whatever
has come or gone in between."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from attention_helpers import (
    DEVICE,
    Attention,
    as_stepped,
    assert_same,
    attention,
    example,
    gradients,
    in_a_thread,
    settled_attention,
    wide,
)
from helpers import shake, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import l1ra
from l1ra.layers import recompute
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


def test_the_region_is_known_in_forward_and_recompute():
    """It is read off torch's own hooks: should a version of torch change them, this is where it shows."""
    found = []

    def run(x):
        found.append(recompute._region())
        return torch.sin(x)

    y = checkpoint(run, example().requires_grad_(), use_reentrant=False)
    assert recompute._region() == (None, False)
    y.sum().backward()
    (forward, first), (again, second) = found
    assert forward is again is not None and (first, second) == (False, True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_the_region_is_not_known_groups_still_change_at_steps_alone(dropout, monkeypatch):
    monkeypatch.setattr(recompute, "_region", lambda: (None, False))
    test_a_checkpointed_block_does_the_same_at_every_step("non-reentrant", dropout)
    test_a_step_within_the_backward_changes_no_group()


@contextmanager
def nothing(*_):
    yield


@contextmanager
def lowered(*_):
    with torch.autocast(DEVICE, torch.float16):
        yield


@contextmanager
def observed(model, controller):
    with hooked(model.q_proj, lambda *_: None), hooked(model.o_proj, lambda *_: None):
        yield


@contextmanager
def disabled(model, controller):
    with controller.disabled():
        yield


@BOTH
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("around", [(nothing, lowered), (lowered, nothing), (nothing, observed), (nothing, disabled)])
def test_two_forwards_that_differ_wait_for_one_backward(around, kept, kernels):
    losses = []
    for run in (partial(checkpoint, use_reentrant=False), directly):
        torch.manual_seed(0)
        model = Attention().to(DEVICE)
        controller = l1ra.patch(model, 12)
        shake(model)
        found = []
        for _ in range(3):
            model.zero_grad()
            outputs = []
            for context in around:
                with context(model, controller):
                    outputs.append(run(model, example().fill_(0.5).requires_grad_()).float())
            if not kept:
                outputs[1] = outputs[1].detach()
            sum(y.square().sum() for y in outputs).backward()
            found += [p.grad.clone() for p in trainable(model)]
            as_stepped(model)
        losses.append(found)
    assert_same(*losses)


def swapped(model):
    """As an evaluation with averaged weights does."""
    with torch.no_grad():
        kept = [p.clone() for p in trainable(model)]
        for p in trainable(model):
            p.mul_(0.5)
        model(example())
        for p, value in zip(trainable(model), kept, strict=True):
            p.copy_(value)


def teacher(model):
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        torch.func.functional_call(model, averaged, (example(),))


def loaded(model):
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        model(example())


@pytest.mark.parametrize("between", [swapped, teacher, loaded])
def test_writing_to_parameters_is_not_always_a_step(between):
    model, plain = attention(), attention()
    for _ in range(3):
        x = example().requires_grad_()
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False)
        between(model)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad.clone() for p in trainable(model))]
        assert_same(found, gradients(plain, plain, x.detach()))
        as_stepped(model)
        as_stepped(plain)


def test_functions_that_are_transformed_run_as_plain_torch():
    model, x = settled_attention(), example()

    def loss(x):
        return model(x).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    assert_same([torch.func.grad(loss)(x.detach())], [expected])
    rows = torch.func.vmap(torch.func.grad(loss))(x.detach().unsqueeze(1))
    assert_same([rows.squeeze(1)], [expected])


def test_room_that_is_made_between_forward_and_backward_disturbs_no_graph():
    model, x = wide(), example().requires_grad_()
    with hooked(model.up_proj, lambda *_: None), hooked(model.gate_proj, lambda *_: None):
        y = model(x)
    with torch.no_grad():
        model(x)
    assert not model.up_proj.weight.is_contiguous()
    y.sum().backward()


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_may_run_in_another_thread(kind):
    """As it does on a GPU."""
    model, plain = attention(), attention()
    for _ in range(4):
        x = example().requires_grad_()
        model.zero_grad()
        y = KINDS[kind](model, x)
        in_a_thread(y.square().sum().backward)
        found = [y.detach(), x.grad, *(p.grad.clone() for p in trainable(model))]
        assert_same(found, gradients(plain, plain, x.detach()))
        as_stepped(model)
        as_stepped(plain)
