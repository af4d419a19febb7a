"""Every competitor's outputs and gradients against float64, before any of them is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.bench import WrongResult
from benchmarks.gpu.problem import SCALING, Problem
from benchmarks.gpu.providers import Adapted

__all__ = ["check"]

# Largest relative error of a whole tensor, and of its worst row: one tile gone wrong shows in a row. For bf16 several
# times what its roundings add up to: cuBLAS may also sum the parts of a product in bf16.
BOUNDS = {
    torch.bfloat16: (2e-2, 6e-2),
    torch.float16: (3e-3, 2e-2),
    torch.float32: (1e-4, 1e-3),
}


def check(name: str, adapted: Adapted, problem: Problem) -> dict[str, float]:
    """The relative error of each kind of result: y, dX, dA, dB and dg, the largest over the linears.

    It checks the second step, since later steps are timed: see :func:`settle`.

    Raises:
        WrongResult: one is beyond its bound, or not a number, or missing.
    """
    settle(adapted, problem)
    outputs = adapted.module(*problem.inputs)
    torch.autograd.backward(outputs, problem.gradients)
    errors: dict[str, float] = {}
    sums: dict[int, Tensor] = {}
    for (linear, _), y in zip(problem.weights.items(), outputs, strict=True):
        expected = reference(adapted, problem, linear)
        adapter = adapted.adapters.get(linear)
        found = {"y": y} if adapter is None else {"y": y, **adapter.gradients()}
        for kind, value in found.items():
            compare(f"{name}, {problem.title}, {linear}, {kind}", kind, value, expected[kind], y.dtype, errors)
        place = problem.reads[linear]
        sums[place] = sums[place] + expected["dX"] if place in sums else expected["dX"]
    for place, expected in sums.items():
        x = problem.inputs[place]
        compare(f"{name}, {problem.title}, input {place}, dX", "dX", x.grad, expected, x.dtype, errors)
    adapted.clear()
    problem.clear()
    return errors


def settle(adapted: Adapted, problem: Problem) -> None:
    """One training step that changes no number, so that the checked step runs as the timed ones do.

    Ours learns in a forward which layers read one input, and computes them together once the parameters have been
    written in place; compilers trace.
    """
    torch.autograd.backward(adapted.module(*problem.inputs), problem.gradients)
    with torch.no_grad():
        for param in adapted.parameters():
            param.add_(0)
    adapted.clear()
    problem.clear()


def reference(adapted: Adapted, problem: Problem, linear: str) -> dict[str, Tensor]:
    """Outputs and gradients of one adapted linear in float64, by the formula."""
    y, dx = problem.products(linear)
    adapter = adapted.adapters.get(linear)
    if adapter is None:
        return {"y": y, "dX": dx}
    x, dy = problem.read_by(linear)
    a, gate, b = (t.detach().double() for t in (adapter.a, adapter.gate_or_ones(), adapter.b))
    b = b.T if adapter.b_transposed else b
    h, p = x @ a.T, dy @ b.T
    return {
        "y": y + SCALING * (h * gate) @ b,
        "dX": dx + SCALING * (p * gate) @ a,
        "dA": SCALING * (p * gate).T @ x,
        "dB": SCALING * (h * gate).T @ dy,
        "dg": SCALING * (h * p).sum(0),
    }


def compare(
    what: str, kind: str, found: Tensor | None, expected: Tensor, dtype: torch.dtype, errors: dict[str, float]
) -> None:
    whole, worst_row = BOUNDS[dtype]
    if found is None:
        raise WrongResult(f"{what}: there is none.")
    if found.shape != expected.shape:
        raise WrongResult(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}.")
    difference = found.detach().double() - expected
    error = (difference.norm() / expected.norm()).item()
    row = error if expected.dim() < 2 else (difference.norm(dim=1) / expected.norm(dim=1)).max().item()
    # Written so that NaN does not pass.
    if not (error <= whole and row <= worst_row):
        raise WrongResult(
            f"{what}: relative error {error:.2e} (bound {whole:.0e}), in its worst row {row:.2e} ({worst_row:.0e})."
        )
    errors[kind] = max(errors.get(kind, 0.0), error)
