"""Whole trainings with ranks that move, under the circumstances of users' loops: the fused path against plain PyTorch.

The table is in ``circumstances.py``. On a GPU it runs in bfloat16. ``--every-circumstance``: each with each model.
"""

import copy
import dataclasses
from datetime import timedelta

import pytest
import torch
from circumstances import CIRCUMSTANCES, DEVICE, MODELS, STEPS, gradients, train
from torch import distributed, multiprocessing

from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra_kernels import choice

if not (choice.interpreting() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

# By how much they may differ, relatively: some roundings of a product.
LOSSES = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pytest_generate_tests(metafunc):
    if "circumstance" in metafunc.fixturenames:
        every, several = metafunc.config.getoption("--every-circumstance"), "tmp_path" in metafunc.fixturenames
        chosen = {c: how for c, how in CIRCUMSTANCES.items() if (how.processes > 1) == several}
        pairs = [(c, name) for c, how in chosen.items() for name in (MODELS if every else how.models)]
        metafunc.parametrize(("circumstance", "name"), pairs)


class Audit:
    """Holds the gradients of each step against those of copies of the model, in float64 and in plain torch: they err by
    no more than plain torch does, and two roundings of each adapted layer on the way, forward and backward."""

    def __init__(self):
        self.probes = self.steps = 0

    def __call__(self, training):
        self.steps += 1
        self.probes += any(layer.probe is not None for layer in training.controller.adapters.values())
        copies = [copy.deepcopy(training.model), copy.deepcopy(training.model).double()]
        for model in copies:
            if model.is_gradient_checkpointing:
                model.gradient_checkpointing_disable()
        with choice.using("torch"):
            exact = gradients(copies[1], training.rows)
            with torch.autocast(DEVICE, training.autocast, enabled=training.autocast is not None):
                plain = gradients(copies[0], training.rows)
        found = {name: p.grad for name, p in training.model.named_parameters() if p.grad is not None}
        assert found.keys() == exact.keys()
        roundings = 2 * len(training.controller.adapters) * torch.finfo(training.autocast or training.model.dtype).eps
        head = max(
            (g.abs().max() for n, g in exact.items() if n.rpartition(".")[2] not in ADAPTER_PARAMETERS), default=0.0
        )
        for name, expected in exact.items():
            mine, theirs = ((grads[name].double() - expected).abs().max() for grads in (found, plain))
            layer, _, part = name.rpartition(".")
            # The terms of a gate's gradient, B * dB, may cancel, and so may those of the gradient of a bias.
            b = f"{layer}.lora_B"
            size = (
                (copies[1].get_parameter(b) * exact[b]).abs().sum(1).max() if part == "gate" else expected.abs().max()
            )
            size = size if part in ADAPTER_PARAMETERS else head
            assert mine <= 1.2 * theirs + roundings * size, name


class Record:
    """Keeps the gradients of each step."""

    def __init__(self):
        self.gradients = []

    def __call__(self, training):
        grads = {name: p.grad.clone() for name, p in training.model.named_parameters() if p.grad is not None}
        self.gradients.append(grads)


def assert_same(found, expected, how):
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSSES[how.autocast or how.dtype])
    # Roundings of 16 bits decide between ranks that matter as much as each other; in the interpreter alike.
    if DEVICE == "cpu" or (how.dtype == torch.float32 and how.autocast is None):
        assert found["ranks"] == expected["ranks"]
    assert found["moved"] > 0 and expected["moved"] > 0


def test_the_fused_path_trains_as_plain_torch_does(circumstance, name):
    how = CIRCUMSTANCES[circumstance]
    if how.dropout:
        checkpointing_changes_nothing(how, name)
        return
    audit = Audit()
    found = train(name, how, "fused", audit)
    assert audit.steps == STEPS and 0 < audit.probes < audit.steps
    assert_same(found, train(name, how, "torch", lambda training: None), how)


def checkpointing_changes_nothing(how, name):
    """Masks differ between the paths, but not between a training with checkpointing and one without."""
    records = [Record(), Record()]
    kinds = (how, dataclasses.replace(how, checkpointing=""))
    found, expected = (train(name, kind, "fused", record) for kind, record in zip(kinds, records, strict=True))
    assert_same(found, expected, how)
    for mine, theirs in zip(*(record.gradients for record in records), strict=True):
        assert mine.keys() == theirs.keys()
        for part in ADAPTER_PARAMETERS:
            keys = [key for key in theirs if key.endswith(part)]
            size = max(theirs[key].abs().max() for key in keys)
            # Sums in another order; another mask changes them by a tenth and more.
            assert all((mine[key] - theirs[key]).abs().max() <= 1e-4 * size for key in keys)


def work(process, circumstance, name, folder):
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": process, "world_size": 2}
    distributed.init_process_group("gloo", **meeting, timeout=timedelta(seconds=120))
    how = CIRCUMSTANCES[circumstance]
    found = [train(name, how, kernels, lambda training: None, process) for kernels in ("torch", "fused")]
    torch.save(found, folder / f"{process}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_several_processes_train_on_the_fused_path_as_on_plain_torch(circumstance, name, tmp_path):
    multiprocessing.spawn(work, (circumstance, name, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=False) for process in range(2))
    for torch_path, fused_path in (first, second):
        assert_same(fused_path, torch_path, CIRCUMSTANCES[circumstance])
    assert first[1]["ranks"] == second[1]["ranks"]
