"""The results as Markdown, including the comparisons that ours loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.tables import markdown_table, spread_text

__all__ = ["FROZEN", "OURS", "comparison", "device", "markdown", "summary"]

# Rows are compared with the first; the names of all of ours begin with the second.
FROZEN, OURS = "frozen", "ours"


def device(results: dict[str, Any]) -> str:
    """The name that every table carries; a tiny run is marked, for its figures mean nothing."""
    found = results.get("environment", {})
    return found.get("device", "unknown device") + (" (tiny sizes)" if found.get("tiny") else "")


def markdown(results: dict[str, Any]) -> str:
    parts = [head(results)]
    for problem in results.get("linears", {}).get("tables", []):
        parts.append(linear_table(results, problem))
    parts.append(notes(results))
    for model in results.get("step", {}).get("tables", []):
        parts.append(step_table(results, model))
    if results.get("kernels", {}).get("rows") or results.get("kernels", {}).get("left_out"):
        parts.append(kernel_table(results))
    if results.get("linears", {}).get("tables"):
        parts.append(verdict(results))
    parts.append(remarks(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def head(results: dict[str, Any]) -> str:
    found = results.get("environment", {})
    packages = found.get("packages", {})
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "triton", "transformers", "peft") if packages.get(name)
    )
    lines = [
        f"## {device(results)}",
        "",
        f"{versions}; commit {found.get('commit')}; {results.get('started')}; `{results.get('command')}`.",
    ]
    if found.get("tiny") or found.get("device") == "CPU":
        lines += ["", "**Tiny sizes: this tried the program out. No figure here says anything about the kernels.**"]
    lines += tests_line("Kernel tests before", results.get("correctness"))
    if "trainings" in results:
        lines += tests_line("Whole trainings", results["trainings"])
    if why := results.get("unfinished"):
        lines += ["", f"**This run did not come to its end: {why}.**"]
    lines += ["", "Median (20th to 80th percentile). Competitors took turns within each round; caches were cold."]
    return "\n".join(lines)


def tests_line(title: str, found: Any) -> list[str]:
    """The outcome of tests, in bold unless all passed."""
    if found == "skipped":
        return ["", "**The kernel tests were skipped: nobody knows whether what was timed is right.**"]
    if not isinstance(found, dict):
        return ["", f"**{title}: not run.**"]
    if found["outcome"] == "left out":
        return ["", f"**{title}: left out, {found['why']}.**"]
    counts = f"{found['passed']} passed, {found['skipped']} skipped"
    if found["outcome"] == "passed":
        return ["", f"{title}: {counts}."]
    line = (
        f"{title}: {found['failed']} failed, {found['unfinished']} did not run to an end, {counts}. No figure is given"
    )
    line += " of what a test is about that failed or did not run."
    return ["", f"**{line}**", *(f"- failed: {failure['test']}" for failure in found["failures"])]


def kernel_table(results: dict[str, Any]) -> str:
    rows = [
        [
            *(row["name"], row["shape"], spread_text(row["ms"], ".4f"), f"{row['gb_per_s']:,.0f}"),
            f"{100 * row['copy_share']:.0f} %",
        ]
        for row in results["kernels"]["rows"]
    ]
    head = ["", "shape", "ms", "GB/s", "share of a copy"]
    return section(f"### Kernels alone, {device(results)}", head, rows, results["kernels"], left=2)


def linear_table(results: dict[str, Any], problem: dict[str, Any]) -> str:
    rows = []
    for row in problem["rows"]:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        medians = [f"{row[key]['median']:.3f}" for key in ("forward_ms", "backward_ms", "host_ms")]
        rows.append([label(row), spread_text(row["total_ms"], ".3f"), overhead(row), *medians, peak])
    head = ["", "ms", "over frozen", "forward ms", "backward ms", "host ms", "peak MiB"]
    return section(f"### {problem['title']}, forward + backward, {device(results)}", head, rows, problem)


def notes(results: dict[str, Any]) -> str:
    """How the stand-ins in the tables above work."""
    found = results.get("linears", {})
    shown = {row["provider"] for problem in found.get("tables", []) for row in problem["rows"]}
    return "\n".join(f"- {name}: {text}" for name, text in found.get("notes", {}).items() if name in shown)


def step_table(results: dict[str, Any], model: dict[str, Any]) -> str:
    rows = []
    for row in model["rows"]:
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        times = [spread_text(row["step_ms"], ".1f"), f"{row['tokens_per_s']['median']:,.0f}"]
        rows.append([label(row), *times, overhead(row), peak, format(row["trained_parameters"], ",")])
    checkpointing = "with" if model["checkpointing"] else "without"
    title = (
        f"### One training step, {model['model']}, {model['batch']} x {model['sequence']} tokens, "
        f"rank {model['rank']}, {checkpointing} gradient checkpointing, {device(results)}"
    )
    head = ["", "ms a step", "tokens/s", "over frozen", "peak GiB", "trained parameters"]
    return section(title, head, rows, model)


def section(title: str, head: list[str], rows: list[list[str]], found: dict[str, Any], left: int = 1) -> str:
    """A table under its title, and below it what was left out."""
    lines = [title, "", markdown_table(head, rows, left)]
    if found["left_out"]:
        lines += ["", *(f"Left out: {name}: {reason}." for name, reason in found["left_out"].items())]
    return "\n".join(lines)


def tables_with_rows(results: dict[str, Any], section: str, title: str) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(table[title], table["rows"]) for table in results.get(section, {}).get("tables", [])]


def against(groups: list[tuple[str, dict[str, float | None]]]) -> Iterator[tuple[str, str, float]]:
    """Of every group with us in it: title, a competitor, by how many percent our value is above its value."""
    for title, values in groups:
        for name, value in values.items():
            if values.get(OURS) and value and name != FROZEN and not name.startswith(OURS):
                yield title, name, 100 * (values[OURS] / value - 1)


def comparison(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Median times, of linears and of steps."""
    linears = tables_with_rows(results, "linears", "title")
    steps = tables_with_rows(results, "step", "model")
    groups = [(title, {row["provider"]: row["total_ms"]["median"] for row in rows}) for title, rows in linears]
    groups += [(f"step, {title}", {row["provider"]: row["step_ms"]["median"] for row in rows}) for title, rows in steps]
    return against(groups)


