"""The program that compares methods, on tiny models: what it starts, resumes, records and tells."""

import subprocess

import pytest
from quality_helpers import ALPHA, InProcess, put_tiny_tasks, spec

from benchmarks.quality import learning_rates, program, run_queue
from benchmarks.quality.runs import TUNING_SEED, Spec, store


@pytest.fixture(autouse=True)
def _tiny_tasks(monkeypatch, folders):
    put_tiny_tasks(monkeypatch, folders)


ARGUMENTS = ["--tasks", "bert", "--methods", "frozen", "lora", "l1ra", "--seeds", "2", "--rates", "1e-2", "3e-2"]


@pytest.mark.filterwarnings("ignore:no rank will move")  # so few steps
def test_the_program_tunes_runs_resumes_and_reports(tmp_path, capsys):
    arguments = [*ARGUMENTS, "--jobs", "1", "--budgets", "2", "--out", str(tmp_path)]
    launched = []

    def launch(spec):
        launched.append(spec)
        return InProcess(spec)

    assert program.main(arguments, launch) == 0
    tuning = [s for s in launched if s.seed == TUNING_SEED]
    # At the chosen rate of the head, LoRA's first rate was tried with the head's rates already.
    assert len(tuning) == 2 + 2 * 2 - 1 and len(launched) == len(tuning) + 2 * 3
    records = store(tmp_path).read_all()
    assert all((r["test_loss"] is None) == (r["seed"] == TUNING_SEED) for r in records)
    heads = [r for r in records if r["seed"] == TUNING_SEED and (r["method"], r["rate"]) == ("lora", 1e-2)]
    head_rate = learning_rates.best({r["head_rate"]: r["validation_loss"] for r in heads})
    assert {r["head_rate"] for r in heads} == {1e-2, 3e-2}
    assert {s.head_rate for s in launched if s.method != "frozen" and s.seed < 2} == {head_rate}
    for method in ("lora", "l1ra"):
        tried = [r for r in records if (r["method"], r["seed"], r["head_rate"]) == (method, TUNING_SEED, head_rate)]
        best = learning_rates.best({r["rate"]: r["validation_loss"] for r in tried})
        assert {s.rate for s in launched if s.method == method and s.seed < 2} == {best}
    report = (tmp_path / "quality.md").read_text()
    assert f"| the head, beside lora | {head_rate:g} |" in report
    assert (
        "l1ra − lora" in report
        and "of the grid" in report
        and "Alpha is 4 at every budget" in report
        and (tmp_path / "bert.png").stat().st_size > 0
    )
    assert "python -m benchmarks.quality --tasks bert" in report and str(tmp_path) not in report

    launched.clear()
    rows = (tmp_path / "bert.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith('{"task":"bert","method":"lora","multiplier":2.0,"seed":1,')]
    (tmp_path / "bert.jsonl").write_text("".join(kept))
    assert len(kept) == len(rows) - 1
    assert program.main(arguments, launch) == 0
    assert [(s.method, s.seed) for s in launched] == [("lora", 1)]
    assert {file.name for file in tmp_path.iterdir()} == {"bert.jsonl", "bert.png", "commands.txt", "quality.md"}

    launched.clear()
    experiment = ["--tasks", "bert", "--seeds", "1", "--budgets", "2", "--rate", "1e-2", "--out", str(tmp_path)]
    experiment += ["--rates", "1e-2", "3e-2", "--set", "margin=0.2", "--label", "q25"]
    assert program.main(experiment, launch) == 0
    assert [(s.name, s.rate, s.head_rate) for s in launched] == [("q25", 1e-2, head_rate)]
    (record,) = [r for r in store(tmp_path).read_all() if r["method"] == "q25"]
    assert record["settings"] == {"margin": 0.2} and record["config"]["margin"] == 0.2
    assert record["base_method"] == "l1ra" and record["alpha"] == record["config"]["alpha"] == ALPHA
    assert "q25 − l1ra" in (tmp_path / "quality.md").read_text()


def test_language_models_have_no_head_to_look_for_a_rate_for(tmp_path):
    launched = []

    def launch(spec):
        launched.append(spec)
        return InProcess(spec)

    arguments = ["--tasks", "llama", "--methods", "lora", "--seeds", "1", "--budgets", "2", "--rate", "1e-2"]
    assert program.main([*arguments, "--out", str(tmp_path)], launch) == 0
    assert [(s.method, s.rate, s.head_rate) for s in launched] == [("lora", 1e-2, None)]
    (record,) = store(tmp_path).read_all()
    assert record["head_rate"] is None and "the head" not in (tmp_path / "quality.md").read_text()


def test_no_minutes_start_nothing(tmp_path, capsys):
    def launch(spec):
        raise AssertionError("started")

    assert program.main([*ARGUMENTS, "--minutes", "0", "--out", str(tmp_path)], launch) == 0
    assert "are left for the next call" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    def launch(spec):
        fails = (spec.method, spec.seed) == ("lora", 0)
        return InProcess(Spec(**{**vars(spec), "method": "nonsense"}) if fails else spec)

    arguments = ["--tasks", "bert", "--methods", "lora", "--seeds", "2", "--budgets", "2", "--rate", "1e-2"]
    arguments += ["--rates", "3e-2"]
    assert program.main([*arguments, "--out", str(tmp_path)], launch) == 1
    captured = capsys.readouterr()
    assert "no method is called 'nonsense'" in captured.out and "1 runs FAILED" in captured.err
    assert [r["seed"] for r in store(tmp_path).read_all() if r["seed"] != TUNING_SEED] == [1]


def test_a_run_of_its_own_process_has_one_thread_and_fails_loudly(tmp_path, monkeypatch):
    seen = {}

    def popen(command, env, **options):
        seen.update(command=command, env=env)

    monkeypatch.setattr(subprocess, "Popen", popen)
    wanted = spec(tmp_path, "l1ra", settings=(("margin", 0.3),))
    run_queue.start(wanted)
    assert seen["env"]["OMP_NUM_THREADS"] == "1" and seen["env"]["GOMP_SPINCOUNT"] == "0"
    assert Spec.parse(seen["command"][-1]) == wanted


def test_settings_and_label_belong_together(capsys):
    for arguments in (["--label", "x"], ["--set", "margin=0.3"], ["--set", "margin", "--label", "x"]):
        with pytest.raises(SystemExit):
            program.main(arguments)
