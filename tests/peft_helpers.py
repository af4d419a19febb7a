"""Models with adapters of uneven ranks, and what PEFT makes of the files: for the tests of both directions."""

import json
import warnings

import pytest
import torch
from helpers import full, shake, tokens
from torch import nn

import l1ra
from l1ra.files.peft_export import CONFIG
from l1ra.layers.adapted_model import find_adapters

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")


class Cut(Exception):
    """What breaks a call off."""


def logits(model):
    reads_tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    x = tokens() if reads_tokens else torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def lively(model):
    """Weights that are not tiny, so that a wrong scale shows."""
    torch.manual_seed(5)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    return model.eval()


def uneven(model, **settings):
    """Patched: ranks 1, 2, 3, ..., gates from 1.4 to -0.7, some of them 0, and an adapter whose gates are all 0."""
    controller = l1ra.patch(
        model, 4 * sum(1 for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")), **settings
    )
    controller.close()
    for i, (_, layer) in enumerate(find_adapters(model)):
        layer.resize(full(min(layer.rank, 1 + i % 4), 0))
    for i, (_, layer) in enumerate(find_adapters(shake(model))):
        with torch.no_grad():
            layer.gate[: layer.rank] = torch.linspace(1.4, -0.7, layer.rank).masked_fill(
                torch.arange(layer.rank) == 2, 0
            )
            if i == 1:
                layer.gate.zero_()
    return model


def loaded(base, directory):
    """What PEFT makes of it; a missing or unexpected tensor, which PEFT only warns of, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|not found|unexpected).*")
        return peft.PeftModel.from_pretrained(base, directory).eval()


def close(a, b, tolerance=1e-5):
    assert a.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())
