"""The budget finds the layers that need it: the planted-rank benchmark, at the size that the README quotes."""

import planted
import pytest


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_rule_has_a_third_of_uniform_error_and_spends_the_budget_where_ranks_are_planted(seed):
    uniform = planted.run("uniform", seed)
    ours = planted.run("default", seed)
    assert uniform.ranks == [planted.PER_LAYER] * planted.DEPTH
    assert sum(ours.ranks) <= sum(uniform.ranks)
    assert ours.error <= uniform.error / 3
    assert ours.planted_share >= 0.7
