"""Layers that read one input: when they are computed together, what is handed over, and to whom."""

import gc
import weakref

import pytest
import torch
from attention_helpers import (
    DEVICE,
    Attention,
    as_stepped,
    assert_same,
    attention,
    calls,
    example,
    gradients,
    in_a_thread,
    randn,
    settled_attention,
)
from helpers import same_bits, shake
from torch.utils.checkpoint import checkpoint

import l1ra
from l1ra_kernels import choice, dispatch


@pytest.fixture(autouse=True)
def _fused():
    with choice.using("fused"):
        yield


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


def test_what_was_computed_in_a_checkpointed_region_is_not_used_outside(monkeypatch):
    model, x, seen = settled_attention(), example().requires_grad_(), calls(monkeypatch)
    checkpoint(model.q_proj, x, use_reentrant=False)
    model.k_proj(x)
    assert seen == [3, 1]


class Packs:
    """Hooks on what is saved that can't be referenced weakly."""

    __slots__ = ()

    def __call__(self, tensor):
        return tensor


@pytest.mark.parametrize("pack", [torch.Tensor.detach, Packs()])
def test_any_hooks_on_saved_tensors_will_do(pack):
    model, plain, x = settled_attention(), settled_attention(), example()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients(model, model, x)
    assert_same(found, gradients(plain, plain, x))


def test_an_input_that_begins_to_ask_for_a_gradient_gets_it():
    model, x = settled_attention(), example()
    model.q_proj(x)
    x.requires_grad_()
    model.k_proj(x).sum().backward()
    assert x.grad is not None


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
    in_a_thread(lambda: model.k_proj(x))
    assert seen == [3, 1]  # k has computed alone


def test_a_thread_does_not_take_what_another_computes(monkeypatch):
    model, mine, theirs = settled_attention(), example(), example()
    expected = model.k_proj(mine).detach()
    original, begun = dispatch.gated_linears, []

    def interrupted(*args):
        outputs = original(*args)
        if not begun:  # another thread computes q in the middle of ours
            begun.append(True)
            in_a_thread(lambda: model.q_proj(theirs))
        return outputs

    monkeypatch.setattr(dispatch, "gated_linears", interrupted)
    model.q_proj(mine)
    model.k_proj(theirs)
    model.q_proj(mine)
    assert_same([model.k_proj(mine).detach()], [expected])
    in_a_thread(lambda: begun.append(model.k_proj(theirs)))
    assert_same([begun[1].detach()], [model.k_proj(theirs).detach()])


def test_layers_that_are_computed_together_are_disabled_together():
    model, x = Attention().to(DEVICE), randn(4, 16)
    expected = model(x)
    controller = l1ra.patch(model, 12)
    with choice.using("fused"):
        shake(model)(x)
        adapted = model(x)  # q leads, and has computed k and v too
        with controller.disabled():
            assert same_bits(model(x), expected)
        assert same_bits(model(x), adapted)
        model.q_proj(x)
        with controller.disabled():
            assert same_bits(model.k_proj(x), model.k_proj.base_layer(x))
