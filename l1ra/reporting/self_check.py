"""What the doctor tries on a device: kinds of layers against float64, a reallocation, a checkpoint there and back."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l1ra.layers.base_layers import bnb_kind, dense_weight
from l1ra.layers.linear import L1RALinear
from l1ra.layers.padded_weight import PaddedWeight
from l1ra.model.load import load
from l1ra.model.patch import patch
from l1ra.training.controller import RankController
from l1ra_kernels import choice

__all__ = ["Check", "checks"]

TOKENS, IN, OUT, RANK = 48, 64, 128, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of an error relative to the norm, in units of the dtype's rounding: sums of a hundred products lose a few of them, a
# wrong number loses everything.
TOLERANCE = 8
COMPARED = ("the output", "the gradient of x", "the gradient of A", "the gradient of the gate", "the gradient of B")
BUDGET = 8
BRISK = {"interval": 4, "total_steps": 40, "warmup": 0.0, "margin": 1.0, "turnover": 0.5, "gate_lr": 1.0}


@dataclass(frozen=True)
class Check:
    """Something that was tried.

    Attributes:
        what: the kind of layer, or what was done.
        dtype: of the layer's input; "" where there is no layer.
        path: which implementation ran and why, as in ``ReportRow``; "" where there is no layer.
        ok: None if it could not be tried.
        told: what was found, in words.
    """

    what: str
    dtype: str
    path: str
    ok: bool | None
    told: str


class _Wrong(Exception):
    """A result that is not what it should be."""


def checks(device: torch.device) -> list[Check]:
    """Try everything on ``device``. Nothing is raised, and torch's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        warnings.simplefilter("ignore")
        found = [_try_layer(what, make, device, dtype) for what, make in KINDS.items() for dtype in DTYPES]
        return [*found, _try("a reallocation", _reallocation, device), _try("save and load", _checkpoint, device)]


def _try(what: str, action: Callable[[torch.device], str], device: torch.device) -> Check:
    try:
        return Check(what, "", "", True, action(device))
    except Exception as error:
        return Check(what, "", "", False, _words(error))


def _try_layer(
    what: str, make: Callable[[torch.device, torch.dtype], nn.Module], device: torch.device, dtype: torch.dtype
) -> Check:
    name, path = str(dtype).removeprefix("torch."), ""
    try:
        base = make(device, dtype)
        x, dy = (torch.randn(TOKENS, size).to(device, dtype) for size in (IN, OUT))
        base(x)
    except ImportError as error:
        return Check(what, name, path, None, f"{(error.name or str(error)).partition('.')[0]} can't be imported")
    except Exception as error:
        return Check(what, name, path, None, f"the layer itself fails: {_words(error)}")
    try:
        layer = L1RALinear.from_linear(base, rank=RANK)
        layer.padded_weight = PaddedWeight() if what == AUGMENTED else None
        taken = layer.kernel_path(x)
        path = str(taken)
        if taken.fused and choice.interpreting() and dtype == torch.bfloat16:
            return Check(what, name, path, None, "Triton's interpreter does not multiply bfloat16 right")
        return Check(what, name, path, True, _compare(layer, x.requires_grad_(), dy))
    except Exception as error:
        return Check(what, name, path, False, _words(error))


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, _Wrong) else f"{type(error).__name__}: {text}"


