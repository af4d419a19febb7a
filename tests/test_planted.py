"""The budget finds the layers that need it: the planted-rank benchmark, at the size that the README quotes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.planted.run import run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_rule_has_a_third_of_uniform_error_and_spends_the_budget_where_ranks_are_planted(seed):
    uniform = run("uniform", seed)
    ours = run("default", seed)
    assert list(uniform.ranks.values()) == [4] * 8
    assert sum(ours.ranks.values()) <= sum(uniform.ranks.values())
    assert ours.error <= uniform.error / 3
    assert ours.planted_share >= 0.7
