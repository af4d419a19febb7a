"""Torch's default dtype and device, and inference mode, around calls of the library: they change nothing."""

import contextlib
import io

import pytest
import torch
from helpers import BRISK, Residual, as_lists, same_bits, step, task, trainable

import l1ra
from l1ra.reporting.self_check import run_checks


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "nothing": contextlib.nullcontext,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}
SETTINGS = {**BRISK, "min_coherence": 0.0, "new_rows": "gradient", "reserve": 8}


def whole_path(folder, around, library_only):
    """A training that is saved, loaded, exported, merged and imported: all that has come of it.

    ``library_only``: the circumstance is around calls of the library, not around forwards and steps.
    """
    inside = contextlib.nullcontext if library_only else around
    torch.manual_seed(0)
    model, fresh, imported = Residual(), Residual(), Residual()
    fresh.load_state_dict(model.state_dict())
    imported.load_state_dict(model.state_dict())
    x, y = task(model)
    with around():
        controller = l1ra.patch(model, 16, **SETTINGS)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with inside():
        for _ in range(20):
            step(model, optimizer, x, y)
    with around():
        controller.save(folder / "saved")
        state = controller.state_dict()
        controller.load_state_dict(state)
        again = l1ra.load(fresh, folder / "saved")
        l1ra.export_peft(model, folder / "peft")
        l1ra.from_peft(imported, folder / "peft", **BRISK)
        l1ra.merge(model)
        l1ra.unmerge(model)
        str(l1ra.report(model))
    second = torch.optim.AdamW(trainable(fresh), lr=1e-2)
    with inside():
        for _ in range(20):
            step(model, optimizer, x, y)
            step(fresh, second, x, y)
        step(imported, torch.optim.SGD(trainable(imported), lr=1e-2), x, y)
    assert controller.moved > 0 and again.steps == controller.steps == 40
    tensors = [t for part in (model, fresh, imported) for t in part.state_dict().values()]
    return as_lists(controller.state_dict()), as_lists(again.state_dict()), tensors


@pytest.mark.parametrize("name", ["bfloat16", "float64", "meta", "inference mode"])
def test_neither_defaults_nor_inference_mode_have_an_influence(name, tmp_path):
    # Nothing is trained in inference mode, but all the rest may be called in it.
    inference = name == "inference mode"
    around = torch.inference_mode if inference else DEFAULTS[name]
    expected = whole_path(tmp_path / "plain", contextlib.nullcontext, False)
    found = whole_path(tmp_path / name, around, inference)
    assert found[:2] == expected[:2]
    assert all(same_bits(a, b) for a, b in zip(found[2], expected[2], strict=True))


@pytest.mark.parametrize("name", ["bfloat16", "meta"])
def test_the_self_check_passes_whatever_the_defaults(name):
    with DEFAULTS[name]():
        checks = run_checks(torch.device("cpu"))
    assert all(check.ok is not False for check in checks), checks


def test_a_state_dict_with_other_ranks_can_be_loaded_in_inference_mode():
    torch.manual_seed(0)
    model, other = Residual(), Residual()
    x, y = task(model)
    l1ra.patch(other, 32, **BRISK)
    l1ra.patch(model, 16, **BRISK)
    with torch.inference_mode():
        model.load_state_dict(other.state_dict())
    step(model, torch.optim.SGD(trainable(model), lr=1e-2), x, y)


def test_a_controller_and_a_layer_can_be_made_in_inference_mode():
    with torch.inference_mode():
        layer = l1ra.L1RALinear(6, 6, rank=2)
    assert not any(p.is_inference() for p in layer.parameters())
    layer(torch.ones(1, 6)).sum().backward()
    with torch.inference_mode():
        controller = l1ra.RankController(layer, 4, total_steps=200)
    layer(torch.ones(1, 6)).sum().backward()
    torch.optim.SGD(trainable(layer), lr=1e-2).step()
    assert controller.steps == 1


def test_weights_that_were_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = Residual()
    with pytest.raises(ValueError, match=r"blocks.0.weight was made in torch.inference_mode\(\)"):
        l1ra.patch(model, 16)
    assert not any(isinstance(module, l1ra.L1RALinear) for module in model.modules())


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Residual()
    with pytest.raises(ValueError, match=r"blocks.0 is on the meta device, without values"):
        l1ra.patch(model, 16)
    assert not any(isinstance(module, l1ra.L1RALinear) for module in model.modules())


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(Residual(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"blocks.0 is offloaded by accelerate"):
        l1ra.patch(model, 16)
    model = Residual()
    l1ra.patch(model, 16, total_steps=10)
    x, y = task(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.param_groups[0]["params"] = trainable(model)
    with pytest.raises(RuntimeError, match=r"adapters are on the meta device.* without cpu_offload"):
        optimizer.step()


def test_a_report_is_printed_under_any_default():
    model = Residual()
    l1ra.patch(model, 16)
    texts = set()
    for around in DEFAULTS.values():
        with around():
            print(l1ra.report(model), file=(text := io.StringIO()))
        texts.add(text.getvalue())
    assert len(texts) == 1
