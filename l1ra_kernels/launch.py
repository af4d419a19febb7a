"""Kernel launches. All of them can be intercepted with :func:`redirected`, e.g. to count them.

Triton's own launch (``kernel[grid](...)``) inspects every argument to find the compiled kernel, which takes the host
longer than all the rest of a small layer. A :class:`PreparedLaunch` does that once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton.runtime import driver
except ImportError:
    triton = driver = None

__all__ = ["PreparedLaunch", "launch", "on_device", "redirected"]

_instead: Callable[..., None] | None = None


def on_device(device: torch.device) -> AbstractContextManager:
    """A context manager in which kernels are launched on ``device``.

    Triton launches on the current device, whatever the devices of the arguments are.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)``; do nothing if the grid is empty."""
    if all(grid):
        if _instead is None:
            kernel[grid](*args, **meta)
        else:
            _instead(kernel, grid, *args, **meta)


# The first and the last version of Triton in which a compiled kernel is run as in _runner.
KNOWN = ((3, 6), (3, 9))


def _runner(compiled: Any, grid: tuple[int, ...], fixed: tuple) -> Callable[..., None]:
    """What ``compiled[grid](*tensors, *fixed)`` does in Triton, but metadata are only made for hooks that are there."""
    first, last = KNOWN
    if not first <= tuple(map(int, triton.__version__.split(".")[:2])) <= last:
        return lambda *tensors: compiled[grid](*tensors, *fixed)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream
    knobs, (x, y, z) = triton.knobs.runtime, grid
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    entering, leaving = (getattr(chain, "calls", [chain]) for chain in (enter, leave))  # of a profiler

    def direct(*tensors: Any) -> None:
        replaced = knobs.launch_enter_hook is not enter or knobs.launch_exit_hook is not leave
        if replaced or entering or leaving:
            compiled[grid](*tensors, *fixed)
        else:
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *tensors, *fixed)

    return direct


class _Compiled:
    """A kernel that Triton has compiled for one kind of arguments.

    Attributes:
        kernel: None before the first launch, and always in the interpreter.
        warm: architecture -> the kernel compiled for it without being launched, see ``PreparedLaunch.warmup``.
    """

    __slots__ = ("kernel", "warm")

    def __init__(self) -> None:
        self.kernel: Any = None
        self.warm: dict[Any, Any] = {}


# What Triton would compile one kernel for -> the compiled kernel. Launches that differ in sizes only share it.
_compiled: dict[Hashable, _Compiled] = {}


class PreparedLaunch:
    """A launch that is repeated with other tensors of the same kind: grid, numbers and constants are fixed.

    It has the attributes of a kernel that code for :func:`redirected` uses: ``fn``, ``warmup`` and ``[grid]``.
    """

    __slots__ = ("_compiled", "_fixed", "_run", "grid", "kernel", "meta", "numbers")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], meta: dict[str, Any], kind: Hashable
    ) -> None:
        """
        Args:
            kernel: a ``triton.jit`` function, whose parameters are tensors, then numbers, then constants.
            grid: number of programs, up to three dimensions. If it is empty, calls do nothing.
            numbers: values of its numeric parameters.
            meta: its constants by name, and options of the compiler such as ``num_warps``.
            kind: the same for any two launches whose tensors agree in device, dtype, and divisibility of the address
                by 16. Triton compiles a kernel for these properties.
        """
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.meta = meta
        # In the order of the kernel's parameters. Options of the compiler come last and are no parameters.
        self._fixed = (*numbers, *(value for name, value in meta.items() if name.isupper()))
        self._run: Callable[..., None] | None = None
        specialised = tuple((n == 1, n % 16 == 0, n > 2**31 - 1) for n in numbers if isinstance(n, int))
        key = (kernel, kind, specialised, tuple(meta.items()))
        self._compiled = _compiled.setdefault(key, _Compiled())

    def __call__(self, *tensors: Tensor) -> None:
        """Launch the kernel with these tensors."""
        if _instead is None and self._run is not None:
            self._run(*tensors)
        elif 0 in self.grid:
            return
        elif _instead is not None:
            _instead(self, self.grid, *tensors, *self.numbers, **self.meta)
        elif self._compiled.kernel is None:
            self._compiled.kernel = self.kernel[self.grid](*tensors, *self.numbers, **self.meta)
        else:
            self._run = _runner(self._compiled.kernel, self.grid, self._fixed)
            self._run(*tensors)

    @property
    def fn(self) -> Any:
        """The Python function of the kernel."""
        return self.kernel.fn

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.kernel[grid]

    def warmup(self, *args: Any, grid: tuple[int, ...], **meta: Any) -> Any:
        """The compiled kernel, which is compiled if it has not been, but not launched."""
        target, warm = driver.active.get_current_target().arch, self._compiled.warm
        if target not in warm:
            warm[target] = self.kernel.warmup(*args, grid=grid, **meta)
        return warm[target]


@contextmanager
def redirected(instead: Callable[..., None]) -> Iterator[None]:
    """A context manager in which ``instead(kernel, grid, *args, **meta)`` is called in place of each launch."""
    global _instead
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before
