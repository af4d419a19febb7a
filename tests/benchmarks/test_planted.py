"""The planted-rank benchmark: its problems are what they say, its records and tables too; and the method solves it."""

import copy
import json
import pickle
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

import l1ra
from benchmarks.common.files import RESULTS
from benchmarks.planted import runs
from benchmarks.planted.bars import bars, by_case, floored, over
from benchmarks.planted.cases import CASES
from benchmarks.planted.program import main
from benchmarks.planted.tables import markdown
from benchmarks.planted.training import DRIVEN, METHODS, Data, run
from benchmarks.planted.turnover import Turnover
from l1ra.allocation.plan import LayerPlan

# Where only a step or two are run, no rank moves.
pytestmark = pytest.mark.filterwarnings("ignore:no rank will move")

BRISK = {"interval": 8, "warmup": 0.0, "cooldown": 0.2}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_rule_has_a_third_of_uniform_error_and_spends_the_budget_where_ranks_are_planted(seed):
    # Uniform LoRA's training is in the records: its error needs no further one here.
    uniform = runs.store(RESULTS / "planted").get("mlp", "uniform", seed)
    ours = run("default", seed)
    assert list(uniform["ranks"].values()) == [4] * 8 == list(run("uniform", seed, steps=1).ranks.values())
    assert uniform["steps"] == CASES["mlp"].steps and uniform["problem"] == CASES["mlp"].settings()
    assert sum(ours.ranks.values()) <= sum(uniform["ranks"].values())
    assert ours.error <= uniform["error"] / 3
    assert ours.planted_share >= 0.7


# --- problems


@pytest.mark.parametrize("name", CASES)
def test_teacher_differs_in_the_planted_layers_alone_and_by_the_planted_ranks(name):
    case = CASES[name]
    student, teacher = case.problem(3)
    theirs = teacher.state_dict()
    found = {}
    for key, mine in student.state_dict().items():
        if not torch.equal(mine, theirs[key]):
            strengths = torch.linalg.svdvals((theirs[key] - mine).double())
            found[key.removesuffix(".weight")] = int(torch.linalg.matrix_rank(theirs[key] - mine, atol=1e-3))
            assert strengths[0] == pytest.approx(case.strength, rel=1e-4)
    assert found == dict(case.planted)
    assert set(case.planted) <= set(case.layers(student))


@pytest.mark.parametrize("name", CASES)
def test_frozen_error_is_the_distance_to_the_teacher_and_the_planted_terms_close_it(name):
    case = CASES[name]
    student, teacher = (copy.deepcopy(net).double() for net in case.problem(0))
    x = torch.randn(case.test_inputs, *case.inputs, dtype=torch.float64)
    with torch.no_grad():
        distance = (student(x) - teacher(x)).square().mean().item()
    frozen = run("frozen", 0, case=name)
    assert frozen.error == pytest.approx(distance, rel=0.1)
    assert frozen.ranks == {}
    solved = run("floor", 0, steps=0, case=name)
    assert solved.error < 1e-9 * frozen.error
    assert solved.ranks == dict(case.planted)


def test_oldest_case_keeps_the_figures_that_were_published():
    assert [round(run("frozen", seed).error, 4) for seed in range(3)] == [0.1562, 0.1444, 0.1530]
    case = CASES["mlp"]
    assert (case.steps, case.batch, case.lr, case.per_layer, case.noise) == (1500, 64, 5e-3, 4, 0.0)


def test_oracle_deals_a_budget_that_is_too_small_in_proportion():
    case = CASES["above"]
    ranks = case.oracle_ranks(32)
    assert sum(case.planted.values()) > 32 == sum(ranks.values())
    assert all(abs(ranks[name] - rank * 32 / sum(case.planted.values())) < 1 for name, rank in case.planted.items())
    assert CASES["below"].oracle_ranks(32) == dict(CASES["below"].planted)
    assert set(CASES["no-structure"].oracle_ranks(32).values()) == {4}


# --- runs


@pytest.fixture
def seen(monkeypatch):
    """Every batch that a run trains on, and what it is tested on."""
    found = {"batch": [], "test": []}
    for name, kept in found.items():
        draw = getattr(Data, name)

        def spy(self, draw=draw, kept=kept):
            kept.append(draw(self))
            return kept[-1]

        monkeypatch.setattr(Data, name, spy)
    return found


def test_all_methods_of_a_seed_see_the_same_inputs_and_targets(seen):
    for method in METHODS:
        run(method, 1, steps=2, case="noise")
    trained = [m for m in METHODS if m != "frozen"]
    assert len(seen["batch"]) == 2 * len(trained) and len(seen["test"]) == len(METHODS)
    first = seen["batch"][:2]
    for i, method in enumerate(trained):
        for (x, y), (x0, y0) in zip(seen["batch"][2 * i : 2 * i + 2], first, strict=True):
            assert torch.equal(x, x0)
            assert torch.equal(y, y0) == (method != "floor")
    for x, y in seen["test"][2:]:
        assert torch.equal(x, seen["test"][1][0]) and torch.equal(y, seen["test"][1][1])


