"""The benchmark program for GPUs, on a CPU with tiny sizes: it writes what it should, whatever breaks on the way."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import environment
from benchmarks.common.files import ROOT
from benchmarks.gpu import (
    bench,
    child,
    log,
    plots,
    program,
    providers,
    pytest_runs,
    report,
    run,
    sizes,
    step,
    tables,
    timing,
    workers,
)
from benchmarks.gpu import environment as environment_section
from benchmarks.gpu.required_tests import AUGMENT, KERNELS, LAYER, ORDER, REALLOCATION, untested

TINY = ["--tiny", "--device", "cpu"]
SKIP = [*TINY, "--skip-correctness"]
FINE = {"passed": 1, "failed": 0, "skipped": 0, "unfinished": 0}


def write(folder, text, name="test_given.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def tiny_bench(**more):
    return bench.Bench(torch.device("cpu"), True, **more)


def instead(monkeypatch, **scripts):
    """Sections named here are these lines of Python instead; ``FOLDER`` and ``SECTION`` stand in them for what they
    are."""
    real = run.child_command

    def command(name, folder, *rest):
        if name not in scripts:
            return real(name, folder, *rest)
        return [sys.executable, "-c", f"FOLDER, SECTION = {str(folder)!r}, {name!r}\n{scripts[name]}"]

    monkeypatch.setattr(run, "child_command", command)


PART = """
import json, pathlib
def part(result, done, failed=()):
    path = pathlib.Path(FOLDER) / (SECTION + ".json")
    path.write_text(json.dumps({"result": result, "failed": list(failed), "done": done}))
"""
ENVIRONMENT = PART + "part({'device': 'a card', 'tiny': True, 'packages': {}, 'commit': 'c'}, True)"


# --- all of it


def test_all_sections_run_and_everything_is_written(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    out = tmp_path / "results"
    trainings = write(tmp_path, "def test_a_training(): pass")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *TINY, "--out", str(out), "--trainings", trainings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in out.iterdir()} in (set(report.FILES), set(report.FILES) - {"pictures.png"})
    assert len(report.FILES) <= 8
    found = read(out)
    assert "unfinished" not in found and not found["failed"]
    assert {name: state["state"] for name, state in found["sections"].items()} == dict.fromkeys(
        sizes.SECTIONS, "complete"
    )
    assert found["environment"]["tiny"] and found["environment"]["device"] == "CPU"
    assert set(found["correctness"]["files"]) == set(ORDER) and found["trainings"]["passed"] == 1
    assert found["ceilings"]["copy"]["tb_per_s"] > 0
    cases = 2 + len(sizes.TINY.shapes) * (len(KERNELS) - 2)
    assert len(found["kernels"]["rows"]) == cases and not found["kernels"]["left_out"]
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
    text = (out / "table.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("###") and line != "### Won and lost"]
    assert len(titles) == len(found["linears"]["tables"]) + len(found["step"]["tables"]) + 1
    assert all(title.endswith("CPU (tiny sizes)") for title in titles)
    assert "No figure here says anything about the kernels" in text and "Won and lost" in text
    assert "Kernels alone" in text and "- LoRAFusion-style: its published structure" in text
    assert str(tmp_path) not in text
    assert "reallocation" in (out / "log.txt").read_text()


def test_several_processes_move_ranks_alike_in_every_way():
    given = bench.Bench(torch.device("cpu"), tiny=True)
    found = workers.run(given, processes=2)
    assert not given.failed and [row["way"] for row in found["rows"]] == list(workers.WAYS)
    assert all(row["ranks"] == found["rows"][0]["ranks"] and row["moved"] > 0 for row in found["rows"])
    text = tables.remarks({"workers": found})
    assert "fully_shard with l1ra.fsdp, 2 processes" in text and "where ranks move" in text
    assert workers.run(given)["left_out"] == ["several processes: this machine has one GPU"]


# --- what breaks, and what does not go with it


def test_a_section_that_breaks_dies_or_hangs_leaves_what_it_had_and_the_others(tmp_path, monkeypatch):
    instead(
        monkeypatch,
        environment=ENVIRONMENT,
        step=PART + "part({'tables': [], 'left_out': ['hung']}, False)\nimport time\ntime.sleep(600)",
        linears=PART + "part({'tables': [], 'left_out': ['died']}, False)\nimport os\nos.abort()",
        kernels="raise RuntimeError('out of luck')",
        ceilings=PART + "print('measured')\npart({'copy': {'tb_per_s': 2.0}}, True)",
    )
    monkeypatch.setitem(sizes.SECTIONS, "step", (1.0, 2.5))
    monkeypatch.setattr(run, "GRACE", 0.0)
    only = ["--only", "step", "linears", "kernels", "ceilings"]
    assert program.main([*SKIP, *only, "--out", str(tmp_path)]) == 1
    found = read(tmp_path)
    assert "unfinished" not in found
    assert found["step"]["left_out"] == ["hung"] and found["linears"]["left_out"] == ["died"]
    assert found["ceilings"]["copy"]["tb_per_s"] == 2.0
    states = {name: state["state"] for name, state in found["sections"].items()}
    assert states == {
        "environment": "complete",
        "correctness": "complete",
        "step": "unfinished",
        "linears": "failed",
        "kernels": "failed",
        "ceilings": "complete",
    }
    assert [line.split(":")[0] for line in found["failed"]] == ["step", "linears", "kernels"]
    log = (tmp_path / "log.txt").read_text()
    assert "out of luck" in log and "measured" in log and "killed after" in log
    assert "Copy within a card" in (tmp_path / "table.md").read_text()


DIES_OF_OURS = """
import os
given = json.loads((pathlib.Path(FOLDER) / "given.json").read_text())
if "ours" not in given.get("avoid", {}):
    path = pathlib.Path(FOLDER) / (SECTION + ".json")
    kept = {"title": "kept", "rows": [], "left_out": {}}
    path.write_text(json.dumps({"result": {"tables": [kept]}, "failed": [], "at": "ours", "done": False}))
    os.abort()
