"""The checks of ``doctor``: each type of layer against float64, a reallocation, and saving and loading a checkpoint."""

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

__all__ = ["Check", "run_checks"]

TOKENS, IN, OUT, RANK = 48, 64, 128, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest relative error (norm of the difference / norm) that rounding explains, in units of the dtype's epsilon. Sums
# of about a hundred products have errors of a few epsilon. A wrong number causes a far larger error.
TOLERANCE = 8
COMPARED = ("the output", "the gradient of x", "the gradient of A", "the gradient of the gate", "the gradient of B")
BUDGET = 8
FAST_SETTINGS = {"interval": 4, "total_steps": 40, "warmup": 0.0, "margin": 1.0, "turnover": 0.5, "gate_lr": 1.0}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the type of layer, or the operation that was checked.
        dtype: of the layer's input; "" for an operation.
        path: the implementation that ran, and the reason, as in ``ReportRow``; "" for an operation.
        ok: whether the check passed; None if it could not run.
        message: the result as text.
    """

    name: str
    dtype: str
    path: str
    ok: bool | None
    message: str


class _WrongResult(Exception):
    """A computation ran without an error but its result is wrong."""


def run_checks(device: torch.device) -> list[Check]:
    """Run all checks on ``device``. Errors are reported in the results and not raised.

    The state of torch's random number generators is preserved.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        warnings.simplefilter("ignore")
        layers = [_check_layer(name, make, device, dtype) for name, make in LAYERS.items() for dtype in DTYPES]
        return [
            *layers,
            _check_operation("a reallocation", _reallocate, device),
            _check_operation("save and load", _save_and_load, device),
        ]


def _check_operation(name: str, operation: Callable[[torch.device], str], device: torch.device) -> Check:
    try:
        return Check(name, "", "", True, operation(device))
    except Exception as error:
        return Check(name, "", "", False, _error_message(error))


def _check_layer(
    name: str, make: Callable[[torch.device, torch.dtype], nn.Module], device: torch.device, dtype: torch.dtype
) -> Check:
    dtype_name, path = str(dtype).removeprefix("torch."), ""
    try:
        base = make(device, dtype)
        x, dy = (torch.randn(TOKENS, size, dtype=torch.float32).to(device, dtype) for size in (IN, OUT))
        base(x)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        return Check(name, dtype_name, path, None, f"{package} can't be imported")
    except Exception as error:
        return Check(name, dtype_name, path, None, f"the layer without an adapter fails: {_error_message(error)}")
    try:
        layer = L1RALinear.from_linear(base, rank=RANK)
        layer.padded_weight = PaddedWeight() if name == AUGMENTED else None
        kernel_path = layer.kernel_path(x)
        path = str(kernel_path)
        if kernel_path.fused and choice.interpreting() and dtype == torch.bfloat16:
            return Check(name, dtype_name, path, None, "Triton's interpreter does not multiply bfloat16 correctly")
        return Check(name, dtype_name, path, True, _compare_with_float64(layer, x.requires_grad_(), dy))
    except Exception as error:
        return Check(name, dtype_name, path, False, _error_message(error))


def _error_message(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, _WrongResult) else f"{type(error).__name__}: {text}"


