"""Atomic file writes (write under a temporary name, then rename), and tensors as safetensors stores them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PARTIAL_SUFFIX", "atomic_write", "cpu_copy"]

PARTIAL_SUFFIX = r"\.\d+\.partial"  # regular expression of the suffix of files that are being written


@contextmanager
def atomic_write(*files: Path) -> Iterator[list[Path]]:
    """Replace ``files`` when the block ends without an error. If it ends with an error, ``files`` stay unchanged.

    If there are several files, readers must need the last one to find the others. It is deleted before the others are
    replaced, and replaced last. A process that is killed in between then leaves no readable mixture of old and new
    files.

    Yields:
        The paths to write to, one for each of ``files``.
    """
    partial_files = [file.with_name(f"{file.name}.{os.getpid()}.partial") for file in files]
    try:
        yield partial_files
        for partial_file in partial_files:
            with open(partial_file, "rb+") as stream:
                os.fsync(stream.fileno())
        if len(files) > 1:
            files[-1].unlink(missing_ok=True)
        for partial_file, file in zip(partial_files, files, strict=True):
            os.replace(partial_file, file)
    except OSError as error:
        if error.filename is None:  # e.g. the error of a full disk has no file name
            error.filename = str(files[0].parent)
        raise
    finally:
        for partial_file in partial_files:
            partial_file.unlink(missing_ok=True)


def cpu_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with its own storage, which safetensors requires."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
