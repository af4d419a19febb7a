"""After a reallocation every optimizer goes on as if the kept rows had always been where they are now."""

import copy
import warnings

import pytest
import torch
from helpers import OPTIMIZERS, bits, play, same_bits, step
from optimizer_helpers import move_state
from torch import nn
from torch.nn import functional as F

from l1ra import L1RALinear, RankController
from l1ra.allocation.plan import LayerPlan

# Three adapters of ranks 1, 4 and 2: the second loses two ranks, the others get one each.
RANKS = (1, 4, 2)
GATES = [[0.9], [1.0, 0.0, 0.0, 0.8], [0.5, 0.6]]
PLANS = (LayerPlan((0,), 1), LayerPlan((0, 3), 0), LayerPlan((0, 1), 1))
FACTORS_SHARED_BY_ALL_ROWS = ("col_var", "exp_avg_sq_col")


def setting(make):
    # Without scale_with_rank rows move bit for bit; what it does is in test_scale_with_rank.py.
    model = nn.Sequential(*(L1RALinear(6, 6, rank=r, scale_with_rank=False) for r in RANKS))
    controller = RankController(model, 7, total_steps=100, interval=3, warmup=0.0, new_rows="random")
    play(controller, {3: GATES})
    return model, controller, make([p for p in model.parameters() if p.requires_grad])


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 6, generator=generator)


def states(model, optimizer):
    """For each adapter parameter by name: a copy of the tensors that the optimizer keeps for it."""
    return {
        name: {k: v.detach().clone() for k, v in optimizer.state.get(p, {}).items() if isinstance(v, torch.Tensor)}
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def around_reallocation(controller, note):
    notes, inner = [], controller._reallocate

    def wrapped():
        notes.append(note())
        inner()
        notes.append(note())

    controller._reallocate = wrapped
    return notes


@pytest.mark.parametrize("keep_zeros", [False, True], ids=["grads None", "grads zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_the_rows_and_training_goes_on(name, keep_zeros):
    model, controller, optimizer = setting(OPTIMIZERS[name])
    ids = [id(p) for p in model.parameters()]
    listed = [id(p) for p in optimizer.param_groups[0]["params"]]
    settings = {k: copy.copy(v) for k, v in optimizer.param_groups[0].items() if k != "params"}
    notes = around_reallocation(controller, lambda: states(model, optimizer))
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every state of these optimizers is understood
        for _ in range(3):
            loss = step(model, optimizer, x, y)  # its graph stays alive over the reallocation
    before, after = notes
    assert [layer.rank for layer in model] == [2, 2, 3]
    for index, plan in enumerate(PLANS):
        for param in ("lora_A", "gate", "lora_B"):
            grown = getattr(model[index], param)[len(plan.keep) :]
            check_moved(before[f"{index}.{param}"], after[f"{index}.{param}"], plan, optimizer, grown)
    assert ids == [id(p) for p in model.parameters()]
    assert listed == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert settings == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}

    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        optimizer.zero_grad(set_to_none=not keep_zeros)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert not model[0].lora_B[1].eq(0).all()  # the new rank learns
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=False))
    del loss


def check_moved(before, after, plan, optimizer, grown):
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        if old.dim() == 0 or key in FACTORS_SHARED_BY_ALL_ROWS:
            assert same_bits(old, new), key
        else:
            start = 0.0
            if key == "sum":
                start = optimizer.param_groups[0]["initial_accumulator_value"]
            if key == "step_size":  # Rprop's step is multiplied: from zero it would never leave the least
                start = optimizer.param_groups[0]["lr"]
            assert new.shape[0] == plan.rank and new.shape[1:] == old.shape[1:], key
            assert same_bits(new[: len(plan.keep)], old[list(plan.keep)]), key
            # ASGD's average of the parameter begins with it.
            expected = grown if key == "ax" else torch.full_like(new[len(plan.keep) :], start)
            assert torch.equal(new[len(plan.keep) :], expected), key


def test_a_kept_row_is_stepped_just_as_without_the_reallocation():
    """The same gradients with and without a move of rows: AdamW brings the kept rows to the same bits."""
    ends = []
    for moves in (True, False):
        param = nn.Parameter(torch.arange(12.0).view(4, 3))
        optimizer = torch.optim.AdamW([param], lr=0.1)
        grads = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
        for i, grad in enumerate(grads):
            if moves and i == 3:
                kept = param.detach()[[1, 3]].clone()
                with torch.no_grad():
                    param.grad = None
                    param.set_(kept)
                move_state(optimizer, param, LayerPlan((1, 3)), torch.Size((4, 3)))
            param.grad = grad[[1, 3]] if moves and i >= 3 else grad.clone()
            optimizer.step()
        ends.append(param.detach() if moves else param.detach()[[1, 3]])
    assert same_bits(*ends)


def test_several_groups_keep_their_learning_rates_and_their_schedule():
    def groups(params):
        wide = [p for p in params if p.dim() == 2]
        return torch.optim.AdamW(
            [{"params": wide[::2]}, {"params": wide[1::2], "lr": 1e-3, "weight_decay": 0.3}], lr=1e-2
        )

    model, controller, optimizer = setting(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    rates = []
    for _ in range(5):
        step(model, optimizer, *data())
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    assert len(controller.history) == 2 and controller.moved == 2
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[1e-2 / n, 1e-3 / n] for n in range(1, 6)]))


