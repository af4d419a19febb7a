"""Files that are whole or not there: written under another name, then renamed; and tensors ready to be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PARTIAL_SUFFIX", "atomic_write", "cpu_copy"]

PARTIAL_SUFFIX = r"\.\d+\.partial"  # what is added to the name of a file that is being written


@contextmanager
def atomic_write(*files: Path) -> Iterator[list[Path]]:
    """Paths to write to; what is written there takes the place of ``files`` when the block has ended.

    If it ends in an error, nothing has changed. Of several files the last is the one without which nobody reads the
    others: it is taken away before the first one is replaced and comes last, so that a process that is killed in
    between leaves no mixture of old and new that could be read.
    """
    asides = [file.with_name(f"{file.name}.{os.getpid()}.partial") for file in files]
    try:
        yield asides
        for aside in asides:
            with open(aside, "rb+") as stream:
                os.fsync(stream.fileno())
        if len(files) > 1:
            files[-1].unlink(missing_ok=True)
        for aside, file in zip(asides, files, strict=True):
            os.replace(aside, file)
    except OSError as error:
        if error.filename is None:  # a disk that is full does not say which
            error.filename = str(files[0].parent)
        raise
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous, in a memory of its own: what safetensors asks for."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
