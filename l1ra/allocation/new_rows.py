"""Initial rows of A for new ranks, along the leading directions of the layer's weight gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["leading_rows"]


@torch.no_grad()
def leading_rows(sketches: Sequence[Tensor], present: Sequence[Tensor], random: Sequence[Tensor]) -> list[Tensor]:
    """For each adapter, rows along the leading right singular directions of the part of the gradient that its rows
    ``present`` do not span.

    Each row is scaled so that the gradient's response to it (the norm of ``sketch @ row``) is as large as to a random
    row. A row of full length would get a response many times larger, and the first steps would overshoot.

    Args:
        sketches: of each adapter ``(k, in_features)``, random combinations of the rows of dL/dW.
        present: of each adapter ``(r, in_features)``, the rows of A that it keeps.
        random: of each adapter ``(n, in_features)``, rows drawn as at initialisation. They determine the response to
            be matched and the largest length of a row. They are also returned for the ranks that no direction of the
            sketch is left for, and for all ranks if ``sketch`` or ``present`` is not finite.

    All tensors are float32 on the CPU. Adapters of the same shapes are computed together.

    Returns:
        For each adapter ``(n, in_features)`` float32 on the CPU.
    """
    alike: dict[tuple, list[int]] = {}
    for i, (sketch, rows) in enumerate(zip(sketches, present, strict=True)):
        alike.setdefault((sketch.shape, rows.shape), []).append(i)
    found: dict[int, Tensor] = {}
    for chosen in alike.values():
        parts = ([tensors[i] for i in chosen] for tensors in (sketches, present, random))
        found |= zip(chosen, _leading_rows(*parts), strict=True)
    return [found[i] for i in range(len(random))]


def _leading_rows(sketches: list[Tensor], present: list[Tensor], random: list[Tensor]) -> tuple[Tensor, ...]:
    sketch, width = torch.stack(sketches), sketches[0].shape[1]
    random_response = sketch.flatten(1).norm(dim=1) / math.sqrt(width)  # to a random row of length 1, root mean square
    if len(present[0]):
        basis = torch.linalg.qr(torch.stack(present).mT).Q
        sketch = sketch - (sketch @ basis) @ basis.mT
    finite = torch.isfinite(sketch).flatten(1).all(1)
    _, strength, directions = torch.linalg.svd(torch.where(finite[:, None, None], sketch, 0.0), full_matrices=False)
    usable = (strength > 1e-6 * strength[:, :1]).sum(1)
    longest = (random_response.unsqueeze(1) / strength).clamp(max=1)  # of the length of a random row

    rows = torch.cat(random)
    targets, sources, start = [], [], 0  # rows of all adapters, and the directions that they get
    for i, (count, own) in enumerate(zip(usable.tolist(), random, strict=True)):
        count = min(count, len(own))
        targets += range(start, start + count)
        sources += range(i * strength.shape[1], i * strength.shape[1] + count)
        start += len(own)
    target, source = (torch.tensor(index, dtype=torch.long, device="cpu") for index in (targets, sources))
    length = rows[target].norm(dim=1) * longest.flatten()[source]
    rows[target] = directions.flatten(0, 1)[source] * length.unsqueeze(1)
    return torch.split_with_sizes_copy(rows, [len(own) for own in random])
