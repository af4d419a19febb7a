"""The table of what the controller costs."""

import sys

from benchmarks import step_operations


def test_it_has_each_kind_of_step_and_the_planning(monkeypatch, capsys):
    arguments = ["--adapters", "3", "--planned", "20", "30", "--intervals", "3"]
    monkeypatch.setattr(sys, "argv", ["step_operations", *arguments])
    step_operations.main()
    head, steps, seconds = capsys.readouterr().out.strip().split("\n\n")
    assert "torch" in head
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in steps.splitlines()[2:]]
    assert [row[0] for row in rows] == ["plain", "probing", "middle", "reallocation"] * 2
    assert all(int(operations) > 10 and int(reads) < 60 and float(ms) > 0 for *_, operations, reads, ms in rows)
    assert "20 adapters" in seconds and "allocate" in seconds and "GateBank" in seconds
