"""The tests that must have passed before a kernel, the layer, a step or a reallocation is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["AUGMENT", "KERNELS", "LAYER", "ORDER", "REALLOCATION", "STEP", "untested"]


def _kernel(*stems: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{stem}.py" for stem in stems)


GATES, COMPACTION = "tests/kernels/test_gate_step.py", "tests/kernels/test_rank_compaction.py"
# By the name of a kernel's case in kernels.py. The layer's own tests check the results of shrink and expand, too.
KERNELS: dict[str, tuple[str, ...]] = {
    "reference_forward": (),
    "shrink": _kernel("shrink", "gated_linear"),
    "expand": _kernel("gated_linear", "pruned_ranks"),
    "expand_onto": _kernel("gated_linear", "pruned_ranks"),
    "output_backward": _kernel("output_backward"),
    "input_backward": _kernel("input_backward"),
    "adaptive_gate_step": (GATES,),
    "move_rows_many": (COMPACTION,),
}
LAYER = (
    *_kernel("shrink", "output_backward", "input_backward", "reductions", "gated_linear", "pruned_ranks"),
    *("tests/layers/test_fused_layers.py", *_kernel("autograd", "unwritten_memory")),
)
AUGMENT = (*LAYER, *_kernel("augment"))
STEP = (*LAYER, GATES, "tests/layers/test_recompute.py")
REALLOCATION = (*STEP, COMPACTION)
# Tests that others depend on come first, should time run out.
ORDER = (
    *REALLOCATION,
    *_kernel("augment", "launch", "dropout", "cuda_graphs", "compilation", "big_addresses", "memory_bounds"),
)


def untested(results: dict[str, Any], files: Sequence[str]) -> str:
    """Why nothing may be timed that is tested by ``files``, "" where it may, or where the tests were skipped."""
    found = results.get("correctness")
    if found == "skipped" or not files:
        return ""
    if not isinstance(found, dict):
        return "untested: the kernels' tests did not run"
    for file in files:
        state = found.get("files", {}).get(file)
        if state is None:
            return f"untested: {file} did not run"
        if state["failed"]:
            return f"its tests fail: {state['failed']} in {file}"
        if state["unfinished"]:
            return f"untested: {state['unfinished']} tests in {file} did not run"
        if not state["passed"]:
            return f"untested: all tests in {file} were skipped"
    return ""
