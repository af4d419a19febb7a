"""What every test starts from: one seed, one thread; without a GPU, Triton kernels in the interpreter."""

import os
from unittest import mock

import pytest
import torch

# Triton reads it when it is imported, which torch alone doesn't do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--every-circumstance", action="store_true", help="whole trainings under each circumstance with each model"
    )


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with mock.patch.dict(os.environ):  # where transformers' Trainer tells accelerate of bf16 and the compiler
        yield
