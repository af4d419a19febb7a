"""Pictures of the results, where matplotlib can be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import tables
from benchmarks.gpu.tables import FROZEN, OURS

__all__ = ["draw"]

GREY, COLOUR = "#9aa5b1", "#c2410c"


def draw(results: dict[str, Any], path: Path) -> str:
    """Draw what there is to draw, all of it in one picture; why there is none, "" if there is one."""
    panels = [*linears(results), *step(results), *kernels(results)]
    if not panels:
        return "nothing was timed"
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # a matplotlib that does not fit its numpy fails in many ways
        return f"matplotlib can't be imported: {error}"
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.4 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for axis, (title, unit, bars) in zip(axes, panels, strict=False):
        draw_bars(axis, title, unit, bars)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(tables.device(results))
    figure.savefig(path, dpi=100)
    return ""


def draw_bars(axis: Any, title: str, unit: str, bars: list[tuple[str, float, float, float]]) -> None:
    """Bars of (name, median, p20, p80), the first one on top."""
    names, medians, lows, highs = zip(*bars, strict=True)
    errors = [
        [m - low for m, low in zip(medians, lows, strict=True)],
        [h - m for m, h in zip(medians, highs, strict=True)],
    ]
    colours = [COLOUR if name.startswith(OURS) else GREY for name in names]
    axis.barh(names, medians, xerr=errors, color=colours, ecolor="#333333", capsize=2)
    axis.invert_yaxis()
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)


def around(name: str, values: dict[str, float]) -> tuple[str, float, float, float]:
    return name, values["median"], values["p20"], values["p80"]


def linears(results: dict[str, Any]) -> list[tuple[str, str, list]]:
    """Time over the frozen linears, a panel a problem."""
    panels = []
    for problem in results.get("linears", {}).get("tables", []):
        rows = [r for r in problem["rows"] if r["provider"] != FROZEN and r["overhead_percent"]]
        if rows:
            bars = [around(r["provider"], r["overhead_percent"]) for r in rows]
            panels.append((problem["title"], "% over the frozen layer, forward + backward", bars))
    return panels


def step(results: dict[str, Any]) -> list[tuple[str, str, list]]:
    panels = []
    for model in results.get("step", {}).get("tables", []):
        if model["rows"]:
            bars = [around(r["provider"], r["tokens_per_s"]) for r in model["rows"]]
            panels.append((f"one training step, {model['model']}", "tokens/s", bars))
            peaks = [
                (r["provider"], r["peak_gib"], r["peak_gib"], r["peak_gib"]) for r in model["rows"] if r["peak_gib"]
            ]
            if peaks:
                panels.append((f"peak memory, {model['model']}", "GiB", peaks))
    return panels


def kernels(results: dict[str, Any]) -> list[tuple[str, str, list]]:
    """Share of the copy's rate, a panel a shape."""
    shapes: dict[str, list] = {}
    for row in results.get("kernels", {}).get("rows", []):
        share = {
            key: 100 * row["copy_share"] * row["ms"]["median"] / row["ms"][key] for key in ("median", "p20", "p80")
        }
        shapes.setdefault(row["shape"], []).append((row["name"], share["median"], share["p80"], share["p20"]))
    return [(shape, "% of the rate of a copy", bars) for shape, bars in shapes.items()]
