"""The picture of the ranks: a heat map of all layers, and how the ranks of each projection changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from l1ra.layers.adapted_model import controller_of
from l1ra.reporting.rank_map import rank_grid
from l1ra.training.controller import RankController

__all__ = ["plot_ranks"]


def plot_ranks(model: nn.Module, path: str | Path) -> Path:
    """Draw the ranks: a heat map layer by projection as they are now, and the mean of each projection over time.

    Args:
        path: of the picture; the ending chooses the format.

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
    _draw_map(figure, *figure.subplots(1, 2, width_ratios=[3, 2]), controller, layers, projections, cells)
    figure.savefig(path, dpi=120)
    return path


def _draw_map(
    figure: Any,
    now: Any,
    over_time: Any,
    controller: RankController,
    layers: list[int],
    projections: list[str],
    cells: dict[tuple[int, str], int],
) -> None:
    values = [[cells.get((layer, p), float("nan")) for layer in layers] for p in projections]
    image = now.imshow(values, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=now, label="rank")
    now.set_xticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers])
    now.set_yticks(range(len(projections)), projections)
    now.set_xlabel("layer")
    now.set_title("rank now")
    if len(cells) <= 200:
        bright = 0.7 * max(cells.values())
        for (layer, projection), rank in cells.items():
            now.text(
                layers.index(layer),
                projections.index(projection),
                str(rank),
                ha="center",
                va="center",
                color="black" if rank > bright else "white",
                fontsize=8,
            )
    steps = [entry["step"] for entry in controller.history]
    for projection in projections:
        means = []
        for entry in controller.history:
            ranks = [r for key, r in rank_grid(entry["ranks"])[2].items() if key[1] == projection]
            means.append(sum(ranks) / len(ranks))
        over_time.step(steps, means, where="post", label=projection)
    over_time.set_xlabel("optimizer step")
    over_time.set_ylabel("mean rank")
    over_time.set_title("ranks over time")
    over_time.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
