"""Fixtures of the kernels' tests: buffers that hold NaN until a kernel writes them, few processors.

The kernels run on a GPU, or without one in Triton's interpreter, which ``tests/conftest.py`` turns on before
triton is imported.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from l1ra_kernels import choice, configs

# Tests of ops that have a path in plain torch too; without triton these skip by themselves what needs it.
WITHOUT_TRITON = {"test_ops.py", "test_plain.py", "test_gate_step.py", "test_rank_compaction.py", "test_compiled.py"}
if not (choice.interpreting() or (choice.triton_available() and torch.cuda.is_available())):
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in WITHOUT_TRITON]

FENCE = 4096  # elements before and behind a poisoned buffer


class Poison:
    """``with poison:`` each buffer that l1ra_kernels allocates holds NaN and stands between two fences."""

    def __init__(self):
        self.buffers = []  # with its fences, and its number of elements

    @contextlib.contextmanager
    def __call__(self):
        self.buffers.clear()
        with pytest.MonkeyPatch.context() as patch:
            empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
            patch.setattr(torch, "empty", self._filled(empty))
            patch.setattr(torch, "empty_like", self._filled(empty_like))
            patch.setattr(torch.Tensor, "new_empty", self._filled(new_empty))
            yield self
        for buffer, numel in self.buffers:
            inside = slice(FENCE, FENCE + numel)
            assert buffer[inside].numel() == numel
            fences = torch.cat([buffer[:FENCE], buffer[FENCE + numel :]])
            assert (fences == 7).all(), "a kernel wrote outside of its buffer"

    def _filled(self, allocate):
        def call(*args, **kwargs):
            made = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("l1ra_kernels") or not made.is_floating_point() or not made.is_contiguous():
                return made
            buffer = torch.full((made.numel() + 2 * FENCE,), 7, dtype=made.dtype, device=made.device)
            buffer[FENCE : FENCE + made.numel()] = torch.nan
            self.buffers.append((buffer, made.numel()))
            return buffer[FENCE : FENCE + made.numel()].view(made.shape)

        return call


@pytest.fixture
def poison():
    return Poison()


@pytest.fixture
def few_processors(monkeypatch):
    """As if the device had one: so that a program walks down several blocks of tokens already in small cases."""
    monkeypatch.setattr(configs, "processors", lambda device: 1)