def _linear(device: torch.device, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(IN, OUT).to(device, dtype)


def _conv1d(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN).to(device, dtype)


def _four_bit(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(IN, OUT, compute_dtype=dtype, quant_type="nf4").to(device)


def _eight_bit(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return Linear8bitLt(IN, OUT, has_fp16_weights=False).to(device)


DENSE, AUGMENTED, CONV1D = "nn.Linear", "nn.Linear, augment=True", "transformers' Conv1D"
KINDS = {
    DENSE: _linear,
    AUGMENTED: _linear,
    CONV1D: _conv1d,
    "bitsandbytes' Linear4bit": _four_bit,
    "bitsandbytes' Linear8bitLt": _eight_bit,
}


def _compare(layer: L1RALinear, x: Tensor, dy: Tensor) -> str:
    """Output and gradients of an adapted layer against float64; the largest relative error, in words."""
    with torch.no_grad():
        layer.gate.uniform_(0.2, 1.0)
        layer.lora_B.normal_()
    params = (x, layer.lora_A, layer.gate, layer.lora_B)
    y = layer(x)
    found = (y, *torch.autograd.grad(y, params, dy))
    limit, worst = TOLERANCE * _rounding(x), 0.0
    for part, mine, exact in zip(COMPARED, found, _exact(layer, x, dy), strict=True):
        error = ((mine.detach().cpu().double() - exact).norm() / exact.norm()).item()
        if not error <= limit:
            raise _Wrong(f"{part} is off by {error:.1e} of its norm, where {limit:.1e} would be rounding")
        worst = max(worst, error)
    return f"within {worst:.0e} of float64"


def _exact(layer: L1RALinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """``COMPARED`` in float64 on the CPU. The output of a quantised base is its own: its rounding is not checked."""
    base = layer.base_layer
    x64, a, gate, b, dy64 = (
        t.detach().cpu().double().requires_grad_() for t in (x, layer.lora_A, layer.gate, layer.lora_B, dy)
    )
    y, dx = 0.0, 0.0
    if bnb_kind(base):
        y = base(x)
        dx = torch.autograd.grad(y, x, dy)[0].cpu().double()
        y = y.detach().cpu().double()
    else:
        y = F.linear(x64, dense_weight(base).detach().cpu().double(), base.bias.detach().cpu().double())
    y = y + layer.scaling * ((x64 @ a.T) * gate) @ b
    own, *grads = torch.autograd.grad(y, (x64, a, gate, b), dy64)
    return y.detach(), own + dx, *grads


def _rounding(x: Tensor) -> float:
    tf32 = x.dtype == torch.float32 and x.device.type == "cuda" and choice.tf32_allowed()
    return 2.0**-10 if tf32 else torch.finfo(x.dtype).eps


def _trained(device: torch.device) -> tuple[nn.Module, nn.Module, RankController, float]:
    """A model before and after a short training, its controller, and how much reallocations changed its output."""
    plain = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(device, torch.float32)
    x, target = (torch.randn(TOKENS, 16).to(device, torch.float32) for _ in range(2))
    model = copy.deepcopy(plain)
    controller = patch(model, BUDGET, auto=False, **BRISK)
    # Not the gates, which the controller would put back within the step that is watched.
    trained = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    optimizer, worst = torch.optim.AdamW(trained, lr=1e-2), 0.0
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        before, entries = model(x).detach(), len(controller.history)
        controller.step(optimizer)  # which by these settings has no gate to move when it moves ranks
        if len(controller.history) > entries:
            worst = max(worst, ((model(x).detach() - before).norm() / before.norm()).item())
    return plain, model, controller, worst


def _reallocation(device: torch.device) -> str:
    _, model, controller, change = _trained(device)
    limit = TOLERANCE * _rounding(next(model.parameters()))
    if not change <= limit:
        raise _Wrong(f"it changes the model's output by {change:.1e} of its norm, where {limit:.1e} would be rounding")
    if not controller.moved or sum(controller.ranks.values()) > BUDGET:
        raise _Wrong(f"{controller.moved} ranks have moved, and there are {sum(controller.ranks.values())} of {BUDGET}")
    return f"{controller.moved} ranks moved, outputs within {change:.0e}"


def _checkpoint(device: torch.device) -> str:
    plain, model, controller, _ = _trained(device)
    with tempfile.TemporaryDirectory() as folder:
        controller.save(folder)
        loaded = load(plain, folder, auto=False)
    same = all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    if not same or loaded.gates() != controller.gates():
        raise _Wrong("what was loaded is not what was saved")
    return "bit for bit"