def test_noise_is_on_the_targets_of_training_alone(seen):
    case = CASES["more-noise"]
    quiet = replace(case, noise=0.0)
    for each in (case, quiet):
        run("oracle", 0, steps=2, case=each)
    for (x, y), (x0, y0) in zip(seen["batch"][:2], seen["batch"][2:], strict=True):
        assert torch.equal(x, x0)
        assert (y - y0).std().item() == pytest.approx(case.noise, rel=0.1)
    assert torch.equal(seen["test"][0][1], seen["test"][1][1])


def test_settings_reach_the_method_and_are_refused_where_they_would_do_nothing():
    # Three reallocations, of which the last one has room to learn.
    brisk = run("default", 0, steps=30, **BRISK)
    assert brisk.moved > 0 and [e["step"] for e in brisk.reallocations] == [8, 16, 24]
    assert min(run("default", 0, steps=30, **BRISK, min_rank=3).ranks.values()) == 3
    with pytest.raises(ValueError, match="takes no settings"):
        run("oracle", 0, steps=2, margin=0.3)
    with pytest.raises(ValueError, match="method must be one of"):
        run("lora", 0)


def test_ranks_that_come_and_go_are_counted():
    result = run("gradient-rows", 0, steps=40, case="wide", **BRISK)
    cut, dealt = (sum(e[key] for e in result.reallocations) for key in ("cut", "dealt"))
    assert dealt - cut == sum(result.ranks.values()) - result.budget
    assert 0 <= result.wasted <= cut and result.moved <= dealt


def test_a_row_that_is_dealt_and_cut_again_is_wasted_and_one_of_the_first_is_not():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    controller = l1ra.patch(model, 4, total_steps=10)
    turnover, layer = Turnover(controller), model[0]
    layer.resize(LayerPlan((0, 2), 2))
    assert turnover.wasted == 0
    layer.resize(LayerPlan((1, 3)))
    assert turnover.wasted == 1
    assert turnover.reallocations() == [{"step": 0, "cut": 4, "dealt": 2}]


def test_share_and_coverage_count_what_can_lie_on_planted_layers():
    uniform = run("uniform", 0, steps=1)
    assert uniform.planted_share == 12 / 32
    assert uniform.placed == 12 / 27  # five other layers keep a rank each
    assert uniform.coverage == 12 / 26
    below = run("uniform", 0, steps=1, case="below")
    assert below.coverage == 8 / 12
    best = replace(below, ranks={f"layers.{i}": {2: 18, 5: 8}.get(i, 1) for i in range(8)})
    assert best.placed == best.coverage == 1
    lopsided = replace(best, ranks={f"layers.{i}": {2: 25}.get(i, 1) for i in range(8)})
    assert lopsided.placed == 1 and lopsided.coverage == 9 / 12


# --- records


def test_runs_leave_a_record_each_and_are_not_repeated(tmp_path, capsys, monkeypatch):
    asked = ["--cases", "mlp", "--methods", "frozen", "default", "--seeds", "2", "--steps", "3", "--jobs", "1"]
    asked += ["--out", str(tmp_path)]
    assert main(asked) == 0
    found = {(r["label"], r["seed"]): r for r in map(json.loads, (tmp_path / "mlp.jsonl").read_text().splitlines())}
    assert list(found) == [(method, seed) for method in ("default", "frozen") for seed in (0, 1)]
    record = found["default", 1]
    assert record["error"] > 0 and record["seed"] == 1 and record["problem"]["planted"] == dict(CASES["mlp"].planted)
    assert record["versions"]["torch"] == version("torch") and record["hardware"]["threads"] == 1
    assert "error 0.1562" in capsys.readouterr().out

    ran = []
    perform = runs.perform
    monkeypatch.setattr("benchmarks.planted.program.perform", lambda job, out: ran.append(job) or perform(job, out))
    main(asked)
    assert ran == [] and capsys.readouterr().out.count("from before") == 4
    # A run with other settings is another run, under its name or the same.
    main([*asked, "--set", "margin=0.3", "--label", "gentle"])
    assert [(job.label, job.overrides) for job in ran] == [("gentle", {"margin": 0.3})] * 2
    ran.clear()
    main([*asked, "--set", "margin=0.2", "--label", "gentle"])
    main([*asked, "--again"])
    assert len(ran) == 2 + 4
    page = (tmp_path / "planted.md").read_text()
    assert "| default |" in page and "| gentle |" in page


