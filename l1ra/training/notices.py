"""Warnings of what a reallocation can't move, or has nothing to move for."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from l1ra.layers.adapted_model import abbreviated

__all__ = ["warn_of_average", "warn_of_graphs", "warn_of_untrained"]


def warn_of_untrained(trained: Mapping[str, Sequence[bool]], held: Collection[int], steps: int) -> None:
    """Warn of adapters of which no rank has been trained.

    Args:
        trained: adapter name -> whether each of its ranks has been trained.
        held: the numbers of the adapters of which an optimizer holds a parameter.
        steps: so far.
    """
    untrained = [(name, i in held) for i, (name, row) in enumerate(trained.items()) if not any(row)]
    for is_held, why in (
        (
            True,
            "The model does not call these layers, or reads their weights without calling them: leave them out of "
            "target_modules.",
        ),
        (False, "No optimizer holds them: give it all parameters of the model that require a gradient."),
    ):
        names = [name for name, part in untrained if part is is_held]
        if names:
            warnings.warn(
                f"no gradient has reached these adapters in {steps} steps, so that they learn nothing: "
                f"{abbreviated(names)}. {why}",
                stacklevel=2,
            )


def warn_of_average(average: Any) -> None:
    """Warn of an average of the weights that does not move along."""
    warnings.warn(
        f"{type(average).__name__} seems to average the weights of this model, and its rows do not move with the "
        "ranks: call controller.follow(ema) after it was made.",
        stacklevel=2,
    )


def warn_of_graphs(step: int) -> None:
    """Warn of graphs that have kept ranks from moving since ``step``."""
    warnings.warn(
        f"no rank has moved since step {step}: a backward through adapters that no optimizer has stepped since their "
        "forward may still come. Run it, or compute outputs that you keep under torch.no_grad().",
        stacklevel=2,
    )
