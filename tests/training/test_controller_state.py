"""The state of a controller: resumed bit for bit, refused where it does not fit."""

import copy
import io

import pytest
import torch
from helpers import patched, play, same_bits, step, trainable

import l1ra
from l1ra.files.controller_state import GATES, SCHEMA
from l1ra.files.schema import mismatch
from l1ra.layers.adapted_model import find_adapters


def run_to(steps, *made):
    model, controller, optimizer, x, y = made
    while controller.steps < steps:
        step(model, optimizer, x, y)
    return made


def test_a_run_resumed_from_its_state_goes_on_bit_for_bit():
    whole = run_to(60, *patched(init="gaussian", new_rows="random"))
    torch.manual_seed(0)
    first = run_to(31, *patched(init="gaussian", new_rows="random"))
    file = io.BytesIO()
    torch.save({"model": first[0].state_dict(), "ranks": first[1].state_dict(), "adam": first[2].state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert len(set(first[1].ranks.values())) > 1  # ranks differ by now

    second = (*patched(init="gaussian", new_rows="random", seed=9)[:3], *first[3:])
    second[0].load_state_dict(saved["model"])
    second[1].load_state_dict(saved["ranks"])
    second[2].load_state_dict(saved["adam"])
    assert second[1].ranks == first[1].ranks and second[1].gates() == first[1].gates()
    run_to(60, *second)
    assert second[1].history == whole[1].history and second[1].moved == whole[1].moved
    assert all(same_bits(a, b) for a, b in zip(second[0].parameters(), whole[0].parameters(), strict=True))


def seeded_patched(**settings):
    torch.manual_seed(0)
    return patched(new_rows="gradient", **settings)  # which depend on all that a probe has seen


# Around a reallocation, while probes look at the gradients and after it.
@pytest.mark.parametrize("at", [*range(19, 32)])
def test_a_run_can_be_broken_off_after_any_step(at):
    whole, first = (run_to(steps, *seeded_patched()) for steps in (60, at))
    saved = copy.deepcopy([part.state_dict() for part in first[:3]])
    second = run_to(7, *seeded_patched(seed=9))  # what a controller has begun by itself is forgotten
    for part, state in zip(second[:3], saved, strict=True):
        part.load_state_dict(state)
    run_to(60, *second)
    assert second[1].history == whole[1].history and second[1].moved == whole[1].moved > 0
    assert all(same_bits(a, b) for a, b in zip(second[0].parameters(), whole[0].parameters(), strict=True))


def test_gates_that_were_loaded_are_not_read_again_when_they_are_rounded_later():
    model, controller, optimizer, x, _ = run_to(16, *patched())
    saved, ranks = copy.deepcopy([part.state_dict() for part in (model, controller, optimizer)]), controller.ranks
    model, controller, optimizer, x, _ = run_to(9, *patched(seed=9))
    assert controller.ranks != ranks
    for part, state in zip((model, controller, optimizer), saved, strict=True):
        part.load_state_dict(state)
    gates, held = controller.gates(), [layer.gate.detach().clone() for _, layer in find_adapters(model)]
    model.bfloat16().float()
    assert not all(same_bits(layer.gate, was) for (_, layer), was in zip(find_adapters(model), held, strict=True))
    model(x).sum().backward()
    next(layer for _, layer in find_adapters(model)).gate.grad[0] = torch.nan  # a step that leaves the gates alone
    optimizer.step()
    assert controller.gates() == gates


@pytest.mark.parametrize("reserve", [None, 8])
def test_a_model_that_was_cast_keeps_the_master_gates(reserve):
    model, controller, *_ = run_to(31, *patched(reserve=reserve))
    gates = controller.state_dict()["gates"]["value"]
    model.bfloat16()  # the layers hold the same, rounded
    assert torch.equal(controller.state_dict()["gates"]["value"], gates)
    model.float()
    cast = controller.state_dict()["gates"]["value"]
    assert cast.min() >= 0 and cast.max() <= 1
    torch.testing.assert_close(cast, gates, rtol=2**-7, atol=0)


def test_a_state_does_not_change_when_the_run_goes_on():
    made = run_to(20, *patched())
    state = made[1].state_dict()
    kept = copy.deepcopy(state)
    run_to(40, *made)
    assert state["history"] == kept["history"] and torch.equal(state["gates"]["value"], kept["gates"]["value"])


@pytest.mark.parametrize("ranks", ["same ranks", "other ranks"])
def test_gates_of_a_state_dict_loaded_without_the_controllers_are_taken_over(ranks):
    model, controller, optimizer, x, y = patched()
    source = patched()[0]
    with torch.no_grad():
        for _, layer in find_adapters(source):
            layer.gate.fill_(0.5)
    if ranks == "other ranks":
        source.blocks[0].resize(l1ra.allocation.plan.LayerPlan((0, 1)))
        source.blocks[1].resize(l1ra.allocation.plan.LayerPlan((0, 1, 2, 3), 1))
    step(model, optimizer, x, y)
    model.load_state_dict(source.state_dict())
    play(controller, {})  # so that no rule moves them either
    step(model, torch.optim.SGD(trainable(model), lr=0.1), x, y)
    expected = {n: [0.5] * a.rank for n, a in find_adapters(model)}
    if ranks == "other ranks":
        expected["blocks.1"][-1] = 1.0
    held = {n: pytest.approx((a.gate / a.rank_scaling).tolist()) for n, a in find_adapters(model)}
    assert controller.gates() == held and controller.gates() == expected


def test_the_form_names_all_of_a_state():
    state = run_to(20, *patched())[1].state_dict()
    assert SCHEMA.keys() == state.keys() and mismatch(state, SCHEMA) == "" and set(state["gates"]) == set(GATES)


def snapshot(controller):
    return copy.deepcopy({**controller.state_dict(), "generator": controller._interval.generator.get_state().tolist()})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("gates"), "no state of a RankController: gates missing"),
        (lambda s: s.pop("initial_ranks"), "no state of a RankController: initial_ranks missing"),
        (lambda s: s.clear(), "no state of a RankController"),
        (lambda s: s["ranks"].update(other=3), "other adapters"),
        (lambda s: s.update(budget=99), "budget 99, this controller 16"),
        (lambda s: s.update(rule="l1"), "rule 'l1', this controller 'adaptive-l1'"),
        (lambda s: s["ranks"].update({"blocks.0": 99}), "load the model's state dict first"),
        (
            lambda s: s["scalings"].update({"blocks.0": 3.0}),
            "scaling 3 at blocks.0, this model 1: patch it with the same",
        ),
        (lambda s: s["probes"].update({"blocks.0": {"mix": torch.zeros(2, 3)}}), "probe that does not fit blocks.0"),
        (lambda s: s["probes"]["blocks.1"].update(seen=torch.zeros(3)), "probe that does not fit blocks.1"),
        (lambda s: s["probes"]["blocks.1"].pop("seen"), "probe that does not fit blocks.1"),
        (
            lambda s: s["scale_with_rank"].update({"blocks.2": False}),
            "scale_with_rank=False at blocks.2, this model True",
        ),
        (lambda s: s["gates"].pop("age"), "age"),
        (lambda s: s["gates"].update(age=torch.zeros(3)), "age"),
        (lambda s: s["gates"]["value"].fill_(torch.nan), "no finite 'value'"),
        (lambda s: s.update(steps="3"), "no state of a RankController: steps is no int"),
        (
            lambda s: s["history"].append({}),
            r"history\.\d: step, ranks, spare, gates, pruned, moved, coherence missing",
        ),
        (lambda s: s["scalings"].pop("blocks.1"), "other adapters"),
        (lambda s: s["history"][-1]["ranks"].pop("blocks.1"), "other adapters"),
        (lambda s: s.update(generator=torch.zeros(9, dtype=torch.uint8)), "the state has no generator: "),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(damage, message):
    _, controller, *_ = run_to(20, *patched())
    state = copy.deepcopy(run_to(25, *patched())[1].state_dict())
    state["ranks"] = dict(controller.ranks)
    before = snapshot(controller)
    damage(state)
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state)
    after = snapshot(controller)
    for name in before:
        if name in ("gates", "probes"):
            torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
        else:
            assert before[name] == after[name], name
