"""Intervals and spreads that all benchmarks share."""

import math

import pytest

from benchmarks.common.statistics import geometric_interval, ratios, spread, t_interval


def test_interval_of_a_mean_is_students():
    pytest.importorskip("scipy")
    found = t_interval([1, 2, 3])
    # 4.303 is the quantile of t with two degrees of freedom; the deviation of 1, 2, 3 is 1.
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert (found.low + found.high) / 2 == pytest.approx(found.mean) and found.mean == 2 and found.count == 3
    assert t_interval([1.0]).half is None and t_interval([1.0]).low is None
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])


def test_interval_of_a_geometric_mean_is_students_on_the_logarithm():
    pytest.importorskip("scipy")
    found = geometric_interval([1.0, 100.0])
    assert found.mean == pytest.approx(10)
    # t of one degree of freedom is 12.706; the deviation of log10 0 and 2 is sqrt(2), of their mean 1.
    assert found.high == pytest.approx(10 * 10**12.7062, rel=1e-3) and found.low == pytest.approx(100 / found.high)
    assert geometric_interval([2.0]).low is None and geometric_interval([2.0]).mean == pytest.approx(2)


def test_spread_and_ratios_are_percentiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == {"median": 2.5, "p20": 1.0, "p80": 4.0, "n": 6}
    assert ratios([2.0, 3.0, 4.5], [1.0, 2.0, 3.0])["median"] == pytest.approx(50.0)
