"""Statistics and tables of the comparison of methods, from made-up records."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("scipy")

from benchmarks.common.statistics import t_interval
from benchmarks.quality import methods, tables
from benchmarks.quality.analysis import Results, budget_for, paired
from benchmarks.quality.runs import TUNING_SEED


def test_intervals_and_paired_differences_are_scipys():
    from scipy import stats

    first, second = {0: 0.81, 1: 0.84, 2: 0.80, 5: 0.1}, {0: 0.80, 1: 0.80, 2: 0.81, 7: 0.9}
    found = paired(first, second, 1)
    differences = [0.01, 0.04, -0.01]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.interval.low == pytest.approx(low)
    assert found.interval.high == pytest.approx(high)
    assert (found.better, found.worse, found.verdict) == (2, 1, "")
    assert paired({0: 1.0}, {1: 1.0}, 1) is None
    assert paired({0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.11}, -1).verdict == "better"


def planted(method, multiplier, seed, metric, rate=1e-3, **more):
    ranks = {"encoder.layer.0.output.dense": 3, "encoder.layer.0.attention.self.query": 1}
    return {
        "task": "bert", "method": method, "multiplier": multiplier, "seed": seed, "rate": rate, "steps": 12,
        "test_metric": metric, "test_loss": 1 - metric, "validation_loss": 1 - metric, "diverged": False, "alpha": 4.0,
        "metric": "accuracy", "model": "tiny", "batch": 4, "max_tokens": 10, "ranks": ranks, "ranks_moved": 1,
        "examples": {"train": 80, "validation": 20, "test": 30}, "adapter_parameters": 100, "step_seconds": 0.1,
        "peak_mib": 10.0, "hardware": "a machine", "threads": 1, "versions": {"torch": "2", "commit": "abc"},
        "head_rate": None,
    } | more  # fmt: skip


def test_a_loss_is_shown_as_a_loss():
    records = []
    for seed in range(4):
        records += [
            planted("lora", 2, seed, 0.80 + 0.01 * seed),
            planted("l1ra", 2, seed, 0.77 + 0.01 * seed + 0.001 * (seed % 2)),
            planted("l1ra", 1.4, seed, 0.82 + 0.01 * seed + 0.001 * (seed % 2)),
        ]
    rates = ((1e-3, 0.5), (2e-3, 0.6), (4e-3, 0.7))
    records += [planted("lora", 2, TUNING_SEED, 1 - loss, rate) for rate, loss in rates]
    report = tables.markdown(Results(records, methods.METHODS), ["python -m benchmarks.quality"])
    rows = [line for line in report.splitlines() if "l1ra − lora" in line]
    assert len(rows) == 1
    assert "| 0 : 4 | **worse** |" in rows[0] and "**-2.95" in rows[0]
    (share,) = [line for line in report.splitlines() if "l1ra at 1.4 × − lora at 2 ×" in line]
    assert "| 4 : 0 | **better** |" in share
    assert "lowest of the grid: a lower one may be better" in report and "given, not chosen" in report
    assert "hold 75% at 1.4 ×, 75% at 2 × of the ranks; equal ranks would put 50% there" in report
    assert report.splitlines()[2].startswith("Hardware: a machine")


def test_a_budget_for_a_loss_lies_between_those_that_were_measured():
    losses = {8: 0.2, 2: 0.4, 4: 0.3}
    assert budget_for(losses, 0.35) == pytest.approx(2 * 2**0.5)
    assert [budget_for(losses, loss) for loss in (0.4, 0.3, 0.2)] == pytest.approx([2, 4, 8])
    assert budget_for(losses, 0.41) is None and budget_for(losses, 0.19) is None and budget_for({}, 0.3) is None
    assert budget_for({2: 0.3, 4: 0.3, 8: 0.1}, 0.3) == 2
    assert budget_for({2: 0.3, 4: 0.35, 8: 0.25}, 0.32) == pytest.approx(4 * 2**0.3)  # it crosses once, downwards


def test_the_share_of_loras_budget_with_its_loss_is_told():
    records = [planted("lora", 4, seed, 0.71 + 0.001 * seed) for seed in range(3)]
    for multiplier, metric in ((2, 0.7), (2.8, 0.72), (4, 0.74)):
        records += [planted("l1ra", multiplier, seed, metric) for seed in range(3)]
    report = tables.markdown(Results(records, methods.METHODS), [])
    shares = [50 * 1.4 ** (0.5 + 0.05 * seed) for seed in range(3)]
    told = f"{sum(shares) / 3:.0f} ± {t_interval(shares).half:.0f}"
    assert f"L1RA has LoRA's test loss with {told} % of 4 × (3 seeds), interpolated" in report
    assert "outside of what was measured" not in report
    more = [*records, *(planted("lora", 2, seed, 0.69 + 0.02 * (seed == 1)) for seed in range(3))]
    report = tables.markdown(Results(more, methods.METHODS), [])
    assert f"with {told} % of 4 × (3 seeds), interpolated" in report
    assert "For 2 × that lies outside of what was measured" in report
    only = [r for r in more if (r["method"], r["multiplier"]) != ("lora", 4)]
    assert "LoRA's test loss" not in tables.markdown(Results(only, methods.METHODS), [])


def test_only_runs_at_the_chosen_rate_are_reported():
    records = [planted("lora", 2, seed, 0.5, rate=4e-3) for seed in range(3)]
    records += [planted("lora", 2, 0, 0.9, rate=1e-3)]
    records += [planted("lora", 2, TUNING_SEED, value, rate) for rate, value in ((1e-3, 0.9), (4e-3, 0.5))]
    results = Results(records, methods.METHODS)
    assert results.tuned("bert", "lora")[None].rate == 1e-3
    assert results.values("bert", "lora", 2, "test_metric") == {0: 0.9}


def test_a_rate_of_its_own_at_each_budget():
    losses = {2: (0.4, 0.5), 8: (0.6, 0.3)}
    records = [
        planted("lora", m, TUNING_SEED, 1 - a, r) for m in losses for r, a in zip((1e-3, 4e-3), losses[m], strict=True)
    ]
    records += [planted("lora", m, 0, m / 100, rate=r) for m in (2, 8) for r in (1e-3, 4e-3)]
    results = Results(records, methods.METHODS)
    assert {m: tuned.rate for m, tuned in results.tuned("bert", "lora").items()} == {2: 1e-3, 8: 4e-3}
    assert [len(results.runs("bert", "lora", m)) for m in (2, 8)] == [1, 1]
    text = tables.markdown(results, [])
    assert "| lora, 2 × | 0.001 |" in text and "| lora, 8 × | 0.004 |" in text
    assert "at these budgets alone (bert: 2 × and 8 ×)" in text


def head_tries(*losses):
    """Tries of the head's rate beside LoRA at 2e-3: ``(rate, metric)``."""
    return [planted("lora", 4, TUNING_SEED, metric, 2e-3, head_rate=rate) for rate, metric in losses]