def memory(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Peak memory, of linears and of steps."""
    linears = tables_with_rows(results, "linears", "title")
    steps = tables_with_rows(results, "step", "model")
    groups = [(title, {row["provider"]: row["peak_mib"] for row in rows}) for title, rows in linears]
    groups += [(f"step, {title}", {row["provider"]: row["peak_gib"] for row in rows}) for title, rows in steps]
    return against(groups)


def summary(results: dict[str, Any]) -> str:
    """A line for each table: by how much each competitor is above the frozen layers."""
    lines = [f"over frozen, {device(results)}:"]
    groups = tables_with_rows(results, "linears", "title")
    groups += [(f"step, {title}", rows) for title, rows in tables_with_rows(results, "step", "model")]
    for title, rows in groups:
        over = {row["provider"]: row["overhead_percent"] for row in rows if row["provider"] != FROZEN}
        cells = [f"{name} {values['median']:+.1f} %" for name, values in over.items() if values]
        lines.append(f"  {title}: {', '.join(cells)}")
    return "\n".join(lines) if groups else ""


def verdict(results: dict[str, Any]) -> str:
    found = list(comparison(results))
    lost = [f"- {title}: {over:.1f} % slower than {name}" for title, name, over in found if over > 0]
    lost += [
        f"- {title}: {over:.1f} % more peak memory than {name}" for title, name, over in memory(results) if over > 0
    ]
    slower = sum(over > 0 for _, _, over in found)
    lines = [
        "### Won and lost",
        "",
        f"Ours took less time in {len(found) - slower} of {len(found)} comparisons of medians.",
    ]
    return "\n".join([*lines, *(["", "Lost:", "", *lost] if lost else [])])


def remarks(results: dict[str, Any]) -> str:
    lines = []
    if copy := results.get("ceilings", {}).get("copy"):
        lines.append(f"Copy within {device(results)}: {copy['tb_per_s']:.2f} TB/s, read and written.")
    if products := results.get("ceilings", {}).get("products"):
        lines.append(f"Fastest product: {max(row['tflops_per_s'] for row in products):.0f} TFLOP/s.")
    moved = results.get("reallocation") or {}
    if "reallocation_ms" in moved:
        lines.append(
            f"A reallocation of {moved['adapters']} adapters: {moved['reallocation_ms']:.1f} ms on top of an "
            f"optimizer step of {moved['step_ms']['median']:.1f} ms."
        )
    lines += [
        f"{row['way']}, {results['workers']['processes']} processes: {row['step_ms']['median']:.1f} ms a step, "
        f"{row['moving_step_ms']['median']:.1f} ms where ranks move."
        for row in (results.get("workers") or {}).get("rows", [])
    ]
    lines += [
        f"Left out: {line}."
        for name in ("linears", "step", "reallocation", "workers")
        for line in (results.get(name) or {}).get("left_out", [])
    ]
    lines += [f"Broken: {line}" for line in results.get("failed", [])]
    return "\n".join(f"- {line}" for line in lines)


def label(row: dict[str, Any]) -> str:
    name = f"**{row['provider']}**" if row["provider"].startswith(OURS) else row["provider"]
    more = row["path"] or row.get("note", "")
    return f"{name} ({more})" if more else name


def overhead(row: dict[str, Any]) -> str:
    over = row["overhead_percent"]
    return "" if over is None or row["provider"] == FROZEN else f"{spread_text(over, '+.1f')} %"
