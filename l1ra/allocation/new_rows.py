"""Where a new rank should look: rows of A along the layer's gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["leading_rows"]


@torch.no_grad()
def leading_rows(sketch: Tensor | None, present: Tensor, random: Tensor) -> Tensor:
    """Rows along the leading right singular directions of the gradient that the present rows don't span.

    Each is as long as makes the gradient answer to it as strongly as to a random row: at full length it would answer
    many times stronger, and the first steps would overshoot.

    Args:
        sketch: ``(k, in)``, random combinations of the rows of dL/dW, or None.
        present: ``(r, in)``, the rows of A that stay.
        random: ``(n, in)``, rows as drawn at initialisation: the answer to match, the largest length, and what stands
            in where the sketch has fewer than n directions, or it or ``present`` is not finite.

    Returns:
        ``(n, in)`` float32 on the CPU.
    """
    rows = random.clone()
    if sketch is None:
        return rows
    sketch = sketch.to("cpu", torch.float32)
    usual = sketch.norm() / math.sqrt(sketch.shape[1])
    if present.shape[0]:
        basis = torch.linalg.qr(present.to("cpu", torch.float32).T).Q
        sketch = sketch - (sketch @ basis) @ basis.T
    if not torch.isfinite(sketch).all():
        return rows
    _, strength, directions = torch.linalg.svd(sketch, full_matrices=False)
    usable = int((strength > 1e-6 * strength[:1]).sum()) if strength.numel() and strength[0] > 0 else 0
    count = min(usable, rows.shape[0])
    length = random[:count].norm(dim=1) * (usual / strength[:count]).clamp(max=1)
    rows[:count] = directions[:count] * length.unsqueeze(1)
    return rows
