"""Prepared launches: bound once, then launched directly; which of them may share a compiled kernel."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SINGLE, case, kernels, results

from benchmarks.every_launch import Kind, Problem, call, problems
from l1ra_kernels import launch as launching
from l1ra_kernels import plans
from l1ra_kernels.launch import PreparedLaunch, redirected

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """Stands in for a Triton kernel, and for what it compiles; writes down how it is launched."""

    def __init__(self, compiles=True):
        self.compiles, self.log = compiles, []

    def __getitem__(self, grid):
        def launch(*args, **meta):
            self.log.append(("bound", grid, args, meta))
            return Compiled(self.log) if self.compiles else None

        return launch


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, log):
        self.log = log

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args):
        assert (function, metadata) == ("function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        self.log.append(("direct", (x, y, z), args))

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("hooked", grid, args))


class Driver:
    class active:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch, request):
    if "Kernel" in inspect.getsource(request.function):
        monkeypatch.setattr(launching, "driver", Driver)


META = {"R": 16, "NEEDS_D": True, "num_warps": 4}


def prepared(kernel, grid=(3,), numbers=(5, 0.5), kind="bf16", **meta):
    return PreparedLaunch(kernel, grid, numbers, {**META, **meta}, kind)


def test_the_second_launch_is_direct_with_all_arguments_in_order():
    kernel = Kernel()
    launch = prepared(kernel)
    launch("x", "y")
    launch("u", "v")
    assert kernel.log == [
        ("bound", (3, 1, 1), ("x", "y", 5, 0.5), META),
        ("direct", (3, 1, 1), ("u", "v", 5, 0.5, 16, True)),
    ]


def test_a_profilers_hook_sees_the_launches(monkeypatch):
    kernel = Kernel()
    launch = prepared(kernel)
    launch("x")
    chain = launching.triton.knobs.runtime.launch_exit_hook
    hook = lambda metadata: None  # noqa: E731
    chain.add(hook)
    try:
        launch("y")
    finally:
        chain.remove(hook)
    launch("z")
    assert [how for how, *_ in kernel.log] == ["bound", "hooked", "direct"]


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_hook_put_in_place_of_tritons_chain_sees_the_launches(when, monkeypatch):
    kernel = Kernel()
    launch = prepared(kernel)
    launch("x")
    if when == "between":
        launch("y")
    monkeypatch.setattr(launching.triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch("z")
    assert kernel.log[-1][0] == "hooked"


@pytest.mark.parametrize("version", ["3.3.1", "3.10.0", "4.0.0+git"])
def test_another_version_of_triton_runs_a_kernel_its_own_way(version, monkeypatch):
    monkeypatch.setattr(launching.triton, "__version__", version)
    kernel = Kernel()
    launch = prepared(kernel)
    launch("x")
    launch("y")
    assert kernel.log[1] == ("hooked", (3, 1, 1), ("y", 5, 0.5, 16, True))


def test_a_compiled_kernel_is_run_as_this_triton_runs_it():
    """The order of arguments in _runner is that in Triton's own source."""
    source = inspect.getsource(launching.triton.compiler.CompiledKernel.__getitem__)
    own = "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata,"
    assert own in " ".join(source.split())
    assert "launch_enter_hook, knobs.runtime.launch_exit_hook, *args)" in " ".join(source.split())


def test_where_nothing_is_compiled_as_in_the_interpreter_each_launch_is_bound():
    kernel = Kernel(compiles=False)
    launch = prepared(kernel)
    for _ in range(3):
        launch("x")
    assert [how for how, *_ in kernel.log] == ["bound"] * 3


def test_an_empty_grid_launches_nothing():
    kernel = Kernel()
    prepared(kernel, grid=(4, 0))("x")
    with redirected(lambda *args, **meta: kernel.log.append(args)):
        prepared(kernel, grid=(0,))("x")
    assert not kernel.log


@pytest.mark.parametrize(
    "other, shares",
    [
        ({"grid": (7, 2)}, True),
        ({"numbers": (6, 0.25)}, True),
        ({"numbers": (1, 0.5)}, False),  # Triton compiles a kernel for the number 1 ...
        ({"numbers": (32, 0.5)}, False),  # ... one for multiples of 16 ...
        ({"numbers": (2**31, 0.5)}, False),  # ... and one for numbers of 64 bits
        ({"kind": "fp16"}, False),
        ({"R": 32}, False),
        ({"num_warps": 8}, False),
    ],
)
def test_launches_share_a_compiled_kernel_unless_triton_would_compile_another(other, shares):
    kernel = Kernel()
    prepared(kernel)("x")
    prepared(kernel, **other)("x")
    assert kernel.log[1][0] == ("direct" if shares else "bound")