def _linear(device: torch.device, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(IN, OUT, dtype=torch.float32).to(device, dtype)


def _conv1d(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN).float().to(device, dtype)


def _four_bit(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(IN, OUT, compute_dtype=dtype, quant_type="nf4").float().to(device)


def _eight_bit(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return Linear8bitLt(IN, OUT, has_fp16_weights=False).float().to(device)


AUGMENTED = "nn.Linear, augment=True"
LAYERS = {
    "nn.Linear": _linear,
    AUGMENTED: _linear,
    "transformers' Conv1D": _conv1d,
    "bitsandbytes' Linear4bit": _four_bit,
    "bitsandbytes' Linear8bitLt": _eight_bit,
}


def _compare_with_float64(layer: L1RALinear, x: Tensor, dy: Tensor) -> str:
    """Compare the output and the gradients of an adapted layer with float64.

    Returns:
        The largest relative error, as text.

    Raises:
        _WrongResult: an error is larger than rounding explains.
    """
    with torch.no_grad():
        layer.gate.uniform_(0.2, 1.0)
        layer.lora_B.normal_()
    params = (x, layer.lora_A, layer.gate, layer.lora_B)
    y = layer(x)
    results = (y, *torch.autograd.grad(y, params, dy))
    limit, largest = TOLERANCE * _epsilon(x), 0.0
    for name, result, expected in zip(COMPARED, results, _float64_results(layer, x, dy), strict=True):
        error = ((result.detach().cpu().double() - expected).norm() / expected.norm()).item()
        if not error <= limit:
            raise _WrongResult(f"{name} has a relative error of {error:.1e}, rounding explains {limit:.1e}")
        largest = max(largest, error)
    return f"within {largest:.0e} of float64"


def _float64_results(layer: L1RALinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients, in the order of ``COMPARED``, in float64 on the CPU.

    For a quantised base layer the output of the base layer itself is used, so that its rounding is not checked.
    """
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
    dx64, *grads = torch.autograd.grad(y, (x64, a, gate, b), dy64)
    return y.detach(), dx64 + dx, *grads


def _epsilon(x: Tensor) -> float:
    """The relative rounding error of products with ``x``: the epsilon of its dtype, or of tf32 where torch uses it."""
    tf32 = x.dtype == torch.float32 and x.device.type == "cuda" and choice.tf32_allowed()
    return 2.0**-10 if tf32 else torch.finfo(x.dtype).eps


def _train_briefly(device: torch.device) -> tuple[nn.Module, nn.Module, RankController, float]:
    """Train a patched copy of a small model for 20 steps.

    Returns:
        The original model, the trained copy, its controller, and the largest relative change of the copy's output in a
        reallocation.
    """
    layers = (nn.Linear(16, 32, dtype=torch.float32), nn.Tanh(), nn.Linear(32, 16, dtype=torch.float32))
    plain = nn.Sequential(*layers).to(device)
    x, target = (torch.randn(TOKENS, 16, dtype=torch.float32).to(device) for _ in range(2))
    model = copy.deepcopy(plain)
    controller = patch(model, BUDGET, auto=False, **FAST_SETTINGS)
    # Without the gates: the controller would overwrite them in the step over which the output is compared.
    trained = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    optimizer, largest_change = torch.optim.AdamW(trained, lr=1e-2), 0.0
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        before, entries = model(x).detach(), len(controller.history)
        controller.step(optimizer)  # with these settings no gate changes in a step that reallocates ranks
        if len(controller.history) > entries:
            change = ((model(x).detach() - before).norm() / before.norm()).item()
            largest_change = max(largest_change, change)
    return plain, model, controller, largest_change


def _reallocate(device: torch.device) -> str:
    _, model, controller, change = _train_briefly(device)
    limit = TOLERANCE * _epsilon(next(model.parameters()))
    if not change <= limit:
        raise _WrongResult(
            f"it changes the model's output by a relative error of {change:.1e}, rounding explains {limit:.1e}"
        )
    ranks = sum(controller.ranks.values())
    if not controller.moved or ranks > BUDGET:
        raise _WrongResult(f"{controller.moved} ranks have moved, and the sum of ranks is {ranks} of {BUDGET}")
    return f"{controller.moved} ranks moved, outputs within {change:.0e}"


def _save_and_load(device: torch.device) -> str:
    plain, model, controller, _ = _train_briefly(device)
    with tempfile.TemporaryDirectory() as folder:
        controller.save(folder)
        loaded = load(plain, folder, auto=False)
    same = all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    if not same or loaded.gates() != controller.gates():
        raise _WrongResult("the loaded model differs from the saved one")
    return "bit for bit"
