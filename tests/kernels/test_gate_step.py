"""One launch moves all gates: the kernels against their twins in plain torch, and both against float64."""

import math

import pytest
import torch
from helpers import patched, step

from l1ra_kernels import choice, dispatch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter
SIZES = [1, 7, 1025, 2048]
ADAM = {"lr": 0.02, "l1": 1e-3, "l2": 0.1}
ADAPTIVE = {"lr": 0.02, "l1": 1.0, "horizon": 10.0}
OPS = {"adam": ("adam_gate_step", ADAM), "adaptive": ("adaptive_gate_step", ADAPTIVE)}


@pytest.fixture(params=["torch", "fused"])
def ops(request):
    """The public ops, by each implementation in turn."""
    if request.param == "fused" and not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    with choice.using(request.param):
        yield dispatch


def state(name, size, scale=1.0):
    """Gates of all ages, some at 0 and some at 1, as the op named takes them."""
    gate = torch.rand(size).where(torch.rand(size) > 0.2, torch.ones(())).where(torch.rand(size) > 0.2, torch.zeros(()))
    grad, age = torch.randn(size) * scale, torch.randint(0, 5000, (size,)).float().where(torch.rand(size) > 0.3, 3.0)
    skipped = torch.tensor(5)
    if name == "adam":
        tensors = gate, grad, torch.randn(size) * 0.1 * scale, torch.rand(size) * scale**2, age, skipped
    else:
        tensors = gate, grad, torch.rand(size) * scale**2, age, torch.rand(size) + 0.5, skipped
    return [tensor.to(DEVICE) for tensor in tensors]


def run(ops, name, tensors, seen=None, **changes):
    op, settings = OPS[name]
    return getattr(ops, op)(*tensors, seen, **{**settings, **changes})


def old_state(name, tensors):
    return [tensors[i] for i in ((0, 2, 3, 4, 5) if name == "adam" else (0, 2, 3, 5))]


def exact(name, tensors, seen=None, **changes):
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    return run(reference, name, wide, seen, **changes)


