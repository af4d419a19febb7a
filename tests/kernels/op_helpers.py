"""Inputs of the gated low-rank op, and its error against float64."""

import math

import torch

TOKENS = [((33,), 65, 47, 5), ((3, 11), 64, 128, 1), ((2, 3, 5), 129, 31, 8), ((1,), 16, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(lead, k, n, r, dtype=torch.float64, adapter=None):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    y0, x = make(*lead, n).to(dtype), make(*lead, k).to(dtype)
    a, g, b = make(r, k) / math.sqrt(k), torch.rand(r, dtype=torch.float64), make(r, n)
    return [t.requires_grad_() for t in (y0, x, *(t.to(adapter or dtype) for t in (a, g, b)))]


def error(results, exact):
    return [(r.double() - e).abs().max().item() if e.numel() else 0.0 for r, e in zip(results, exact, strict=True)]
