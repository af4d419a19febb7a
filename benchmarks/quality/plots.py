"""A picture of each task: quality against budget."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.statistics import t_interval
from benchmarks.quality.analysis import METRICS, Results
from benchmarks.quality.methods import FROZEN, METHODS

__all__ = ["draw"]

# Okabe and Ito's colours, which all kinds of sight tell apart; a mark of its own besides for each.
STYLES = {
    "lora": ("#E69F00", "o"),
    "rslora": ("#56B4E9", "s"),
    "adalora": ("#009E73", "^"),
    "reference": ("#CC79A7", "v"),
    "l1ra": ("#0072B2", "D"),
    "l1ra-params": ("#D55E00", "P"),
}
OTHERS = ("#000000", "X"), ("#999999", "*"), ("#F0E442", "h")
BESIDE = 0.02  # of the distance between budgets: bars that lie on one another can't be read


def draw(results: Results, folder: Path) -> list[Path]:
    """One PNG a task: a line a method, with 95 % intervals.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return [_draw_task(results, task, folder / f"{task}.png") for task in results.tasks()]


def _draw_task(results: Results, task: str, file: Path) -> Path:
    from matplotlib.figure import Figure

    metric = METRICS[results.metric(task)]
    factor = metric.factor
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    experiments = [method for method in results.methods if method not in METHODS]
    styles = STYLES | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(experiments)}
    drawn = [method for method in results.methods if method in styles]
    for number, method in enumerate(drawn):
        shift = 2 ** (BESIDE * (number - (len(drawn) - 1) / 2))
        points = []
        for multiplier in results.multipliers(task):
            values = results.values(task, method, multiplier, "test_metric")
            if values:
                points.append((multiplier * shift, t_interval(values.values())))
        if points:
            colour, mark = styles[method]
            axes.errorbar(
                [x for x, _ in points],
                [found.mean * factor for _, found in points],
                [(found.half or 0.0) * factor for _, found in points],
                color=colour,
                marker=mark,
                capsize=3,
                linewidth=1.5,
                label=method,
            )
    frozen = results.values(task, FROZEN, 0, "test_metric")
    if frozen:
        axes.axhline(t_interval(frozen.values()).mean * factor, color="#666666", linestyle=":", label=FROZEN)
    budgets = results.multipliers(task)
    if budgets:
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [f"{m:g}" for m in budgets])
        axes.minorticks_off()
    axes.set_xlabel("budget, ranks for each adapted layer")
    axes.set_ylabel(f"test {metric.title}" + (" (less is better)" if metric.sign < 0 else ""))
    axes.set_title(f"{task}: mean and 95 % interval over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    return file
