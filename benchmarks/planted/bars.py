"""The bars: what the method has to reach on these cases, computed from the records and met or missed.

- Error over uniform LoRA's: geometric mean of the structured cases at most 1/8. A case counts as no better than 1/1000:
  one that is solved to rounding must not make up for others that are not.
- Error over the oracle's: at most 3 in every structured case whose oracle is clear of the floor. The floor of a case is
  what the same training leaves when it starts at the solution (method ``floor``); an oracle within ten times of it has
  solved the problem as well as float32 and this optimizer can, and a ratio of two such errors says nothing.
- Ranks on planted layers: on average 85 % of what can lie there, which is the budget without the ranks that the other
  adapters keep. Only cases whose planted ranks use as much as that; in ``below`` the rest of the budget is of no use
  anywhere.
- Planted ranks that are met: on average 85 % of them, or of what can lie there if that is less. A surplus in one layer
  does not make up for another.
- Where all layers need the same: error over uniform LoRA's at most 1.03, in each case. Beside it stands the oracle's
  ratio: there it is uniform LoRA with other first rows, and tells how much is luck.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common.statistics import Interval, geometric_interval
from benchmarks.common.tables import interval_text
from benchmarks.planted.cases import CASES

__all__ = ["Bar", "Records", "bars", "by_case", "errors", "floored", "mean", "over"]

UNIFORM, ORACLE, FACTOR_OF_FLOOR, BEST_RATIO = "uniform", "oracle", 10.0, 1e-3
MOST_OVER_UNIFORM, MOST_OVER_ORACLE, LEAST_PLACED, MOST_WITHOUT_STRUCTURE = 1 / 8, 3.0, 0.85, 1.03

# Case -> label -> seed -> record.
Records = Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]


@dataclass(frozen=True)
class Bar:
    """``met`` is None if nothing is there to judge; ``missing`` names cases that it should cover and has no runs of."""

    demand: str
    found: str
    met: bool | None
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "not measured"
        return ("met" if self.met else "**missed**") + (
            f" so far, without {', '.join(self.missing)}" * bool(self.missing)
        )


def by_case(records: Iterable[Mapping[str, Any]]) -> Records:
    """In the order of the cases."""
    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        found.setdefault(record["case"], {}).setdefault(record["label"], {})[record["seed"]] = record
    order = list(CASES)
    return {
        case: found[case] for case in sorted(found, key=lambda c: (order.index(c) if c in order else len(order), c))
    }


def errors(records: Records, case: str, label: str) -> dict[int, float]:
    return {seed: record["error"] for seed, record in records.get(case, {}).get(label, {}).items()}


def over(records: Records, case: str, label: str, other: str) -> Interval | None:
    """Error of ``label`` over that of ``other``, seed by seed; None if they have no seed in common."""
    own, others = errors(records, case, label), errors(records, case, other)
    ratios = [own[seed] / others[seed] for seed in sorted(set(own) & set(others))]
    return geometric_interval(ratios) if ratios else None


def mean(records: Records, case: str, label: str, key: str) -> float | None:
    """Of a figure over the seeds; None without runs, or if they have no such figure."""
    values = [record[key] for record in records.get(case, {}).get(label, {}).values() if record[key] is not None]
    return sum(values) / len(values) if values else None


def floored(records: Records, case: str) -> bool:
    """Whether the oracle is at the floor; it is not as long as nothing shows it."""
    oracle, floor = errors(records, case, ORACLE), errors(records, case, "floor")
    if not oracle or not floor:
        return False
    return geometric_interval(oracle.values()).mean <= FACTOR_OF_FLOOR * geometric_interval(floor.values()).mean


def _scarce(records: Records, case: str, label: str) -> bool:
    """Whether the planted ranks use the bar's share of what can lie on planted layers."""
    record = next(iter(records[case][label].values()))
    return sum(record["planted_ranks"].values()) >= LEAST_PLACED * record["placeable"]