def test_every_launch_has_its_constants_in_the_order_of_the_kernels_parameters():
    seen = {}

    def instead(launch, grid, *args, **meta):
        seen[launch.fn.__name__] = (launch, args, meta)

    with redirected(instead):
        for problem in problems():
            call(problem)
    prepared = {name: found for name, found in seen.items() if isinstance(found[0], PreparedLaunch)}
    assert len(prepared) == 7
    for name, (launch, args, meta) in prepared.items():
        parameters = list(inspect.signature(launch.fn).parameters)
        constants = [key for key in meta if key.isupper()]
        assert parameters[len(args) :] == constants, name


def test_a_call_of_the_same_kind_decides_nothing_anew():
    one = case([3, 5], [47, 20], base="bias")
    results(one, kernels(one))
    before = [plan.cache_info().misses for plan in (plans.forward_plan, plans.backward_plan)]
    again = case([3, 5], [47, 20], base="bias")
    results(again, kernels(again))
    assert before == [plan.cache_info().misses for plan in (plans.forward_plan, plans.backward_plan)]


@pytest.mark.parametrize("other", [{"lead": (38,)}, {"ranks": [3, 4]}, {"base": "weight"}, {"dropout": 0.1}])
def test_a_call_of_another_kind_is_planned_for_itself(other):
    usual = {"ranks": [3, 5], "outs": [47, 20], "base": "bias"}
    one = case(**usual)
    results(one, kernels(one))
    before = plans.forward_plan.cache_info().misses
    another = case(**usual | other)
    results(another, kernels(another))
    assert plans.forward_plan.cache_info().misses == before + 1


def test_changed_processors_are_noticed(few_processors):
    first = plans.forward_plan.cache_info().misses
    kernels(case([3], [47], lead=(40,), dtypes=(SINGLE, SINGLE)))
    assert plans.forward_plan.cache_info().misses > first


def print_shared() -> None:
    """For each prepared kernel how many of Triton's own it shares; runs in a process with Triton's compiler."""
    from benchmarks.compiled import compiling_for
    from l1ra_kernels import gated_linear
    from l1ra_kernels.layer import Layer

    found: dict[int, set[int]] = {}

    def instead(launch, grid, *args, **meta):
        found.setdefault(id(launch._compiled), set()).add(id(launch.kernel.warmup(*args, grid=grid, **meta)))

    def shifted(*shape, dtype, by):
        """A tensor whose address is ``by`` elements behind a multiple of 16 bytes."""
        numel = torch.Size(shape).numel()
        return torch.zeros(numel + 16, dtype=dtype)[by : by + numel].view(shape)

    half = torch.bfloat16
    with compiling_for("sm_90"), redirected(instead), torch.no_grad():
        torch.Tensor.addmm_ = lambda self, *args: self
        for tokens, features, out, rank, by in (
            (64, 128, 256, 16, 0),
            (1, 128, 256, 5, 0),
            (64, 128, 256, 16, 1),
            (64, 136, 256, 1, 0),
            (64, 1, 1, 1, 0),
            (17, 128, 250, 16, 0),
            (1000, 128, 256, 9, 0),
        ):
            a, b = (shifted(rank, n, dtype=torch.float32, by=by) for n in (features, out))
            layers = [Layer(a, torch.ones(rank), b, s, torch.zeros(out, features, dtype=half)) for s in (1.0, 0.5)]
            x, dy = (shifted(tokens, n, dtype=half, by=by) for n in (features, out))
            _, hidden = gated_linear.forward(x, layers, half, 0.0, None)
            needs = [gated_linear.Needs(True, True, True)] * 2
            gated_linear.backward([dy, None], x, hidden, layers, True, needs, 0.0, None)
            gated_linear.backward([dy, dy], x, hidden, layers, True, needs, 0.0, None)
        for adapters in (torch.float32, half):  # dB and dA in another dtype, all else alike
            call(Problem("reduce_rows", Kind(half, adapters, half)))
    print(json.dumps([len(found), max(map(len, found.values()))]))


def test_what_shares_a_prepared_kernel_shares_tritons_too():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    environment.pop("TRITON_INTERPRET", None)
    program = "import test_launch; test_launch.print_shared()"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, most = json.loads(run.stdout.splitlines()[-1])
    assert count > 30 and most == 1
