"""Records of runs: none is lost or half there, whoever writes; and the committed pages are made from committed ones."""

import subprocess
import sys
import time

import pytest

from benchmarks.common.files import RESULTS, ROOT
from benchmarks.common.records import RecordStore
from benchmarks.planted import runs as planted
from benchmarks.planted import tables as planted_tables

KEYS = ("task", "seed", "rate")


def record(seed, rate=None, task="words", **more):
    return {"task": task, "seed": seed, "rate": rate, "loss": 0.1 + seed, "name": "gl\u00f6\u2028ss", **more}


def test_rows_are_sorted_and_come_back_as_they_were(tmp_path):
    store = RecordStore(tmp_path / "new", KEYS)
    assert store.read_all() == [] and store.get("words", 0, None) is None
    added = [record(10), record(2, 1e-3), record(2), record(0, 1 / 3, "posts"), record(2, 2e-3)]
    for each in added:
        store.add(each)
    assert store.read_all() == [added[3], added[2], added[1], added[4], added[0]]
    assert store.get("words", 2, 1e-3) == added[1]
    assert sorted(file.name for file in store.folder.iterdir()) == ["posts.jsonl", "words.jsonl"]
    assert len((store.folder / "words.jsonl").read_text().split("\n")) == 4 + 1
    again = {**added[1], "loss": 0.5}
    store.add(again)
    assert store.get("words", 2, 1e-3) == again and len(store.read_all()) == 5


def test_pandas_reads_them(tmp_path):
    pandas = pytest.importorskip("pandas")
    store = RecordStore(tmp_path, KEYS)
    for seed in range(3):
        store.add(record(seed))
    assert pandas.read_json(tmp_path / "words.jsonl", lines=True)["loss"].tolist() == pytest.approx([0.1, 1.1, 2.1])


ADD_MANY = """
for seed in range(first, 40, 2):
    RecordStore(folder, keys).add({"task": "words", "seed": seed, "rate": None, "text": "x" * 2000})
"""
STOP_WHILE_ADDING = """
import pathlib, time
pathlib.Path.replace = lambda *paths: time.sleep(60)
RecordStore(folder, keys).add({"task": "words", "seed": first, "rate": None})
"""


def writer(program, folder, first):
    """A process that runs ``program``."""
    names = f"from pathlib import Path\nfolder, keys, first = Path({str(folder)!r}), {KEYS!r}, {first}\n"
    text = f"from benchmarks.common.records import RecordStore\n{names}{program}"
    return subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)


def test_two_processes_lose_none_of_their_records_and_a_reader_finds_whole_ones(tmp_path):
    writers = [writer(ADD_MANY, tmp_path, first) for first in (0, 1)]
    store, counts = RecordStore(tmp_path, KEYS), []
    while any(process.poll() is None for process in writers):
        counts.append(len(store.read_all()))  # raises if a row is not whole
    assert [process.returncode for process in writers] == [0, 0]
    assert counts == sorted(counts)
    assert [found["seed"] for found in store.read_all()] == list(range(40))


def test_a_process_that_is_killed_while_it_writes_leaves_the_earlier_records_and_no_lock(tmp_path):
    store = RecordStore(tmp_path, KEYS)
    store.add(record(0))
    process = writer(STOP_WHILE_ADDING, tmp_path, 1)
    while len(list(tmp_path.iterdir())) < 2:  # the temporary file
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert store.read_all() == [record(0)]
    store.add(record(2))
    assert [found["seed"] for found in store.read_all()] == [0, 2]


# --- committed pages


def difference(made, committed):
    """The first lines that differ, for a short message."""
    pairs = zip(made.split("\n"), committed.split("\n"), strict=False)
    return next(((a, b) for a, b in pairs if a != b), None if made == committed else "one is longer")


def test_the_committed_page_of_planted_ranks_says_what_its_records_say():
    pytest.importorskip("scipy")
    found = planted.store(RESULTS / "planted").read_all()
    assert len(found) >= 350
    page = (RESULTS / "planted" / "planted.md").read_text(encoding="utf-8")
    assert difference(planted_tables.markdown(found), page) is None
    found[0] = {**found[0], "error": 2 * found[0]["error"]}
    assert difference(planted_tables.markdown(found), page) is not None


def test_the_committed_page_of_quality_says_what_its_records_say():
    pytest.importorskip("scipy")
    pytest.importorskip("peft")
    from benchmarks.quality.analysis import Results
    from benchmarks.quality.methods import METHODS
    from benchmarks.quality.runs import TUNING_SEED, store
    from benchmarks.quality.tables import markdown

    found = store(RESULTS / "quality").read_all()
    assert len(found) >= 588
    page = (RESULTS / "quality" / "quality.md").read_text(encoding="utf-8")
    commands = (RESULTS / "quality" / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert difference(markdown(Results(found, METHODS), commands), page) is None
    for number in (next(i for i, r in enumerate(found) if (r["seed"] == TUNING_SEED) == tries) for tries in (0, 1)):
        changed = {**found[number], "test_loss": 9.0, "validation_loss": 9.0}
        others = [*found[:number], changed, *found[number + 1 :]]
        assert difference(markdown(Results(others, METHODS), commands), page) is not None