def _average(records: Records, cases: list[str], label: str, key: str) -> tuple[float | None, str]:
    """Mean over cases of the mean over seeds, and in words with the worst."""
    found = {case: value for case in cases if (value := mean(records, case, label, key)) is not None}
    if not found:
        return None, "–"
    worst = min(found, key=found.__getitem__)
    average = sum(found.values()) / len(found)
    return average, f"{average:.1%} of {len(found)} cases; worst: {worst}, {found[worst]:.1%}"


def bars(records: Records, label: str) -> list[Bar]:
    """All of them, for the runs called ``label``."""
    structured = [name for name, case in CASES.items() if case.structured]
    there = [case for case in structured if errors(records, case, label)]
    return [
        _uniform(records, structured, label),
        _oracle(records, structured, label),
        _share(records, structured, there, label),
        _coverage(records, structured, there, label),
        *[_without_structure(records, name, label) for name, case in CASES.items() if not case.structured],
    ]


def _uniform(records: Records, structured: list[str], label: str) -> Bar:
    found = {case: ratio.mean for case in structured if (ratio := over(records, case, label, UNIFORM))}
    demand = f"error over uniform LoRA's, geometric mean of the structured cases: at most {MOST_OVER_UNIFORM:g}"
    if not found:
        return Bar(demand, "–", None)
    worst = max(found, key=found.__getitem__)
    average = geometric_interval(max(ratio, BEST_RATIO) for ratio in found.values()).mean
    text = f"{average:.4g} of {len(found)} cases; worst: {worst}, {found[worst]:.3g}"
    return Bar(demand, text, average <= MOST_OVER_UNIFORM, tuple(c for c in structured if c not in found))


def _oracle(records: Records, structured: list[str], label: str) -> Bar:
    found = {case: ratio.mean for case in structured if (ratio := over(records, case, label, ORACLE))}
    counted = {case: ratio for case, ratio in found.items() if not floored(records, case)}
    demand = (
        f"error over the oracle's, where it is not at the floor, in every structured case: at most {MOST_OVER_ORACLE:g}"
    )
    missing = tuple(c for c in structured if c not in found)
    if not counted:
        return Bar(demand, "–", None, missing)
    beyond = {case: ratio for case, ratio in counted.items() if not ratio <= MOST_OVER_ORACLE}
    text = f"at most that in {len(counted) - len(beyond)} of {len(counted)} cases"
    if beyond:
        text += "; not in " + ", ".join(f"{case} ({ratio:.3g})" for case, ratio in beyond.items())
    if at := [case for case in found if case not in counted]:
        text += f"; oracle at the floor: {', '.join(at)}"
    return Bar(demand, text, not beyond, missing)


def _share(records: Records, structured: list[str], there: list[str], label: str) -> Bar:
    scarce = [case for case in there if _scarce(records, case, label)]
    average, text = _average(records, scarce, label, "placed")
    if left := [case for case in there if case not in scarce]:
        text += f"; not counted: {', '.join(left)}"
    demand = f"ranks on planted layers, of those that can lie there, on average: at least {LEAST_PLACED:.0%}"
    missing = tuple(c for c in structured if c not in there)
    return Bar(demand, text, None if average is None else average >= LEAST_PLACED, missing)


def _coverage(records: Records, structured: list[str], there: list[str], label: str) -> Bar:
    average, text = _average(records, there, label, "coverage")
    demand = f"planted ranks that are met, of those that can be, on average: at least {LEAST_PLACED:.0%}"
    missing = tuple(c for c in structured if c not in there)
    return Bar(demand, text, None if average is None else average >= LEAST_PLACED, missing)


def _without_structure(records: Records, case: str, label: str) -> Bar:
    demand = f"{case}, where all layers need the same: error over uniform LoRA's at most {MOST_WITHOUT_STRUCTURE:g}"
    ratio, luck = over(records, case, label, UNIFORM), over(records, case, ORACLE, UNIFORM)
    if ratio is None:
        return Bar(demand, "–", None)
    text = interval_text(ratio) + (f"; uniform LoRA from other first rows: {interval_text(luck)}" if luck else "")
    return Bar(demand, text, ratio.mean <= MOST_WITHOUT_STRUCTURE)
