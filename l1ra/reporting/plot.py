"""``plot_ranks``: a heat map of the ranks of all layers, and the mean rank of each projection over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from l1ra.layers.adapted_model import controller_of
from l1ra.reporting.rank_map import rank_grid
from l1ra.training.controller import RankController

__all__ = ["plot_ranks"]


def plot_ranks(model: nn.Module, path: str | Path) -> Path:
    """Plot the ranks: on the left a heat map, layer by projection, on the right each projection's mean rank over time.

    Example::

        path = l1ra.plot_ranks(model, "ranks.png")
        print(path)

    Args:
        model: a model with a controller, e.g. after ``l1ra.patch``.
        path: of the image file. The suffix selects the format.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model has no controller.
    """
    controller = controller_of(model)
    if controller is None:
        raise ValueError("the model has no controller: call l1ra.patch(model, budget=...) first.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot_ranks needs matplotlib: pip install 'l1ra[plot]'.") from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers, projections, cells = rank_grid(controller.ranks)
    figure = Figure(figsize=(13, max(3.2, 0.32 * len(projections) + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    image = _draw_heat_map(left, layers, projections, cells)
    figure.colorbar(image, ax=left, label="rank")
    _draw_history(right, controller, projections)
    figure.savefig(path, dpi=120)
    return path


def _draw_heat_map(axes: Any, layers: list[int], projections: list[str], cells: dict[tuple[int, str], int]) -> Any:
    values = [[cells.get((layer, p), float("nan")) for layer in layers] for p in projections]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers])
    axes.set_yticks(range(len(projections)), projections)
    axes.set_xlabel("layer")
    axes.set_title("rank now")
    if len(cells) <= 200:
        bright = 0.7 * max(cells.values())
        for (layer, projection), rank in cells.items():
            axes.text(
                layers.index(layer),
                projections.index(projection),
                str(rank),
                ha="center",
                va="center",
                color="black" if rank > bright else "white",
                fontsize=8,
            )
    return image


def _draw_history(axes: Any, controller: RankController, projections: list[str]) -> None:
    steps = [entry["step"] for entry in controller.history]
    for projection in projections:
        means = []
        for entry in controller.history:
            ranks = [r for key, r in rank_grid(entry["ranks"])[2].items() if key[1] == projection]
            means.append(sum(ranks) / len(ranks))
        axes.step(steps, means, where="post", label=projection)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean rank")
    axes.set_title("ranks over time")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
