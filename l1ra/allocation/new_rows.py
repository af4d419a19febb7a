"""Initial rows of A for new ranks, along the leading directions of the layer's weight gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["leading_rows"]


@torch.no_grad()
def leading_rows(sketch: Tensor | None, present: Tensor, random: Tensor) -> Tensor:
    """Rows along the leading right singular directions of the part of the gradient that ``present`` does not span.

    Each row is scaled so that the gradient's response to it (the norm of ``sketch @ row``) is as large as to a random
    row. A row of full length would get a response many times larger, and the first steps would overshoot.

    Args:
        sketch: ``(k, in_features)``, random combinations of the rows of dL/dW, or None if there is no sketch.
        present: ``(r, in_features)``, the rows of A that the adapter keeps.
        random: ``(n, in_features)`` float32 on the CPU, rows drawn as at initialisation. They determine the response to
            be matched and the largest length of a row. They are also returned for the ranks that no direction of the
            sketch is left for, and for all ranks if ``sketch`` or ``present`` is not finite.

    Returns:
        ``(n, in_features)`` float32 on the CPU.
    """
    rows = random.clone()
    if sketch is None:
        return rows
    sketch = sketch.to("cpu", torch.float32)
    random_response = sketch.norm() / math.sqrt(sketch.shape[1])  # to a random row of length 1, root mean square
    if present.shape[0]:
        basis = torch.linalg.qr(present.to("cpu", torch.float32).T).Q
        sketch = sketch - (sketch @ basis) @ basis.T
    if not torch.isfinite(sketch).all():
        return rows
    _, strength, directions = torch.linalg.svd(sketch, full_matrices=False)
    usable = int((strength > 1e-6 * strength[:1]).sum()) if strength.numel() and strength[0] > 0 else 0
    count = min(usable, rows.shape[0])
    length = random[:count].norm(dim=1) * (random_response / strength[:count]).clamp(max=1)
    rows[:count] = directions[:count] * length.unsqueeze(1)
    return rows
