"""``planted.md``: every case and every method, then the bars. Losses stand where wins stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common.statistics import geometric_interval
from benchmarks.common.tables import interval_text, markdown_table
from benchmarks.planted.bars import ORACLE, UNIFORM, Records, bars, by_case, errors, floored, mean, over
from benchmarks.planted.training import METHODS

__all__ = ["markdown"]

COLUMNS = (
    "",
    "error, mean (95 % interval)",
    "seeds",
    "over uniform",
    "worse than uniform",
    "over the oracle",
    "share on planted layers",
    "of what can lie there",
    "planted ranks met",
    "ranks moved",
    "dealt",
    "of these cut again",
    "seconds",
)


def markdown(records: Iterable[Mapping[str, Any]], judged: str = "default") -> str:
    """The whole page; the bars are for the runs called ``judged``."""
    records = by_case(records)
    lines = ["# Planted ranks", "", *_about(records), ""]
    lines += [f"## Bars, for `{judged}`", "", markdown_table(("", "found", ""), _bars(records, judged)), ""]
    if cases := _cases(records, judged):
        lines += [markdown_table(("case", "over uniform", "over the oracle", "planted ranks met", "oracle"), cases), ""]
    for case, labels in records.items():
        rows = [_row(records, case, label) for label in sorted(labels, key=_place)]
        lines += [f"## {case}", "", _settings(labels), "", markdown_table(COLUMNS, rows), ""]
    return "\n".join(lines)


def _place(label: str) -> tuple[int, str]:
    return (METHODS.index(label) if label in METHODS else len(METHODS), label)


def _about(records: Records) -> list[str]:
    every = [record for labels in records.values() for seeds in labels.values() for record in seeds.values()]
    where = {(r["hardware"]["processor"], r["hardware"]["cores"]) for r in every}
    versions = {tuple(r["versions"].items()) for r in every}
    hardware = "; ".join(f"{processor}, {cores} cores" for processor, cores in sorted(where))
    software = "; ".join(", ".join(f"{name} {v}" for name, v in found) for found in sorted(versions, key=str))
    about = [
        f"`python -m benchmarks.planted`, {len(every)} runs. {hardware}, one thread a run; {software}; commit "
        f"{', '.join(sorted({str(r['commit']) for r in every}))}.",
        "",
        "Mean-squared error on fresh inputs against the teacher without noise: geometric mean over the seeds, interval "
        "from Student's t on its logarithm. Ratios are taken seed by seed. Oracle: LoRA that was given the planted "
        "ranks; floor: the same from the solution on, without noise.",
    ]
    # Baselines don't depend on how gates and ranks move; what does must come from one state of the code.
    sources: dict[str, set[str]] = {}
    for r in every:
        if r["method"] not in ("frozen", "uniform", "oracle", "floor"):
            sources.setdefault(r["label"], set()).add(r["sources"])
    mixed = [f"`{label}`" for label, found in sources.items() if len(found) > 1]
    if mixed:
        about += ["", f"**Runs of {', '.join(mixed)} come from more than one state of l1ra's code.**"]
    return about


def _settings(labels: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    record = next(r for seeds in labels.values() for r in seeds.values())
    problem = record["problem"]
    planted = ", ".join(f"{name}: {rank}" for name, rank in problem["planted"].items())
    steps = sorted({r["steps"] for seeds in labels.values() for r in seeds.values()})
    text = f"{problem['network']}; planted {planted}; budget {record['budget']}, {problem['per_layer']} a layer; "
    text += f"{' and '.join(map(str, steps))} steps of {problem['batch']}, learning rate {problem['lr']:g}"
    return text + (f", noise {problem['noise']:g} on the targets." if problem["noise"] else ".")


def _row(records: Records, case: str, label: str) -> list[str]:
    found = records[case][label]
    own, uniform = errors(records, case, label), errors(records, case, UNIFORM)
    both = sorted(set(own) & set(uniform)) if label != UNIFORM else []
    dealt = [sum(e["dealt"] for e in r["reallocations"]) for r in found.values()]
    wasted = [r["wasted"] for r in found.values()]
    moves = any(dealt)
    return [
        label,
        interval_text(geometric_interval(own.values())),
        str(len(own)),
        interval_text(over(records, case, label, UNIFORM)) if label != UNIFORM else "",
        f"{sum(own[seed] > uniform[seed] for seed in both)} of {len(both)}" if both else "",
        interval_text(over(records, case, label, ORACLE)) if label != ORACLE else "",
        _percent(mean(records, case, label, "planted_share")),
        _percent(mean(records, case, label, "placed")),
        _percent(mean(records, case, label, "coverage")),
        f"{mean(records, case, label, 'moved'):.3g}",
        f"{sum(dealt) / len(dealt):.3g}" if moves else "0",
        f"{sum(wasted) / sum(dealt):.0%}" if moves else "",
        f"{mean(records, case, label, 'seconds'):.3g}",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _bars(records: Records, judged: str) -> list[list[str]]:
    return [[bar.demand, bar.found, bar.verdict] for bar in bars(records, judged)]


def _cases(records: Records, judged: str) -> list[list[str]]:
    return [
        [
            case,
            interval_text(over(records, case, judged, UNIFORM)),
            interval_text(over(records, case, judged, ORACLE)),
            _percent(mean(records, case, judged, "coverage")),
            "at the floor" if floored(records, case) else "",
        ]
        for case in records
        if errors(records, case, judged)
    ]