@pytest.mark.parametrize("scale, seen", [(1e-4, False), (1.0, True), (1e4, False)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_a_step_is_as_exact_as_plain_torch_in_float32(ops, name, size, scale, seen):
    tensors = state(name, size, scale)
    mask = torch.rand(size, device=DEVICE) < 0.7 if seen else None
    before = [t.clone() for t in tensors]
    new = run(ops, name, tensors, mask)
    plain = run(reference, name, tensors, mask)
    right = exact(name, tensors, mask)
    for mine, theirs, value in zip(new, plain, right, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        bound = (theirs.double() - value).abs().max() + 4e-7 * value.abs().max()
        assert (mine.double() - value).abs().max() <= bound
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_a_gate_is_pulled_up_by_one_and_pressed_down_by_its_weight(ops):
    gate = torch.tensor([0.5, 0.5, 0.5, 0.99, 0.01, 0.0], device=DEVICE)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0, 0.0], device=DEVICE)
    ones = torch.ones(6, device=DEVICE)
    tensors = [gate, ones * 2, ones, ones * 100, weight, torch.zeros((), dtype=torch.long, device=DEVICE)]
    new, importance_sq, age, _ = run(ops, "adaptive", tensors)
    torch.testing.assert_close(new, torch.tensor([0.52, 0.5, 0.48, 1.0, 0.0, 0.0], device=DEVICE))
    torch.testing.assert_close(importance_sq, 0.9 + 0.1 * (2 * gate).square())
    assert (age == 101).all()


def test_without_pressure_every_gate_that_lives_recovers(ops):
    tensors = state("adaptive", 300)
    new, *_ = run(ops, "adaptive", tensors, l1=0.0)
    assert torch.equal(new, torch.where(tensors[0] > 0, (tensors[0] + 0.02).clamp(max=1.0), tensors[0]))


@pytest.mark.parametrize("where, bad", [(0, math.nan), (1023, math.inf), (1024, -math.inf), (2499, -1e20)])
@pytest.mark.parametrize("name", OPS)
def test_one_gradient_whose_square_is_not_finite_stops_every_gate_and_is_counted(ops, name, bad, where):
    tensors = state(name, 2500)
    tensors[1][where] = bad
    *new, skipped = run(ops, name, tensors, torch.ones(2500, dtype=torch.bool, device=DEVICE))
    assert all(torch.equal(n, o) for n, o in zip(new, old_state(name, tensors)[:-1], strict=True))
    assert skipped.item() == 6 and skipped.shape == () and tensors[-1].item() == 5


@pytest.mark.parametrize("name", OPS)
def test_gates_without_a_gradient_keep_their_state(ops, name):
    tensors = state(name, 100)
    seen = torch.arange(100, device=DEVICE) % 3 == 0
    *new, skipped = run(ops, name, tensors, seen)
    *everything, _ = run(ops, name, tensors)
    for got, moved, old in zip(new, everything, old_state(name, tensors)[:-1], strict=True):
        assert torch.equal(got, torch.where(seen, moved, old))
    assert skipped.item() == 5


@pytest.mark.parametrize("name", OPS)
def test_every_element_of_the_new_state_is_written(ops, name, monkeypatch):
    empty_like = torch.empty_like
    poison = lambda t: empty_like(t).fill_(math.nan if t.is_floating_point() else -(2**40))  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", poison)
    for size in (1, 1025):
        for tensor in run(ops, name, state(name, size)):
            assert torch.isfinite(tensor).all() and (tensor >= -1).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_the_bias_correction_loses_no_digits_to_a_beta_close_to_one(ops, beta):
    """The first step of Adam is as long as the learning rate, whatever its betas: what is left is rounding."""
    age = torch.tensor([0.0, 1.0, 2.0, 9.0, 99.0, 999.0, 1e4, 1e6], device=DEVICE)
    zeros = torch.zeros(8, device=DEVICE)
    tensors = [zeros + 0.5, zeros + 1, zeros, zeros, age, torch.zeros((), dtype=torch.long, device=DEVICE)]
    gate, *_ = run(ops, "adam", tensors, betas=(beta, beta), lr=0.1, l1=0.0, l2=0.0)
    right, *_ = exact("adam", tensors, betas=(beta, beta), lr=0.1, l1=0.0, l2=0.0)
    # Plain torch rounds beta and its power to float32 before it takes the difference.
    rounding = 1e-6 if choice.wanted() == "fused" else 1e-6 + 1e-8 / (1 - beta)
    torch.testing.assert_close(gate, right.float(), rtol=rounding, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_a_step_is_one_launch(name, monkeypatch):
    if not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    from l1ra_kernels import gate_step

    launched = []
    launch = gate_step.launch
    monkeypatch.setattr(gate_step, "launch", lambda *a, **k: (launched.append(a[1]), launch(*a, **k)))
    with choice.using("fused"):
        run(dispatch, name, state(name, 1500))
    assert launched == [(2,)]


@pytest.mark.parametrize("rule", ["l1", "adaptive-l1"])
def test_a_training_goes_the_same_way_by_either_implementation(rule):
    if not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    ends = []
    for name in ("torch", "fused"):
        torch.manual_seed(0)
        # Every gate falls within an interval, at a pace of its own.
        settings = {"total_steps": 24, "interval": 4, "rule": rule, "gate_lr": 0.2, "l1_lambda": 2.0}
        model, controller, optimizer, x, y = patched(device=DEVICE, **settings)
        with choice.using(name):
            for _ in range(9):
                step(model, optimizer, x, y)
        ends.append((controller.ranks, controller.gates(), [p.detach() for p in model.parameters()]))
    assert any(entry["pruned"] for entry in controller.history)
    assert ends[0][0] == ends[1][0]
    wider = 1 if DEVICE == "cpu" else 10  # for the sums of a GPU, in nine steps
    for name, gates in ends[0][1].items():
        assert gates == pytest.approx(ends[1][1][name], abs=1e-5 * wider)
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-4 * wider, atol=1e-5 * wider)


def test_fused_kernels_are_refused_where_nothing_can_run_them(monkeypatch):
    monkeypatch.setattr(choice, "interpreting", lambda: False)
    rows = torch.ones(2, 2)
    with choice.using("fused"), pytest.raises(RuntimeError, match="choose 'auto'"):
        dispatch.move_rows_many([rows], [(0,)], [0.0])
    with choice.using("auto"):
        assert len(dispatch.move_rows_many([rows], [(0,)], [0.0])) == 1
