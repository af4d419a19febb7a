"""No kernel reads or writes an element that no argument of its launch has: every address is looked at."""

import numpy as np
import pytest
import torch
from cases import DEVICE, SINGLE, case, kernels, results

from l1ra_kernels import choice
from l1ra_kernels.launch import redirected

pytestmark = pytest.mark.skipif(not choice.interpreting() or DEVICE != "cpu", reason="watches Triton's interpreter")


def elements(args):
    """The addresses of all elements of the tensors among ``args``, by element size."""
    found = {}
    for arg in args:
        if isinstance(arg, tuple):
            for size, addresses in elements(arg).items():
                found.setdefault(size, []).extend(addresses)
        elif isinstance(arg, torch.Tensor):
            address = np.array(arg.data_ptr())
            for n, stride in zip(arg.shape, arg.stride(), strict=True):
                address = np.add.outer(address, np.arange(n) * stride * arg.element_size())
            found.setdefault(arg.element_size(), []).append(address.ravel())
    return found


class Watched:
    """The memory of the interpreter, which lets nobody touch what is not in ``allowed``."""

    def __init__(self, memory):
        self.memory, self.allowed, self.seen = memory, {}, 0  # allowed: element size -> sorted addresses

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def _look(self, pointers, mask, size):
        touched = np.broadcast_to(pointers, np.shape(mask))[mask].astype(np.int64)
        self.seen += touched.size
        allowed = self.allowed.get(size, np.zeros(1, np.int64))
        nearest = allowed[np.searchsorted(allowed, touched).clip(max=len(allowed) - 1)]
        assert (nearest == touched).all(), "an address outside of all arguments"

    def load(self, pointers, mask, other, dtype):
        self._look(pointers, mask, np.dtype(dtype).itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._look(pointers, mask, values.dtype.itemsize)
        return self.memory.store(pointers, values, mask)


@pytest.fixture
def watch(monkeypatch):
    """Launches for ``redirected``, each watched."""
    from triton.runtime import interpreter

    if not hasattr(getattr(interpreter, "_interpreter", None), "load"):
        pytest.skip("this triton's interpreter has its memory elsewhere")
    memory = Watched(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", memory)

    def launch(kernel, grid, *args, **meta):
        memory.allowed = {size: np.unique(np.concatenate(addresses)) for size, addresses in elements(args).items()}
        kernel[grid](*args, **meta)

    launch.memory = memory
    return launch


def test_an_element_too_many_is_noticed(watch):
    one = case(dtypes=(SINGLE, SINGLE))

    def short(kernel, grid, *args, **meta):
        """Launches with an x that ends one element earlier."""
        x = args[0].flatten()[:-1]
        watch(kernel, grid, x, *args[1:], **meta)

    with pytest.raises(Exception, match="outside of all arguments"), redirected(short):
        kernels(one)


@pytest.mark.parametrize(
    "ranks, options",
    [
        ((5,), {"base": "bias"}),
        ((5,), {"base": "output", "dropout": 0.3}),
        ((20, 3), {"lead": (70,), "features": 130, "dtypes": (SINGLE, SINGLE)}),
        ((140,), {"base": "bias"}),
        ((0, 4), {}),
    ],
)
def test_every_address_is_that_of_an_element_of_an_argument(ranks, options, watch, few_processors):
    one = case(ranks, (150, 47)[: len(ranks)], **options)
    with redirected(watch):
        results(one, kernels(one))
    assert watch.memory.seen > 10_000
