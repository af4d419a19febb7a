"""Optimizers of other libraries: 8-bit states, averages of the parameters, tensors of types of their own."""

import warnings

import pytest
import torch
from helpers import BRISK, Residual, play, same_bits, step, task, trainable
from optimizer_helpers import move_state
from torch import nn

import l1ra
from l1ra import L1RALinear, RankController
from l1ra.allocation.plan import LayerPlan
from l1ra.training.optimizer_state import scale_states
from l1ra.training.principal_axes import rotate_to_principal_axes
from l1ra.training.quantised_state import read_values

LR = 1e-3


def trained(make):
    """The losses before and after a training in which ranks move and are turned, and the ranks; no warning passes."""
    torch.manual_seed(0)
    model = Residual(64)
    x, y = task(model, batch=32)
    controller = l1ra.patch(model, 32, **BRISK)
    optimizer, losses = make(trainable(model)), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Paged optimizers")
        for _ in range(60):
            getattr(optimizer, "train", bool)()  # as schedule-free wants it
            losses.append(step(model, optimizer, x, y).item())
    assert controller.moved > 0
    return losses[0], losses[-1], controller.ranks


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").optim


@pytest.fixture(scope="module")
def adamw():
    return trained(lambda p: torch.optim.AdamW(p, lr=LR))


def test_small_states_of_bitsandbytes_are_float32_ones_of_other_names(bnb, adamw):
    """``state2`` holds squares: turned as if it were a momentum, it gave NaN."""
    _, loss, ranks = trained(lambda p: bnb.AdamW8bit(p, lr=LR, min_8bit_size=4096))
    assert loss == pytest.approx(adamw[1], rel=1e-4) and ranks == adamw[2]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_8_bits_of_adamw_go_nearly_where_32_go(name, bnb, adamw):
    first, loss, _ = trained(lambda p: getattr(bnb, name)(p, lr=LR, min_8bit_size=0))
    assert loss == pytest.approx(adamw[1], abs=0.01 * first)


@pytest.mark.parametrize("name", ["RMSprop", "Lion"])  # one state, of squares or of a momentum, under the same name
def test_8_bits_of_other_optimizers_go_nearly_where_32_go(name, bnb):
    first, expected, _ = trained(lambda p: getattr(bnb, name)(p, lr=LR))
    _, loss, _ = trained(lambda p: getattr(bnb, f"{name}8bit")(p, lr=LR, min_8bit_size=0))
    assert loss == pytest.approx(expected, abs=0.01 * first)


def eight_bits(bnb, width):
    """A parameter of six rows of very different sizes, after three steps."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, width))
    optimizer = bnb.AdamW8bit([param], lr=LR, min_8bit_size=0)
    for _ in range(3):
        param.grad = torch.randn(6, width) * torch.logspace(-3, 3, 6).unsqueeze(1)
        optimizer.step()
    state = optimizer.state[param]
    return param, optimizer, {name: read_values(state, name).clone() for name in ("state1", "state2")}


def assert_rounded(values, expected):
    """Rounded once: to within half of the widest gap, 0.7 % of the largest number of the block."""
    padded = nn.functional.pad(expected.flatten(), (0, -expected.numel() % 256)).view(-1, 256)
    largest = padded.abs().amax(1, keepdim=True).expand_as(padded).flatten()[: expected.numel()]
    assert ((values - expected).abs().flatten() <= 0.0071 * largest).all()


@pytest.mark.parametrize("width", [512, 100])  # blocks of 256 end with a row, or don't
@pytest.mark.parametrize("plan", [LayerPlan((0, 2, 3, 5), 3), LayerPlan((1, 4, 5), 3)], ids=["grows", "same size"])
def test_8_bit_states_move_with_their_rows(plan, width, bnb):
    param, optimizer, before = eight_bits(bnb, width)
    state, kept = optimizer.state[param], list(plan.keep)
    with torch.no_grad():
        param.grad = None
        param.set_(torch.randn(plan.rank, width))
    move_state(optimizer, param, plan, torch.Size((6, width)))
    for name, old in before.items():
        assert_rounded(read_values(state, name), torch.cat([old[kept], torch.zeros(plan.grow, width)]))
        assert state[name].dtype == torch.uint8
    param.grad = torch.randn(plan.rank, width)
    optimizer.step()
    assert state["step"] == 4 and param.isfinite().all()


def test_8_bit_states_are_scaled(bnb):
    param, optimizer, before = eight_bits(bnb, 100)
    scale_states([optimizer], {param: 0.3})
    for name, factor in (("state1", 0.3), ("state2", 0.3**2)):
        assert_rounded(read_values(optimizer.state[param], name), factor * before[name])


def before_a_reallocation(make, moves=True):
    """Two adapters of rank 16, of which the second gives two to the first at the third step, or none."""
    torch.manual_seed(0)
    model = nn.Sequential(*(L1RALinear(320, 320, rank=16, scale_with_rank=False) for _ in range(2)))
    controller = RankController(model, 32, total_steps=100, interval=3, warmup=0.0, principal_axes=False)
    play(controller, {3: [[1.0] * 16, [0.0, 0.0, *[1.0] * 14] if moves else [1.0] * 16]})
    optimizer = make(trainable(model))
    return model, optimizer, torch.randn(8, 320), torch.randn(8, 320)


@pytest.fixture
def low_bit():
    """torchao's, without the compiler that it calls for each step."""
    optimizers = pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        yield optimizers


