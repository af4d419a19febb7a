"""``quality.md``: what the records say, also where L1RA loses."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.common.statistics import t_interval
from benchmarks.common.tables import markdown_table
from benchmarks.quality import rank_map
from benchmarks.quality.analysis import METRICS, Difference, Metric, Results, budget_for, paired
from benchmarks.quality.methods import FROZEN, METHODS
from benchmarks.quality.run_queue import SHARE
from benchmarks.quality.runs import TUNING_SEED
from benchmarks.quality.tasks import TASKS

__all__ = ["markdown"]

PAIRS = (
    ("l1ra", "lora"),
    ("l1ra", "rslora"),
    ("l1ra", "adalora"),
    ("l1ra-params", "lora"),
    ("reference", "lora"),
)
RIVALS = ("lora", "adalora")  # of l1ra, in the sentences at the top


def markdown(results: Results, commands: list[str]) -> str:
    """The report, from records alone; ``commands`` are the command lines that made them."""
    lines = ["# Quality at equal budgets", "", *_surroundings(results, commands), ""]
    lines += [
        "Mean over seeds ± half a 95 % t interval, on the test part. Budgets are multiples of the number of adapted "
        "layers: at 2 uniform LoRA has rank 2 everywhere. Differences are taken seed by seed; bold where their 95 % "
        "interval excludes 0. With so many comparisons, one in twenty is bold by chance. At each budget those seeds "
        "count that all methods have there.",
        "",
        *_terms(results),
        "",
        *_verdicts(results),
        "",
    ]
    for task in results.tasks():
        lines += _task(results, task)
    return "\n".join(lines).rstrip() + "\n"


def _surroundings(results: Results, commands: list[str]) -> list[str]:
    places = dict.fromkeys(f"{r['hardware']} (OpenMP threads of a run: {r['threads']})" for r in results.records)
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in r["versions"].items() if number and name != "commit")
        for r in results.records
    )
    commits = sorted({str(r["versions"].get("commit")) for r in results.records})
    return [
        f"Hardware: {'; '.join(places)}.",
        f"Versions: {'; '.join(versions)}; commit {', '.join(commits)}.",
        f"Command: {'; '.join(f'`{command}`' for command in commands)}. {len(results.records)} runs.",
    ]


def _terms(results: Results) -> list[str]:
    """Of scaling and learning rates."""
    tunings = [r for r in results.records if r["seed"] == TUNING_SEED]
    alphas = sorted({r["alpha"] for r in results.records if r["alpha"] is not None})
    lines = []
    if alphas:
        found = ", ".join(f"{alpha:g}" for alpha in alphas)
        lines.append(
            f"Alpha is {found} at every budget, and a layer's scaling is alpha / rank, with the rank of the budget "
            "(reference: the rank that the layer begins with; L1RA: the same, then falling with the root of its rank); "
            "rslora's is √(alpha / rank). At the budget of as many ranks as alpha, all methods begin at a scaling of 1."
        )
    if tunings:
        budgets: dict[str, list[str]] = {}
        for task in dict.fromkeys(r["task"] for r in tunings):
            climbs = sorted({r["multiplier"] for r in tunings if r["task"] == task})
            budgets.setdefault(" and ".join(f"{m:g} ×" for m in climbs), []).append(task)
        told = "; ".join(f"{', '.join(tasks)}: {climbs}" for climbs, tasks in budgets.items())
        lines.append(
            f"Learning rates were tried with a single seed ({TUNING_SEED}), at these budgets alone ({told}): a rate "
            "beside the chosen one may be the better one, above all at other budgets."
        )
    if any(r["head_rate"] is not None for r in results.records):
        lines.append(
            "The task head has a learning rate of its own, found once for each task beside LoRA and the same for all "
            "methods: with one rate for both, what bears the head's rate would be ahead."
        )
    return lines


def _verdicts(results: Results) -> list[str]:
    """A sentence a task, and one on its loss: where L1RA is ahead, where behind."""
    lines = []
    for task in results.tasks():
        metric = results.metric(task)
        for title, name, sign in ((metric, "test_metric", METRICS[metric].sign), ("test loss", "test_loss", -1)):
            told = [text for rival in RIVALS if (text := _against(results, task, rival, name, sign))]
            if told:
                lines.append(f"- **{task}**, by {title}: l1ra is {'; '.join(told)}.")
    if lines:
        lines = ["The 95 % intervals of the paired differences say (level: the interval includes 0):", "", *lines]
    return lines


def _against(results: Results, task: str, rival: str, name: str, sign: int) -> str:
    places: dict[str, list[str]] = {}
    for multiplier in results.multipliers(task):
        first, second = (results.values(task, m, multiplier, name) for m in ("l1ra", rival))
        found = paired(first, second, sign)
        if found is None:
            continue
        if found.interval.half is None:
            words = f"not to be judged against {rival}"
        else:
            words = {"better": "ahead of", "worse": "behind", "": "level with"}[found.verdict] + f" {rival}"
        count = found.interval.count
        places.setdefault(words, []).append(f"{multiplier:g} × ({_seeds(count)})")
    return ", ".join(f"{words} at {' and '.join(at)}" for words, at in places.items())


def _task(results: Results, task: str) -> list[str]:
    any_run = next(r for r in results.records if r["task"] == task)
    metric = METRICS[results.metric(task)]
    parts = ", ".join(f"{count:,} to {_use(name)}" for name, count in any_run["examples"].items())
    steps = ", ".join(f"{n}" for n in dict.fromkeys(r["steps"] for r in results.records if r["task"] == task))
    note = TASKS[task].note if task in TASKS else ""
    lines = [
        f"## {task}",
        "",
        f"{any_run['model']}, {steps} steps of {any_run['batch']} examples of at most {any_run['max_tokens']} tokens; "
        f"{parts}. {results.metric(task).capitalize()}: {metric.direction}." + (f" {note}" if note else ""),
        "",
        *_levels(results, task, metric),
        "",
        *_differences(results, task, metric),
        *_shares(results, task, metric),
        *_rates(results, task),
        *_rank_maps(results, task),
    ]
    return lines


def _use(part: str) -> str:
    return {"train": "train on", "validation": "choose learning rates by", "test": "test on"}[part]


def _levels(results: Results, task: str, metric: Metric) -> list[str]:
    head = ["budget", "method", metric.title, "test loss", "seeds", "adapter parameters"]
    head += ["ranks moved", "time of a step / LoRA's", "peak memory, MiB"]
    rows = []
    for multiplier in [0, *results.multipliers(task)]:
        for method in results.methods:
            runs = results.runs(task, method, multiplier)
            if runs:
                budget = f"{multiplier:g} ×" if multiplier else "none"
                rows.append([budget, method, *_level(results, task, method, multiplier, metric, runs)])
    remark = "Times are medians over runs; runs side by side on few cores disturb one another."
    if results.left_out(task):
        remark += f" {results.left_out(task)} runs with seeds that not all methods have at their budget are left out."
    return [markdown_table(head, rows, left=2), "", remark]


def _level(results: Results, task: str, method: str, multiplier: float, metric: Metric, runs: list[Any]) -> list[str]:
    values = results.values(task, method, multiplier, "test_metric")
    loss = results.values(task, method, multiplier, "test_loss")
    broken = sum(r["diverged"] for r in runs)
    cells = [
        plus_minus(values, metric.factor, 2),
        plus_minus(loss, 1, 4),
        f"{len(runs)}" + (f" ({broken} diverged)" if broken else ""),
    ]
    if method == FROZEN:
        return [*cells, "", "", "", ""]
    moved = [r["ranks_moved"] for r in runs if r["ranks_moved"] is not None]
    lora = [r["step_seconds"] for r in results.runs(task, "lora", multiplier)]
    time = statistics.median(r["step_seconds"] for r in runs)
    return [
        *cells,
        f"{statistics.fmean(r['adapter_parameters'] for r in runs):,.0f}",
        f"{statistics.fmean(moved):.0f}" if moved else "",
        f"{time / statistics.median(lora):.2f}" if lora else "",
        f"{statistics.median(r['peak_mib'] for r in runs):,.0f}",
    ]


def _pairs(results: Results) -> list[tuple[str, str]]:
    experiments = [method for method in results.methods if method not in METHODS]
    return [*PAIRS, *((name, other) for name in experiments for other in ("lora", "l1ra"))]


def _differences(results: Results, task: str, metric: Metric) -> list[str]:
    rows = []
    for multiplier in results.multipliers(task):
        for first, second in _pairs(results):
            row = compare(results, task, (first, multiplier), (second, multiplier), metric)
            if row:
                rows.append([f"{multiplier:g} ×", f"{first} − {second}", *row])
    if not rows:
        return []
    return ["Paired differences:", "", markdown_table(["budget", "", *_heads(metric)], rows, left=2), ""]


def _heads(metric: Metric) -> list[str]:
    return [metric.difference, "seeds better : worse", "", "test loss", "seeds better : worse", ""]


def compare(
    results: Results, task: str, first: tuple[str, float], second: tuple[str, float], metric: Metric
) -> list[str] | None:
    """Cells: difference of the metric, seeds for and against, verdict; and the same of the test loss."""
    cells: list[str] = []
    for name, sign, factor, digits in (
        ("test_metric", metric.sign, metric.factor, 2),
        ("test_loss", -1, 1, 4),
    ):
        found = paired(results.values(task, *first, name), results.values(task, *second, name), sign)
        if found is None:
            return None
        cells += _difference(found, factor, digits)
    return cells


def _difference(found: Difference, factor: float, digits: int) -> list[str]:
    mean, half = found.interval.mean * factor, found.interval.half
    text = f"{mean:+.{digits}f}"
    if half is not None:
        text += f" ({mean - half * factor:+.{digits}f} to {mean + half * factor:+.{digits}f})"
    if found.verdict:
        text = f"**{text}**"
    verdict = f"**{found.verdict}**" if found.verdict else "" if half is not None else "one seed"
    return [text, f"{found.better} : {found.worse}", verdict]


def _shares(results: Results, task: str, metric: Metric) -> list[str]:
    rows = []
    for multiplier in results.multipliers(task):
        row = compare(results, task, ("l1ra", round(SHARE * multiplier, 6)), ("lora", multiplier), metric)
        if row:
            rows.append([f"l1ra at {SHARE * multiplier:g} × − lora at {multiplier:g} ×", *row])
    if not rows:
        return []
    title = f"L1RA with {SHARE:.0%} of LoRA's budget:"
    return [title, "", markdown_table(["", *_heads(metric)], rows), "", *_same_loss(results, task)]


def _same_loss(results: Results, task: str) -> list[str]:
    """A sentence: with which share of LoRA's budget L1RA has LoRA's loss."""
    budgets = results.multipliers(task)
    ours: dict[int, dict[float, float]] = {}
    for multiplier in budgets:
        for seed, loss in results.values(task, "l1ra", multiplier, "test_loss").items():
            ours.setdefault(seed, {})[multiplier] = loss
    told, untold = [], []
    for multiplier in budgets:
        theirs = results.values(task, "lora", multiplier, "test_loss")
        shares = {seed: budget_for(ours.get(seed, {}), loss) for seed, loss in theirs.items()}
        if None in shares.values():
            # A mean of the other seeds would leave out the best or the worst ones.
            untold.append(f"{multiplier:g} ×")
        elif shares:
            percent = plus_minus({seed: budget / multiplier for seed, budget in shares.items()}, 100, 0)
            told.append(f"{percent} % of {multiplier:g} × ({_seeds(len(shares))})")
    if not told:
        return []
    line = f"L1RA has LoRA's test loss with {', with '.join(told)}, interpolated in the logarithm of the budget."
    if untold:
        line += f" For {' and '.join(untold)} that lies outside of what was measured, for some seed at least."
    return [line, ""]


def _rates(results: Results, task: str) -> list[str]:
    found = {"the head, beside lora": results.head(task)}
    for method in results.methods:
        if method != FROZEN:
            climbs = results.tuned(task, method).items()
            found |= {method if m is None else f"{method}, {m:g} ×": tuned for m, tuned in climbs}
    found = {method: tuned for method, tuned in found.items() if tuned is not None}
    grid = sorted({rate for tuned in found.values() for rate in tuned.tried})
    rows = []
    for method, tuned in found.items():
        losses = []
        for rate in grid:
            loss = tuned.tried.get(rate, math.nan)
            text = "" if rate not in tuned.tried else "diverged" if loss == math.inf else f"{loss:.4f}"
            losses.append(f"**{text}**" if rate == tuned.rate and text else text)
        rows.append([method, f"{tuned.rate:g}", *losses, tuned.remark])
    head = ["method", "learning rate", *(f"loss at {rate:g}" for rate in grid), ""]
    title = "Learning rates, climbed to by validation loss:"
    return [title, "", markdown_table(head, rows), ""]


def _rank_maps(results: Results, task: str) -> list[str]:
    runs = {m: results.runs(task, "l1ra", m) for m in results.multipliers(task)}
    runs = {multiplier: found for multiplier, found in runs.items() if found}
    if not runs:
        return []
    lines = ["Where L1RA's ranks are after the training, mean over layers and seeds:", ""]
    for title, means in (("projection", rank_map.by_projection), ("layer", rank_map.by_depth)):
        columns = {multiplier: means(found) for multiplier, found in runs.items()}
        places = list(next(iter(columns.values())))
        rows = [[_place(p), *(f"{column.get(p, math.nan):.2f}" for column in columns.values())] for p in places]
        lines += [markdown_table([title, *(f"{m:g} ×" for m in columns)], rows), ""]
    shares = [(m, *rank_map.share_behind(found)) for m, found in runs.items()]
    told = ", ".join(f"{share:.0%} at {m:g} ×" for m, share, _ in shares)
    lines.append(
        f"Feed-forward layers and attention's output hold {told} of the ranks; equal ranks would put "
        f"{shares[0][2]:.0%} there."
    )
    return [*lines, ""]


def _place(place: int | str) -> str:
    return "outside of layers" if place == -1 else str(place)


# --- cells


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def plus_minus(values: dict[int, float], factor: float, digits: int) -> str:
    """``mean ± half``; empty without values."""
    if not values:
        return ""
    found = t_interval(values.values())
    text = f"{found.mean * factor:.{digits}f}"
    return text if found.half is None else f"{text} ± {found.half * factor:.{digits}f}"
