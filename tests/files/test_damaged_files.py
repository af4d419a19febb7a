"""Checkpoints and LoRAs with random damage: an error in words and a model left alone, or what was written."""

import copy
import functools
import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import as_lists, assert_untouched, patched, same_bits, shake, snapshot, step

import l1ra
from l1ra.allocation.plan import LayerPlan
from l1ra.files.checkpoint import INDEX, _digest
from l1ra.files.peft_export import CONFIG, WEIGHTS

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
safe = pytest.importorskip("safetensors.torch")

VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "(",
    [],
    ["x"],
    {},
    {"x": 1},
    {"(": 1},
]


def fuzzed(count):
    return hypothesis.settings(max_examples=count, derandomize=True, deadline=None, database=None)


def made(steps=7, **settings):
    """In the middle of an interval, with uneven ranks and a gradient that waits for its step."""
    torch.manual_seed(0)
    model, controller, optimizer, x, y = patched(interval=3, **settings)
    for _ in range(steps):
        step(model, optimizer, x, y)
    model(x).sum().backward()
    return model, controller


def fresh():
    return l1ra.unpatch(made(0)[0])


def files_of(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


# No fixtures: hypothesis prints all arguments of a test that fails.
@functools.cache
def saved():
    """The model, its controller, and the files of its checkpoint and of another one's."""
    model, controller = made(10)
    with tempfile.TemporaryDirectory() as mine, tempfile.TemporaryDirectory() as other:
        controller.save(mine)
        made(13, seed=5)[1].save(other)
        return model, controller, files_of(mine), files_of(other)


@functools.cache
def lora():
    """The base model, and the files of a LoRA on it."""
    model = made(0, target_modules=["0", "1"], modules_to_save=["2"])[0]
    model.blocks[0].resize(LayerPlan((0, 1)))
    with tempfile.TemporaryDirectory() as folder:
        l1ra.export_peft(shake(model), folder)
        return l1ra.unpatch(model), files_of(folder)


def a_part_of(data, value, path=()):
    """The way to some part of a JSON value."""
    ways = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not ways or (path and data.draw(st.booleans())):
        return path
    way = data.draw(st.sampled_from(ways))
    return a_part_of(data, value[way], (*path, way))


def with_another_part(data, value):
    """A JSON value of which a part is another one, or is gone."""
    value = copy.deepcopy(value)
    *way, last = a_part_of(data, value)
    owner = value
    for name in way:
        owner = owner[name]
    if data.draw(st.booleans()):
        owner[last] = data.draw(st.sampled_from(VALUES))
    else:
        del owner[last]
    return value


def with_other_tensors(data, content):
    """A safetensors file of which a tensor is gone, or has another shape, type or name."""
    tensors = safe.load(content)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    change = data.draw(st.sampled_from(["gone", "row", "flat", "scalar", "integer", "nan", "name"]))
    if change == "row":
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    elif change == "flat":
        tensors[name] = tensor.flatten()[None]
    elif change == "scalar":
        tensors[name] = torch.zeros((), dtype=tensor.dtype)
    elif change == "integer":
        tensors[name] = tensor.to(torch.int32)
    elif change == "nan":
        tensors[name] = torch.full_like(tensor.float(), torch.nan)
    elif change == "name":
        tensors[name[: data.draw(st.integers(0, len(name) - 1))] + "x"] = tensor
    return safe.save(tensors)


def with_other_bytes(data, content):
    kind = data.draw(st.sampled_from(["flip", "flip at the start", "cut", "insert", "zeros"]))
    content = bytearray(content)
    at = data.draw(st.integers(0, min(len(content), 400 if kind == "flip at the start" else 10**9) - 1))
    if kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "zeros":
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(content)


def written(files, folder):
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
    return folder


def refused(model, controller, call):
    """Whether ``call`` was refused as it should be: in words, with the model and its controller as they were."""
    before = snapshot(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = controller and as_lists(controller.state_dict())
    try:
        call()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        # Neither JSON's nor torch's: ours say where, and what to do.
        assert type(error) in (ValueError, FileNotFoundError) or str(error).startswith("strict=True"), repr(error)
        assert len(str(error).split()) > 5, error
        assert_untouched(model, before)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None) == (grad is None) and (grad is None or same_bits(p.grad, grad))
        assert controller is l1ra.layers.adapted_model.controller_of(model)
        assert controller is None or as_lists(controller.state_dict()) == state
        return True
    return False


@fuzzed(150)
@hypothesis.given(data=st.data(), into=st.sampled_from(["fresh", "patched"]))
def test_a_checkpoint_with_other_bytes_is_refused_or_loads_what_was_saved(data, into):
    original, expected, files, others = saved()
    files = dict(files)
    name = data.draw(st.sampled_from(sorted(files)))
    kind = data.draw(st.sampled_from(["bytes", "bytes", "bytes", "gone", "another's"]))
    if kind == "bytes":
        files[name] = with_other_bytes(data, files[name])
    elif kind == "gone":
        del files[name]
    else:
        same_kind = [other for other in others if other.split("-")[0] == name.split("-")[0]]
        files[name] = others[same_kind[0]]
    model, controller = made() if into == "patched" else (fresh(), None)
    with tempfile.TemporaryDirectory() as folder:
        if not refused(model, controller, lambda: l1ra.load(model, written(files, folder))):
            assert all(same_bits(p, q) for p, q in zip(model.parameters(), original.parameters(), strict=True))
            loaded = l1ra.layers.adapted_model.controller_of(model)
            assert as_lists(loaded.state_dict()) == as_lists(expected.state_dict())


@fuzzed(250)
@hypothesis.given(data=st.data(), into=st.sampled_from(["fresh", "patched"]))
def test_a_checkpoint_that_is_whole_but_makes_no_sense_is_refused(data, into):
    """As another program could write it, with sums that are right."""
    _, expected, files, _ = saved()
    files = dict(files)
    index = json.loads(files[INDEX])
    del index["sha256"]
    kind = data.draw(st.sampled_from(["index", "adapters", "controller"]))
    if kind == "index":
        index = with_another_part(data, index)
    else:
        entry = index["files"][kind]
        files[entry["name"]] = with_other_tensors(data, files[entry["name"]])
        entry["sha256"] = hashlib.sha256(files[entry["name"]]).hexdigest()
    files[INDEX] = json.dumps({**index, "sha256": _digest(index)}).encode()
    model, controller = made() if into == "patched" else (fresh(), None)
    with tempfile.TemporaryDirectory() as folder:
        if not refused(model, controller, lambda: l1ra.load(model, written(files, folder))):
            assert l1ra.layers.adapted_model.controller_of(model).ranks == expected.ranks


@fuzzed(300)
@hypothesis.given(data=st.data(), kind=st.sampled_from(["bytes", "settings", "tensors", "gone"]))
def test_a_lora_that_is_damaged_is_refused_or_is_another_lora(data, kind):
    model, files = lora()
    model, files = copy.deepcopy(model), dict(files)
    before = snapshot(model)
    if kind == "settings":
        files[CONFIG] = json.dumps(with_another_part(data, json.loads(files[CONFIG]))).encode()
    elif kind == "tensors":
        files[WEIGHTS] = with_other_tensors(data, files[WEIGHTS])
    else:
        name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
        content = files.pop(name)
        if kind == "bytes":
            files[name] = with_other_bytes(data, content)
    with tempfile.TemporaryDirectory() as folder:
        if not refused(model, None, lambda: l1ra.from_peft(model, written(files, folder))):
            assert all(p.isfinite().all() for p in model.parameters())
            l1ra.unpatch(model).blocks[2].load_state_dict(lora()[0].blocks[2].state_dict())  # what was trained in full
            assert_untouched(model, before)
