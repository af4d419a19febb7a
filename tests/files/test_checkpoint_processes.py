"""Processes that are killed while they save, and processes that save at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import patched

import l1ra
from l1ra.files.checkpoint import read


def fresh():
    """The model as it was before it was patched."""
    torch.manual_seed(0)
    return l1ra.unpatch(patched()[0])


SAVE_FOR_EVER = """
import sys, torch, l1ra
sys.path.insert(0, sys.argv[2])
from helpers import patched
torch.manual_seed(0)
_, controller, *_ = patched()
while True:
    controller.steps += 1
    controller.save(sys.argv[1])
    print(controller.steps, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint_and_what_it_left_is_cleared(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(root / "tests")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        said = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        said += map(int, process.stdout.read().split())
    controller = l1ra.load(fresh(), tmp_path)
    assert said[-1] <= controller.steps <= said[-1] + 1
    (tmp_path / "adapters-0123456789abcdef.safetensors.77.partial").write_bytes(b"left")
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    controller.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


SAVE_TOGETHER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from helpers import patched
from l1ra.files.checkpoint import read
torch.manual_seed(0)
_, controller, *_ = patched()
folder = Path(sys.argv[1])
for turn in range(40):
    controller.steps += 1
    controller.gates()
    print(turn, flush=True)
    sys.stdin.readline()
    controller.save(folder)
print("done", flush=True)
"""


def test_processes_that_save_into_one_folder_at_once_leave_a_whole_checkpoint(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", SAVE_TOGETHER, str(tmp_path), str(root / "tests")]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen(command, env=environment, **streams) for _ in range(2)]
    for turn in range(40):
        assert [process.stdout.readline() for process in pair] == [f"{turn}\n"] * 2
        if turn:
            read(tmp_path)
        for process in pair:
            process.stdin.write("\n")
            process.stdin.flush()
    assert [process.communicate()[0] for process in pair] == ["done\n"] * 2
    assert l1ra.load(fresh(), tmp_path).steps == 40
    assert not list(tmp_path.glob("*.partial"))