def test_a_new_process_finds_what_a_worker_is_given():
    for function in (runs.perform, runs.one_thread):
        assert function.__module__ == "benchmarks.planted.runs"  # not __main__, which is another one there
    job = runs.Job("mlp", "default", "gentle", 0, 3, {"margin": 0.3})
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize(
    "wrong", [["--set", "margn=0.3"], ["--set", "margin"], ["--set", "seed=1"], ["--label", "name"]]
)
def test_wrong_settings_end_before_anything_runs(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--cases", "mlp", "--out", str(tmp_path / "none"), *wrong])
    assert "error:" in capsys.readouterr().err and not (tmp_path / "none").exists()


# --- tables


def made_up(case, label, seed, error, **more):
    driven = label in DRIVEN or label == "uniform"
    return {
        **{"case": case, "method": label, "label": label, "seed": seed, "error": error, "steps": 10, "overrides": {}},
        **{"ranks": {}, "planted_ranks": dict(CASES[case].planted), "budget": 32, "min_rank": 1, "moved": 0},
        **{"reallocations": [], "wasted": 0, "seconds": 1.0, "problem": CASES[case].settings()},
        **{"planted_share": 0.9, "placeable": 27 if driven else None, "placed": 0.9 if driven else None},
        **{"coverage": 0.9 if driven else None, "versions": {"torch": "0"}, "commit": "c", "sources": "s"},
        **{"hardware": {"processor": "abacus", "cores": 1, "threads": 1}},
        **more,
    }


def suite(ours=0.1, oracle=0.05, floor=1e-6, seeds=(0, 1), **more):
    """Records in which uniform is at 1 everywhere, and so is the default where nothing is to be found."""
    every = []
    for name, case in CASES.items():
        for seed in seeds:
            default = ours if case.structured else 1.0
            for label, error in (("uniform", 1.0), ("default", default), ("oracle", oracle), ("floor", floor)):
                every.append(made_up(name, label, seed, error, **(more if label == "default" else {})))
    return every


def verdicts(every, label="default"):
    return [bar.verdict for bar in bars(by_case(every), label)]


def test_errors_are_compared_seed_by_seed():
    found = by_case(
        made_up("mlp", label, seed, error)
        for label, errors in (("default", {0: 1.0, 1: 4.0, 7: 9.0}), ("uniform", {0: 2.0, 1: 2.0, 5: 1.0}))
        for seed, error in errors.items()
    )
    assert over(found, "mlp", "default", "uniform").mean == pytest.approx(1.0)
    assert over(found, "mlp", "default", "uniform").count == 2
    assert over(found, "mlp", "default", "oracle") is None


def test_bars_are_met():
    assert verdicts(suite()) == ["met"] * 6


@pytest.mark.parametrize(
    ("every", "missed"),
    [
        (suite(ours=0.126, oracle=0.1), 0),
        (suite(oracle=0.03), 1),
        (suite(placed=0.84), 2),
        (suite(coverage=0.84), 3),
    ],
)
def test_a_missed_bar_says_so(every, missed):
    found = verdicts(every)
    assert [v == "**missed**" for v in found] == [i == missed for i in range(6)]
    page = markdown(every)
    assert page.count("**missed**") == 1


def test_a_loss_where_uniform_is_right_is_a_missed_bar():
    every = [{**r, "error": 1.04} if (r["case"], r["label"]) == ("scarce", "default") else r for r in suite()]
    assert verdicts(every) == ["met"] * 5 + ["**missed**"]
    assert "2 of 2" in markdown(every)


def test_one_case_that_is_solved_to_rounding_does_not_carry_the_others():
    every = suite(ours=0.5, oracle=0.4)
    best = [{**r, "error": 1e-12} if (r["case"], r["label"]) == ("llama", "default") else r for r in every]
    assert verdicts(best)[0] == "**missed**"


def test_an_oracle_at_the_floor_is_not_compared_with():
    every = [{**r, "error": 1e-7} if (r["case"], r["label"]) == ("wide", "oracle") else r for r in suite()]
    assert floored(by_case(every), "wide") and not floored(by_case(every), "mlp")
    assert over(by_case(every), "wide", "default", "oracle").mean == pytest.approx(1e6)
    bar = bars(by_case(every), "default")[1]
    assert bar.met and "oracle at the floor: wide" in bar.found
    # Unless a floor is measured, none is assumed.
    assert not floored(by_case(r for r in every if r["label"] != "floor"), "wide")


def test_what_is_missing_is_not_passed_over():
    bar = bars(by_case(r for r in suite() if r["case"] != "llama"), "default")[0]
    assert bar.met and bar.missing == ("llama",) and "llama" in bar.verdict
    assert verdicts(suite(), "nobody") == ["not measured"] * 6


def test_runs_of_two_states_of_the_code_are_told():
    every = suite()
    assert "more than one state" not in markdown(every)
    every[1]["sources"] = "other"
    assert "Runs of `default` come from more than one state" in markdown(every)