class Unheard(torch.optim.Optimizer):
    """Keeps one number an element, flat: nobody can tell where a row is."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                memory = self.state[p].setdefault("memory", torch.zeros(p.numel()))
                memory += p.grad.flatten()
                p -= 0.1 * memory.view_as(p)


def test_a_state_of_unknown_shape_is_reset_for_that_parameter_alone_with_a_warning():
    model, _, optimizer = setting(Unheard)
    plain = nn.Parameter(torch.zeros(3))  # a parameter that is no adapter's
    optimizer.add_param_group({"params": [plain]})
    optimizer.state[plain]["memory"] = torch.ones(3)
    for _ in range(2):
        step(model, optimizer, *data())
    with pytest.warns(UserWarning, match="Unheard keeps 'memory' of shape .* starts anew") as caught:
        step(model, optimizer, *data())
    assert len([w for w in caught if "starts anew" in str(w.message)]) == 6  # A and B of three adapters
    assert optimizer.state[plain]["memory"].tolist() == [1, 1, 1]
    step(model, optimizer, *data())
    assert optimizer.state[model[0].lora_A]["memory"].numel() == 12


def test_a_warning_that_is_an_error_comes_before_anything_has_moved():
    model, controller, optimizer = setting(Unheard)
    for _ in range(2):
        step(model, optimizer, *data())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    memory = {p: state["memory"].clone() for p, state in optimizer.state.items()}
    controller._bank.value = torch.tensor([g for row in GATES for g in row])
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="starts anew"):
        warnings.simplefilter("error")
        controller._reallocate()
    assert controller._bank.value.tolist() == pytest.approx([g for row in GATES for g in row])
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(optimizer.state[p]["memory"], was) for p, was in memory.items())


def closure_for(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def test_lbfgs_which_flattens_all_parameters_starts_anew_and_goes_on():
    # The first adapter keeps its rank, and ranks go to a larger layer: neither gives the change away.
    model = nn.Sequential(L1RALinear(6, 5, rank=2), L1RALinear(5, 5, rank=4), L1RALinear(5, 6, rank=2))
    controller = RankController(model, 8, total_steps=100, interval=3, warmup=0.0, new_rows="random")
    play(controller, {3: [[0.1, 0.1], [1.0, 0.0, 1.0, 1.0], [0.9, 0.9]]})
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1, max_iter=4)
    closure = closure_for(model, optimizer, *data())
    optimizer.step(closure)
    optimizer.step(closure)
    with pytest.warns(UserWarning, match="LBFGS .* starts anew") as caught:
        optimizer.step(closure)
    assert len(caught) == 1 and [layer.rank for layer in model] == [2, 3, 3]
    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert controller.steps == 7


def test_a_closure_is_no_way_for_an_optimizer_to_move_a_gate():
    model, _, optimizer = setting(lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.5))
    closure = closure_for(model, optimizer, *data())
    for n in range(1, 6):
        optimizer.step(closure)
        if n < 3:
            assert all((layer.gate == 1).all() for layer in model)
    assert [layer.rank for layer in model] == [2, 2, 3]
    assert [g for layer in model for g in layer.gate.tolist()] == pytest.approx([0.9, 1, 1, 0.8, 0.5, 0.6, 1])


def test_with_one_row_the_factors_of_adafactor_are_told_apart():
    """At rank 1 the factor over columns has the shape of the parameter, and the factor over rows that of a scalar."""
    param = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([param], lr=0.1)
    one = torch.Size((1, 4))
    optimizer.state[param] = {
        "row_var": torch.tensor([[2.0]]),
        "col_var": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "exp_avg_sq_row": torch.tensor([5.0]),
        "exp_avg_sq_col": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "exp_avg": torch.ones(one),
        "step": torch.tensor(7.0),
        "RMS": 0.5,
    }
    move_state(optimizer, param, LayerPlan((0,), 2), one)
    state = optimizer.state[param]
    assert state["row_var"].tolist() == [[2.0], [0.0], [0.0]] and state["exp_avg_sq_row"].tolist() == [5.0, 0.0, 0.0]
    assert state["col_var"].shape == (1, 4) and state["exp_avg_sq_col"].shape == (4,)
    assert state["exp_avg"].shape == (3, 4) and state["step"] == 7 and state["RMS"] == 0.5


def test_moments_in_another_dtype_or_not_contiguous_keep_their_bits():
    param = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    low, turned = torch.randn(3, 3).bfloat16(), torch.randn(3, 3).T
    low[1] = torch.nan
    optimizer.state[param] = {"low": low, "turned": turned}
    move_state(optimizer, param, LayerPlan((0, 2)), torch.Size((3, 3)))
    assert same_bits(optimizer.state[param]["low"], low[[0, 2]])
    assert torch.equal(bits(optimizer.state[param]["turned"]), bits(turned[[0, 2]]))