def test_only_runs_beside_the_head_at_its_rate_are_reported():
    records = head_tries((1e-2, 0.4), (3e-2, 0.5), (1e-1, 0.3))
    records += [planted("lora", 2, seed, 0.5, head_rate=1e-2) for seed in range(3)]
    records += [planted("lora", 2, 0, 0.9, head_rate=3e-2)]
    records += [planted("lora", 4, TUNING_SEED, 0.6, 1e-3, head_rate=3e-2)]
    results = Results(records, methods.METHODS)
    assert results.head("bert").rate == 3e-2
    assert results.head("bert").tried == pytest.approx({1e-2: 0.6, 3e-2: 0.5, 1e-1: 0.7})
    assert results.values("bert", "lora", 2, "test_metric") == {0: 0.9}
    assert results.tuned("bert", "lora")[None].tried == pytest.approx({1e-3: 0.4, 2e-3: 0.5})
    assert Results([planted("lora", 2, 0, 0.5)], methods.METHODS).head("bert") is None


def test_the_rate_of_the_head_is_told():
    records = [*head_tries((1e-2, 0.7), (3e-2, 0.8)), planted("lora", 4, 0, 0.9, head_rate=3e-2)]
    report = tables.markdown(Results(records, methods.METHODS), [])
    assert "The task head has a learning rate of its own" in report and "same for all methods" in " ".join(
        report.split()
    )
    assert "| the head, beside lora | 0.03 |  | 0.3000 | **0.2000** | highest of the grid" in report
    plain = tables.markdown(Results([planted("lora", 4, 0, 0.9)], methods.METHODS), [])
    assert "learning rate of its own" not in plain and "the head" not in plain


def test_seeds_that_not_all_methods_have_are_left_out_and_told():
    records = [planted(m, 2, seed, 0.5) for m, seeds in (("lora", 4), ("adalora", 3)) for seed in range(seeds)]
    records += [planted("lora", 4, seed, 0.5) for seed in range(4)] + [planted("quick", 2, 0, 0.5)]
    results = Results(records, methods.METHODS)
    assert list(results.values("bert", "lora", 2, "test_metric")) == [0, 1, 2]
    assert len(results.runs("bert", "lora", 4)) == 4 and len(results.runs("bert", "quick", 2)) == 1
    assert results.left_out("bert") == 1
    assert "1 runs with seeds that not all methods have" in tables.markdown(results, [])


def test_a_sentence_says_who_is_ahead():
    noise = (0.001, -0.001, 0.002)
    records = []
    for seed in range(3):
        for multiplier, ahead in ((2, 0.1), (4, 0.0), (8, -0.1)):
            records += [
                planted("lora", multiplier, seed, 0.5),
                planted("l1ra", multiplier, seed, 0.5 + ahead + noise[seed]),
            ]
    records += [planted("adalora", 2, seed, 0.8) for seed in range(3)]
    report = tables.markdown(Results(records, methods.METHODS), [])
    assert (
        "- **bert**, by accuracy: l1ra is ahead of lora at 2 × (3 seeds), level with lora at 4 × (3 seeds), behind "
        "lora at 8 × (3 seeds); behind adalora at 2 × (3 seeds)." in report
    )
    assert "- **bert**, by test loss: l1ra is ahead of lora at 2 × (3 seeds), level with lora at 4" in report
    one = [r | {"metric": "perplexity"} for r in records if r["seed"] == 0 and r["multiplier"] == 2]
    report = tables.markdown(Results(one, methods.METHODS), [])
    assert "by perplexity: l1ra is not to be judged against lora at 2 × (1 seed); not to be judged" in report


def test_what_a_reader_must_know_is_in_the_report():
    records = [planted("lora", 4, 0, 0.5) | {"task": task} for task in ("newsgroups", "glosses")]
    records += [planted("lora", 4, TUNING_SEED, 0.5) | {"task": "glosses"}]
    report = tables.markdown(Results(records, methods.METHODS), [])
    assert "Alpha is 4 at every budget" in report and "with a single seed (1000)" in report
    assert "lower-case" in report and "rounded to 4 bits" in report