part({**given["linears"], "left_out": list(given["avoid"])}, True)
"""


def test_a_section_goes_on_without_the_one_that_its_process_died_of(tmp_path, monkeypatch):
    instead(monkeypatch, environment=ENVIRONMENT, linears=PART + DIES_OF_OURS)
    assert program.main([*SKIP, "--only", "linears", "--out", str(tmp_path)]) == 1
    found = read(tmp_path)
    assert [made["title"] for made in found["linears"]["tables"]] == ["kept"]
    assert found["linears"]["left_out"] == ["ours"] and "avoid" not in found
    assert found["sections"]["linears"]["state"] == "complete"
    assert len(found["failed"]) == 1 and "exit code -6" in found["failed"][0]


def test_a_run_goes_on_where_it_ended_and_only_on_the_same_machine(tmp_path, monkeypatch):
    scripts = {
        "environment": ENVIRONMENT,
        "kernels": PART + "part({'rows': [], 'left_out': {}}, True)",
        "ceilings": PART + "part({'copy': {'tb_per_s': 1.0}}, False, ['ceilings: late'])\nraise SystemExit(1)",
    }
    instead(monkeypatch, **scripts)
    only = ["--only", "kernels", "ceilings"]
    assert program.main([*SKIP, *only, "--out", str(tmp_path)]) == 1
    first = read(tmp_path)
    monkeypatch.undo()
    again = {
        **scripts,
        "kernels": "raise RuntimeError('this was complete')",
        "ceilings": PART + "part({'copy': {'tb_per_s': 3.0}}, True)",
    }
    instead(monkeypatch, **{**again, "environment": ENVIRONMENT.replace("a card", "another card")})
    assert program.main(["--resume", str(tmp_path)]) == 2
    assert read(tmp_path) == first
    monkeypatch.undo()
    instead(monkeypatch, **again)
    assert program.main(["--resume", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert found["ceilings"]["copy"]["tb_per_s"] == 3.0 and not found["failed"] and len(found["runs"]) == 2
    assert "complete since an earlier run" in (tmp_path / "log.txt").read_text()
    assert program.main(["--resume", str(tmp_path / "nowhere")]) == 2


def test_whatever_hangs_the_run_ends_by_itself_and_leaves_whole_files(tmp_path):
    """Here it is the write-up, in the supervising process itself."""
    text = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "benchmarks")!r}]
import test_gpu_suite as t
from benchmarks.gpu import program, run, report
run.child_command = lambda name, folder, *rest: [
    sys.executable, "-c", f"FOLDER, SECTION = {{str(folder)!r}}, {{name!r}}\\n" + t.ENVIRONMENT
]
report.finished = lambda *_: time.sleep(600)
sys.exit(program.main([*t.SKIP, "--only", "ceilings", "--seconds", "5", "--out", {str(tmp_path)!r}]))
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert "out of time during the write-up" in read(tmp_path)["unfinished"], done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"log.txt", "results.json"}


def test_a_log_without_end_is_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log, "LARGEST", 100)
    made = log.Log()
    made.say("early")
    made.open(tmp_path / "log.txt", append=False)
    for _ in range(50):
        made.say("x" * 9)
    made.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("early\n") and len(text) <= 100
    assert capsys.readouterr().out.count("xxx\n") == 50


@pytest.mark.parametrize("argv", [[], ["--device", "cpu"]])
def test_with_nothing_to_measure_on_it_says_so(argv, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert program.main(argv) == 2
    assert "--tiny" in capsys.readouterr().err


def test_without_git_the_commit_is_what_a_file_or_the_caller_says(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "COMMIT", tmp_path / "COMMIT")
    assert environment.git_commit() is None
    (tmp_path / "COMMIT").write_text("abc\n")
    assert environment.git_commit() == "abc"
    assert environment_section.run(tiny_bench(results={"options": {"commit": "given"}}))["commit"] == "given"


def test_a_table_that_cannot_be_made_does_not_take_the_others_along(tmp_path, monkeypatch):
    def breaks(results):
        raise RuntimeError("out of ink")

    instead(monkeypatch, environment=ENVIRONMENT, ceilings=PART + "part({'copy': {'tb_per_s': 2.0}}, True)")
    monkeypatch.setattr(tables, "markdown", breaks)
    monkeypatch.setattr(plots, "draw", lambda results, path: path.write_text("a picture") and "")
    assert program.main([*SKIP, "--only", "ceilings", "--out", str(tmp_path)]) == 1
    found = read(tmp_path)
    assert "unfinished" not in found and found["failed"] == ["write-up: table.md: RuntimeError: out of ink"]
    assert (tmp_path / "pictures.png").exists()


# --- the tests first


MIXED = """
import os, time, pytest
def test_fine(): pass
def test_wrong(): assert 1 == 2, "so it is"
@pytest.mark.skip
def test_skipped(): pass
def test_dies(): os._exit(11)
@pytest.mark.parametrize("i", range(3))
def test_after_it(i): pass
"""


def outcome(tmp_path, paths, seconds=60.0, **more):
    said = []
    request = pytest_runs.Request(paths, seconds, tmp_path, "cpu", **more)
    return pytest_runs.run(request, said.append, lambda found: None), "\n".join(said)


def only_file(found):
    (state,) = found["files"].values()
    return state


def test_every_test_has_its_outcome_also_around_one_that_takes_its_process_along(tmp_path):
    found, said = outcome(tmp_path, [write(tmp_path, MIXED)], workers=2)
    assert only_file(found) == {"passed": 4, "failed": 2, "skipped": 1, "unfinished": 0}
    assert found["outcome"] == "failed" and "so it is" in said and "exit code 11" in said
    assert sorted(failure["test"].split("::")[1] for failure in found["failures"]) == ["test_dies", "test_wrong"]


def test_of_tests_that_take_too_long_those_that_passed_count(tmp_path):
    text = "import time\ndef test_fine(): pass\ndef test_slow(): time.sleep(60)\ndef test_late(): pass"
    slow, quick = write(tmp_path, text), write(tmp_path, "def test_fine(): pass", "test_quick.py")
    found, _ = outcome(tmp_path, [quick, slow], seconds=6.0)
    assert {**FINE, "unfinished": 2} in found["files"].values() and FINE in found["files"].values()
    assert found["outcome"] == "unfinished"
    assert [test.split("::")[1] for test in found["running when time ran out"]] == ["test_slow"]


@pytest.mark.parametrize("text", ["import nothing_of_that_name", None], ids=["a broken file", "no file"])
def test_a_file_that_cannot_be_run_is_a_failure_and_the_others_run(tmp_path, text):
    fine = write(tmp_path, "def test_fine(): pass", "test_fine.py")
    bad = str(tmp_path / "test_nowhere.py") if text is None else write(tmp_path, text)
    found, _ = outcome(tmp_path, [bad, fine])
    assert found["outcome"] == "failed" and found["passed"] == 1
    assert [Path(failure["test"]).name for failure in found["failures"]] == [Path(bad).name]


POISON = """
import pytest
from benchmarks.gpu import recorder
def test_illegal_address(monkeypatch):
    recorder.poisoned = lambda: True
    assert False
