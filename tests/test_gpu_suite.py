"""The benchmark program for GPUs, on a CPU with tiny sizes: it writes what it should, and stops where it should."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import bench, linears, llama, program, providers, sizes, step, table, timing, writeup  # noqa: E402

TINY = ["--tiny", "--device", "cpu"]


def write(folder, text):
    path = folder / "test_given.py"
    path.write_text(text)
    return str(path)


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def test_all_sections_run_and_everything_is_written(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    tests = write(tmp_path, "def test_fine(): pass")
    out = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *TINY, "--out", str(out), "--tests", tests],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in out.iterdir()) == sorted(writeup.FILES)
    found = read(out)
    assert found["environment"]["tiny"] and found["environment"]["device"] == "CPU"
    assert found["correctness"]["passed"] == 1
    assert found["ceilings"]["copy"]["tb_per_s"] > 0
    assert len(found["kernels"]["rows"]) > 2 and not found["failed"]
    assert len(found["linears"]["tables"]) == 1 + len(sizes.TINY.shapes)
    for problem in found["linears"]["tables"]:
        # No weight of the tiny shapes but one layer's is wide enough to be augmented.
        shown = [row["provider"] for row in problem["rows"]]
        assert shown in (list(providers.PROVIDERS), list(providers.PROVIDERS)[:-1])
        assert all(
            row["total_ms"]["p20"] <= row["total_ms"]["median"] <= row["total_ms"]["p80"] for row in problem["rows"]
        )
    for model in found["step"]["tables"]:
        assert [row["provider"] for row in model["rows"]] == list(step.PROVIDERS)
    assert found["reallocation"]["ranks_moved"]
    for name in ("linears.csv", "step.csv", "kernels.csv"):
        with open(out / name) as file:
            rows = list(csv.DictReader(file))
        assert rows and all(row["device"] == "CPU (tiny sizes)" for row in rows)
    text = (out / "table.md").read_text()
    assert "No figure here says anything about the kernels" in text and "Won and lost" in text
    assert str(tmp_path) not in text + (out / "results.json").read_text().replace(tests, "")


def doubled(run, module, rank):
    adapted = providers.ours(run, module, rank)
    layers = adapted.module
    return providers.Adapted(lambda *x: tuple(2 * y for y in layers(*x)), adapted.adapters)


def wrong_gradient(run, module, rank):
    adapted = providers.ours(run, module, rank)
    for adapter in adapted.adapters.values():
        adapter.a.register_hook(lambda grad: grad * torch.nan)
    return adapted


def gate_forgotten(run, module, rank):
    adapted = providers.ours(run, module, rank)
    for adapter in adapted.adapters.values():
        adapter.gate.requires_grad_(False)
    return adapted


@pytest.mark.parametrize("wrong", [doubled, wrong_gradient, gate_forgotten])
def test_a_wrong_competitor_stops_the_program_before_any_linear_is_timed(tmp_path, monkeypatch, wrong):
    def never(*_):
        raise AssertionError("something was timed")

    monkeypatch.setattr(providers, "PROVIDERS", {"frozen": providers.frozen, "ours": wrong})
    monkeypatch.setattr(linears, "interleave", never)
    code = program.main([*TINY, "--only", "linears", "step", "--skip-correctness", "--out", str(tmp_path)])
    assert code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["unfinished.json"]
    found = read(tmp_path, "unfinished.json")
    assert found["unfinished"].startswith("stopped: ours")
    assert found["correctness"] == "skipped" and found["linears"]["tables"] == [] and "step" not in found


FAILING = {
    "a failing test": "def test_wrong(): assert False",
    "no test": "x = 1",
    "only skipped tests": "import pytest\n@pytest.mark.skip\ndef test_late(): pass",
    "a broken file": "import nothing_of_that_name",
}


@pytest.mark.parametrize("text", [*FAILING.values(), None], ids=[*FAILING, "no file"])
def test_tests_that_do_not_pass_stop_the_program_before_anything_is_timed(tmp_path, text):
    tests = str(tmp_path / "nowhere") if text is None else write(tmp_path, text)
    out = tmp_path / "results"
    out.mkdir()
    (out / "results.json").write_text("of an earlier run")
    assert program.main([*TINY, "--only", "ceilings", "--out", str(out), "--tests", tests]) == 1
    found = read(out, "unfinished.json")
    assert found["unfinished"].startswith("stopped") and found["correctness"]["outcome"] == "failed"
    assert "environment" in found and "ceilings" not in found
    assert (out / "results.json").read_text() == "of an earlier run"


def test_tests_that_take_too_long_stop_the_program(tmp_path, monkeypatch):
    monkeypatch.setitem(sizes.TINY.seconds, "correctness", 1.0)
    tests = write(tmp_path, "import time\ndef test_slow(): time.sleep(60)")
    assert program.main([*TINY, "--only", "ceilings", "--out", str(tmp_path), "--tests", tests]) == 1
    assert "exceeded 1 s" in read(tmp_path, "unfinished.json")["unfinished"]


def test_a_single_section_still_runs_the_tests_first(tmp_path):
    tests = write(tmp_path, "def test_fine(): pass")
    assert program.main([*TINY, "--only", "ceilings", "--out", str(tmp_path / "out"), "--tests", tests]) == 0
    found = read(tmp_path / "out")
    assert found["correctness"]["outcome"] == "passed" and "linears" not in found
    assert not (tmp_path / "out" / "linears.csv").exists()


def test_skipped_tests_are_said_in_the_results(tmp_path):
    assert program.main([*TINY, "--only", "ceilings", "--skip-correctness", "--out", str(tmp_path)]) == 0
    assert read(tmp_path)["correctness"] == "skipped"
    assert "The kernel tests were skipped" in (tmp_path / "table.md").read_text()


def test_a_competitor_that_breaks_or_is_missing_is_left_out_by_name(tmp_path, monkeypatch):
    def breaks(run, module, rank):
        raise RuntimeError("out of luck")

    def missing(run, module, rank):
        raise bench.LeftOut("not on this machine")

    given = {"frozen": providers.frozen, "broken": breaks, "missing": missing, "ours": providers.ours}
    monkeypatch.setattr(providers, "PROVIDERS", given)
    assert program.main([*TINY, "--only", "linears", "--skip-correctness", "--out", str(tmp_path)]) == 1
    for problem in read(tmp_path)["linears"]["tables"]:
        assert [row["provider"] for row in problem["rows"]] == ["frozen", "ours"]
        assert problem["left_out"] == {"broken": "failed: RuntimeError: out of luck", "missing": "not on this machine"}
    assert "Left out: missing: not on this machine." in (tmp_path / "table.md").read_text()


def test_without_peft_its_providers_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(bench.LeftOut, match="peft can't be imported"):
        providers.peft_or_left_out()


def test_a_section_that_breaks_does_not_take_the_others_along(tmp_path, monkeypatch):
    def breaks(run):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(program.SECTIONS, "ceilings", breaks)
    code = program.main([*TINY, "--only", "ceilings", "reallocation", "--skip-correctness", "--out", str(tmp_path)])
    assert code == 1
    found = read(tmp_path)
    assert found["failed"] == ["ceilings: RuntimeError: no such luck"] and found["reallocation"]["ranks_moved"]


@pytest.mark.parametrize("argv", [[], ["--device", "cpu"]])
def test_with_nothing_to_measure_on_it_says_so(argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(argv) == 2
    assert "--tiny" in capsys.readouterr().err


def test_competitors_take_turns_and_each_leads_a_round():
    calls = []
    works = {name: timing.Work({"part": lambda name=name: calls.append(name)}) for name in "abc"}
    clock = timing.Clock(torch.device("cpu"), 1)
    samples = timing.interleave(clock, works, rounds=4, budget=timing.Budget(100))
    measured = "".join(calls[timing.WARM_UPS * len(works) :])
    assert measured == "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_without_time_there_are_three_rounds_and_no_more():
    works = {"a": timing.Work({"part": lambda: None})}
    samples = timing.interleave(timing.Clock(torch.device("cpu"), 1), works, rounds=40, budget=timing.Budget(0))
    assert len(samples["a"]) == timing.MIN_ROUNDS


@pytest.mark.parametrize("name", step.PROVIDERS)
def test_the_model_is_as_before_once_an_adapter_is_out_again(name):
    run = bench.Bench(torch.device("cpu"), True, Path("none"))
    model = llama.build(run, sizes.LITTLE)

    def picture():
        return {n: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}

    before = picture()
    attach = step.PROVIDERS[name]
    with attach(run, model, 4) as (params, _, _):
        assert params and all(p.requires_grad for p in params)
        assert picture() != before
    assert picture() == before and not any(p.requires_grad for p in model.parameters())


def test_competitors_in_a_training_step_have_the_same_budget():
    run = bench.Bench(torch.device("cpu"), True, Path("none"))
    model = llama.build(run, sizes.LITTLE)
    trained = {}
    for name in ("PEFT default", "ours"):
        with step.PROVIDERS[name](run, model, 4) as (params, _, _):
            trained[name] = sum(p.numel() for p in params if p.dim() == 2)
    assert trained["PEFT default"] == trained["ours"]


def test_on_a_gpu_the_device_is_kept_busy_while_the_host_queues(monkeypatch):
    log, now = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing.Clock, "cuda", property(lambda self: True))
    clock = timing.Clock(torch.device("cpu"), 1)
    monkeypatch.setattr(clock, "_flush", Buffer())
    monkeypatch.setattr(clock, "_flush_ms", 0.5)
    work = timing.Work({"forward": lambda: log.append("forward"), "backward": lambda: log.append("backward")})
    sample = clock.measure(work, host_ms=1.0)
    assert log == ["wait", *["flush"] * 4, "event", "forward", "event", "backward", "event", "wait"]
    assert sample.parts == {"forward": 1, "backward": 1} and sample.total == 2


def test_what_was_lost_is_listed_also_in_memory():
    def row(name, ms, peak):
        return {"provider": name, "total_ms": {"median": ms}, "peak_mib": peak}

    rows = [row("frozen", 1.0, 10), row("lean", 3.0, 20), row("fast", 1.5, 40), row("ours", 2.0, 30)]
    results = {"linears": {"tables": [{"title": "a layer", "rows": rows}]}}
    text = table.verdict(results)
    assert "less time in 1 of 2" in text
    assert "a layer: 33.3 % slower than fast" in text and "a layer: 50.0 % more peak memory than lean" in text
    assert "slower than lean" not in text and "frozen" not in text