def test_tensors_of_a_type_of_their_own_start_anew_with_a_warning(low_bit):
    model, optimizer, x, y = before_a_reallocation(lambda p: low_bit.AdamW8bit(p, lr=LR))
    for _ in range(2):
        step(model, optimizer, x, y)
    with pytest.warns(UserWarning, match="keeps 'exp_avg', an OptimState8bit of shape .* starts anew"):
        step(model, optimizer, x, y)
    assert [layer.rank for layer in model] == [18, 14] and not optimizer.state[model[0].lora_A]
    before = model[0].lora_A.detach().clone()
    step(model, optimizer, x, y)
    assert optimizer.state[model[0].lora_A]["exp_avg"].shape == model[0].lora_A.shape
    assert not torch.equal(model[0].lora_A, before) and model[0].lora_A.isfinite().all()


def test_tensors_of_a_type_of_their_own_are_not_turned(low_bit):
    model, optimizer, x, y = before_a_reallocation(lambda p: low_bit.AdamW8bit(p, lr=LR))
    step(model, optimizer, x, y)
    rows = [layer.lora_A.detach().clone() for layer in model]
    assert rotate_to_principal_axes([(layer, range(16)) for layer in model], [optimizer]) == [None, None]
    assert all(same_bits(layer.lora_A, old) for layer, old in zip(model, rows, strict=True))


# --- schedule-free

SCHEDULE_FREE = {
    "AdamWScheduleFree": {"lr": 1e-2},
    "AdamWScheduleFree one by one": {"lr": 1e-2, "foreach": False},
    "RAdamScheduleFree": {"lr": 1e-2},
    "SGDScheduleFree": {"lr": 0.3},
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_averages_of_schedule_free_move_with_the_rows(name):
    """What is evaluated are averages x, made of the trained parameters y and the state z."""
    make = getattr(pytest.importorskip("schedulefree"), name.split()[0])

    def run(moves):
        model, optimizer, x, y = before_a_reallocation(lambda p: make(p, **SCHEDULE_FREE[name]), moves)
        optimizer.train()
        for _ in range(3):
            step(model, optimizer, x, y)
        trained = [layer.lora_A.detach().clone() for layer in model]
        optimizer.eval()
        return model, trained

    (moved, trained), (stayed, _) = run(True), run(False)
    for layer, old, keep in zip(moved, stayed, (range(16), range(2, 16)), strict=True):
        for param, before in ((layer.lora_A, old.lora_A), (layer.lora_B, old.lora_B)):
            assert same_bits(param[: len(keep)], before[list(keep)])
    assert same_bits(moved[0].lora_A[16:], trained[0][16:])  # new rows have been nowhere else yet
    assert not moved[0].lora_B[16:].any()


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_trains_while_ranks_move(name):
    make = getattr(pytest.importorskip("schedulefree"), name.split()[0])
    first, loss, _ = trained(lambda p: make(p, **SCHEDULE_FREE[name]))
    assert loss < 0.6 * first