def test_the_next_one(): pass
"""


def test_a_process_whose_gpu_is_lost_is_replaced(tmp_path):
    found, _ = outcome(tmp_path, [write(tmp_path, POISON)])
    assert only_file(found) == {**FINE, "failed": 1}


def test_tests_in_red_or_not_run_leave_out_what_they_are_about():
    files = {file: dict(FINE) for file in ORDER}
    results = {"correctness": {"files": files}}
    assert not untested(results, REALLOCATION)
    files["tests/kernels/test_shrink.py"]["failed"] = 2
    files["tests/kernels/test_gated_linear.py"]["unfinished"] = 1
    assert "2 in tests/kernels/test_shrink.py" in untested(results, LAYER)
    assert "1 tests in tests/kernels/test_gated_linear.py" in untested(results, KERNELS["expand"])
    assert not untested(results, KERNELS["input_backward"])
    del files["tests/kernels/test_gate_step.py"]
    assert untested(results, KERNELS["adaptive_gate_step"]).startswith("untested")
    assert untested({}, LAYER) and not untested({"correctness": "skipped"}, LAYER)
    assert not untested({}, KERNELS["reference_forward"])


def test_every_test_file_that_a_figure_hangs_on_is_there():
    assert all((ROOT / file).exists() for file in ORDER)
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    without_gpu = {f"tests/kernels/test_{stem}.py" for stem in ("ops", "plain", "compiled")}
    assert kernels - without_gpu <= set(ORDER)
    needed = {*AUGMENT, *REALLOCATION, *(file for files in KERNELS.values() for file in files)}
    assert needed <= set(ORDER)


def test_without_a_green_test_nothing_of_ours_is_timed_and_the_competitors_are(monkeypatch):
    files = {file: {**FINE, "failed": 1} for file in ORDER}
    failures = [{"test": "test_shrink.py::test_it", "why": ""}]
    red = {"outcome": "failed", **FINE, "failed": len(files), "files": files, "failures": failures}
    given = tiny_bench(results={"correctness": red}, budget=timing.Budget(100))
    chosen = ("frozen", "Unsloth-style", "ours", "ours, aug")
    monkeypatch.setattr(providers, "PROVIDERS", {name: providers.PROVIDERS[name] for name in chosen})
    for section, measure in child.SECTIONS.items():
        if section != "environment":
            given.results[section] = measure(given)
    found = given.results
    for layers in found["linears"]["tables"]:
        assert [row["provider"] for row in layers["rows"]] == ["frozen", "Unsloth-style"]
        assert all(layers["left_out"][name].startswith("its tests fail") for name in ("ours", "ours, aug"))
    assert {row["name"] for row in found["kernels"]["rows"]} == {"torch: adapter forward"}
    for model in found["step"]["tables"]:
        assert model["rows"] and not any(row["provider"].startswith("ours") for row in model["rows"])
    assert "ranks_moved" not in found["reallocation"] and found["ceilings"]["products"]
    assert not given.failed
    text = tables.markdown(found)
    assert f"**Kernel tests before: {len(files)} failed" in text and "- failed: test_shrink.py::test_it" in text
    assert "Left out: ours: its tests fail" in text and "Left out: shrink" in text


def test_skipped_tests_are_said_in_the_results(tmp_path, monkeypatch):
    instead(monkeypatch, environment=ENVIRONMENT, ceilings=PART + "part({}, True)")
    assert program.main([*SKIP, "--only", "ceilings", "--out", str(tmp_path)]) == 0
    assert read(tmp_path)["correctness"] == "skipped"
    assert "The kernel tests were skipped" in (tmp_path / "table.md").read_text()
