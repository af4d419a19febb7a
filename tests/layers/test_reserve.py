"""Adapters whose tensors have a fixed number of rows, whatever their rank becomes."""

import pytest
import torch
from helpers import BRISK, OPTIMIZERS, Residual, patched, same_bits, shake, step, task, tokens, trainable
from torch._dynamo.testing import CompileCounterWithBackend

import l1ra
from l1ra.allocation.plan import LayerPlan
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.linear import L1RALinear
from l1ra_kernels import choice

SETTINGS = {**BRISK, "min_interval": 1}


def memory(model, optimizer):
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()]
    return [(t.data_ptr(), t.shape) for t in [*model.parameters(), *state]]


def assert_nothing_beyond_the_ranks(model):
    for _, layer in find_adapters(model):
        for rows in (layer.lora_A, layer.gate, layer.lora_B):
            assert len(rows) == layer.reserve and not rows[layer.rank :].any()


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "RMSprop", "Adagrad", "Adafactor"])
def test_a_training_goes_the_same_way_with_a_reserve(name):
    ends = []
    for reserve in (None, 12):
        torch.manual_seed(0)
        model = Residual()
        x, y = task(model)
        controller = l1ra.patch(model, 16, **SETTINGS, reserve=reserve)
        optimizer = OPTIMIZERS[name](trainable(model))
        losses = [step(model, optimizer, x, y).item() for _ in range(45)]
        ends.append((controller.ranks, losses))
    assert controller.moved > 5
    if name != "Adafactor":  # its factors are means over all rows
        assert ends[0][0] == ends[1][0]
        assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert_nothing_beyond_the_ranks(model)


def test_neither_shapes_nor_addresses_change():
    model, controller, optimizer, x, y = patched(reserve=12, min_interval=1)
    step(model, optimizer, x, y)
    before = memory(model, optimizer)
    for _ in range(45):
        step(model, optimizer, x, y)
        assert_nothing_beyond_the_ranks(model)
        assert sum(controller.ranks.values()) <= 16
    assert controller.moved > 5 and memory(model, optimizer) == before


def test_no_rank_grows_beyond_the_reserve():
    _, controller, *_ = trained = patched(reserve=5, min_interval=1)
    model, _, optimizer, x, y = trained
    for _ in range(45):
        step(model, optimizer, x, y)
    assert controller.moved > 2 and max(controller.ranks.values()) <= 5


@pytest.mark.parametrize(("saved", "loaded"), [(12, None), (None, 12), (12, 9), (9, 12), (12, 12)])
def test_a_state_dict_fits_any_reserve_that_holds_its_ranks(saved, loaded):
    def build(reserve):
        torch.manual_seed(0)
        layer = L1RALinear(20, 20, rank=4, alpha=4, reserve=reserve)
        layer.resize(LayerPlan((0, 2, 3), 4))
        return shake(layer)

    first, second = build(saved), L1RALinear(20, 20, rank=4, alpha=4, reserve=loaded)
    second.load_state_dict(first.state_dict())
    assert second.rank == first.rank == 7 and second.reserve == loaded
    x = torch.randn(3, 20)
    torch.testing.assert_close(second(x), first(x))


def test_a_reserve_too_small_for_a_state_dict_is_refused():
    first, second = L1RALinear(20, 20, rank=9), L1RALinear(20, 20, rank=4, reserve=6)
    before = second.lora_A.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        second.load_state_dict(first.state_dict())
    assert same_bits(second.lora_A, before)


def test_the_reserve_is_not_counted_as_parameters():
    model = Residual()
    l1ra.patch(model, 16, reserve=12)
    report = l1ra.report(model)
    assert report.params == 16 * (12 + 12 + 1) and report.trained_in_full == 0


@pytest.mark.parametrize(("value", "message"), [(0, "at least 1"), (2.0, "must be an int"), (True, "must be an int")])
def test_a_reserve_that_makes_no_sense_is_refused(value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        l1ra.patch(Residual(), 16, reserve=value)


def test_a_budget_beyond_all_reserves_stays_spare():
    controller = l1ra.patch(Residual(), 40, reserve=6)
    assert set(controller.ranks.values()) == {6} and controller.spare == 40 - 4 * 6


def test_a_layer_keeps_to_its_reserve():
    layer = L1RALinear(20, 20, rank=4, reserve=6)
    with pytest.raises(ValueError, match="no more than 6"):
        layer.resize(LayerPlan((0, 1, 2, 3), 3))
    assert layer.rank == 4
    with pytest.raises(ValueError, match="reserve must be"):
        L1RALinear(20, 20, rank=4, reserve=3)


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize(
    ("settings", "graphs"), [({"rule": "l1", "gate_lr": 0.5, "l1_lambda": 1.0, "new_rows": "random"}, 1), ({}, 2)]
)
def test_a_compiled_model_is_not_compiled_anew_when_ranks_move(settings, graphs, kernels):
    # There is one graph more with probes: that of the steps at which they ride along.
    if kernels == "fused" and not (choice.interpreting() or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    torch._dynamo.reset()
    with choice.using(kernels):
        model, controller, optimizer, x, y = patched(reserve=12, min_interval=1, interval=4, **settings)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(14):
            step(compiled, optimizer, x, y)
    assert controller.moved > 2 and counter.frame_count == graphs


def test_a_transformers_model_trains_with_a_reserve():
    from helpers import llama

    model = llama()
    controller = l1ra.patch(model, 28, **SETTINGS, reserve=8)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ids = tokens()
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert controller.moved > 0
    assert_nothing_beyond_the_ranks(model)
