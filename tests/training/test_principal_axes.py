"""Principal axes: what the ranks turn to, what turns with them, and what stays as it is."""

import warnings

import pytest
import torch
from helpers import OPTIMIZERS, step
from torch import nn

from l1ra import L1RALinear, RankController
from l1ra.training.principal_axes import principal_rotations, rotate_to_principal_axes


def layer(rank=5, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    found = L1RALinear(12, 9, rank=rank, adapter_dtype=dtype, dtype=dtype, generator=generator, **kwargs)
    with torch.no_grad():
        found.lora_B[:rank] = torch.randn(rank, 9, generator=generator, dtype=dtype)
    return found


def orthonormal(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64)).Q.T


def principal_rotation(a, b):
    return principal_rotations(torch.stack([a @ a.T, b @ b.T]).unsqueeze(1))[0]


def test_the_turn_is_orthogonal_and_keeps_what_the_adapter_adds():
    a, b = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    turn = principal_rotation(a, b)
    torch.testing.assert_close(turn @ turn.T, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((turn @ b).T @ (turn @ a), b.T @ a, atol=1e-12, rtol=0)


def test_orthogonal_rows_of_a_turn_to_the_singular_vectors_strongest_first():
    a, b = 0.3 * orthonormal(4, 12), torch.randn(4, 9, dtype=torch.float64)
    turn = principal_rotation(a, b)
    turned = turn @ b
    _, values, right = torch.linalg.svd(b.T @ a)
    torch.testing.assert_close(turned @ turned.T, (values[:4] / 0.3).square().diag(), atol=1e-10, rtol=0)
    torch.testing.assert_close(
        (turn @ a @ right[:4].T).abs(), 0.3 * torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_ranks_that_have_learned_the_same_become_one_that_matters():
    # All four rows of B point alike: the adapter adds one direction, and each of its ranks a quarter of it.
    a, b = orthonormal(4, 12), torch.ones(4, 1, dtype=torch.float64) * torch.randn(9, dtype=torch.float64)
    strength = (principal_rotation(a, b) @ b).norm(dim=1)
    assert strength[0] == pytest.approx(2 * b[0].norm().item())
    assert strength[1:].max() < 1e-6 * strength[0]


def test_rows_that_depend_on_each_other_turn_too():
    a = torch.randn(1, 12, dtype=torch.float64).repeat(3, 1)
    b = torch.randn(3, 9, dtype=torch.float64)
    turn = principal_rotation(a, b)
    torch.testing.assert_close((turn @ b).T @ (turn @ a), b.T @ a, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_output_changes_by_rounding_alone(dtype, bound):
    turned = layer(dtype=dtype)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = turned.delta_weight()
    (rotation,) = rotate_to_principal_axes([(turned, range(5))], [])
    assert rotation is not None
    assert (turned.delta_weight() - before).norm() <= bound * before.norm()
    assert turned(x).dtype == dtype


@pytest.mark.parametrize("reserve", [None, 8])
def test_only_the_named_rows_turn_and_memory_stays(reserve):
    turned = layer(rank=6, reserve=reserve)
    with torch.no_grad():
        turned.lora_A[6:], turned.lora_B[6:] = 7.0, 7.0
    before = [p.detach().clone() for p in (turned.lora_A, turned.lora_B)]
    addresses = [p.data_ptr() for p in (turned.lora_A, turned.lora_B)]
    rotate_to_principal_axes([(turned, [0, 2, 5])], [])
    for param, old, address in zip((turned.lora_A, turned.lora_B), before, addresses, strict=True):
        assert param.data_ptr() == address
        others = [k for k in range(param.shape[0]) if k not in (0, 2, 5)]
        assert torch.equal(param[others], old[others])
        assert not torch.equal(param[[0, 2, 5]], old[[0, 2, 5]])


def nothing_learned(layer):
    layer.lora_B.data.zero_()


def not_finite(layer):
    layer.lora_A.data[1, 1] = torch.nan


@pytest.mark.parametrize("spoil", [nothing_learned, not_finite])
def test_what_has_no_axes_stays_bit_for_bit(spoil):
    kept = layer()
    spoil(kept)
    before = [p.detach().clone() for p in kept.parameters()]
    assert rotate_to_principal_axes([(kept, range(5))], []) == [None]
    assert all(
        torch.equal(p.nan_to_num(9.0), old.nan_to_num(9.0)) for p, old in zip(kept.parameters(), before, strict=True)
    )


def test_a_single_row_has_nothing_to_turn_with():
    kept = layer()
    before = kept.lora_A.detach().clone()
    assert rotate_to_principal_axes([(kept, [3])], []) == [None]
    assert torch.equal(kept.lora_A, before)


def data():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (12, 9))


def trained(make, steps, turn_after):
    model = nn.Sequential(layer())
    optimizer = make([model[0].lora_A, model[0].lora_B])
    x, y = data()
    losses = []
    for k in range(steps):
        losses.append(step(model, optimizer, x, y).item())
        if k == turn_after:
            rotate_to_principal_axes([(model[0], range(5))], [optimizer])
    return torch.tensor(losses, dtype=torch.float64), model[0].delta_weight()


@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "SGD foreach", "ASGD"])
def test_training_goes_on_as_if_nothing_had_turned_where_the_optimizer_does_not_mind(name):
    losses, added = trained(OPTIMIZERS[name], 12, turn_after=5)
    as_it_was, added_then = trained(OPTIMIZERS[name], 12, turn_after=None)
    torch.testing.assert_close(losses, as_it_was, rtol=1e-10, atol=0)
    torch.testing.assert_close(added, added_then, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_what_is_never_negative_stays_so_and_keeps_its_sum_over_the_rows(name):
    model = nn.Sequential(layer())
    optimizer = OPTIMIZERS[name]([model[0].lora_A, model[0].lora_B])
    x, y = data()
    for _ in range(3):
        step(model, optimizer, x, y)
    before = {
        (p, k): v.clone() for p in optimizer.state for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)
    }
    (rotation,) = rotate_to_principal_axes([(model[0], range(5))], [optimizer])
    assert rotation is not None
    for (param, key), old in before.items():
        new = optimizer.state[param][key]
        if old.shape[:1] != param.shape[:1]:
            assert torch.equal(new, old), key
        elif (old >= 0).all() and old.any():
            assert (new >= 0).all(), key
            torch.testing.assert_close(new.sum(0), old.sum(0), rtol=1e-5, atol=1e-12)
        elif old.any():
            torch.testing.assert_close(new, (rotation @ old.double()).to(old), rtol=1e-5, atol=1e-12)


def test_adapters_with_quantised_moments_stay_as_they_are():
    kept, optimizer = layer(), None
    optimizer = torch.optim.AdamW([kept.lora_A, kept.lora_B])
    optimizer.state[kept.lora_B] = {"state1": torch.zeros(kept.lora_B.shape, dtype=torch.uint8)}
    before = kept.lora_A.detach().clone()
    assert rotate_to_principal_axes([(kept, range(5))], [optimizer]) == [None]
    assert torch.equal(kept.lora_A, before)


def reallocated(steps, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(L1RALinear(12, 16, rank=4), nn.Tanh(), L1RALinear(16, 9, rank=4))
    controller = RankController(model, 8, total_steps=100, interval=10, warmup=0.0, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = (part.float() for part in data())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            step(model, optimizer, x, y)
    return controller


def weakest_over_strongest(controller):
    """Of the ranks of an adapter, by what each adds on its own: less on principal axes than in any other basis."""
    found = []
    for adapter in controller.adapters.values():
        strength = adapter.lora_A.detach().norm(dim=1) * adapter.lora_B.detach().norm(dim=1)
        found.append((strength.min() / strength.max()).item())
    return max(found)


def test_a_reallocation_turns_the_ranks():
    before, after = (weakest_over_strongest(reallocated(steps)) for steps in (9, 10))
    assert after < 0.6 * before


@pytest.mark.parametrize("settings", [{"principal_axes": False}, {"rule": "l1", "l1_lambda": 0.0}])
def test_ranks_stay_in_their_basis_when_it_is_switched_off_and_in_the_rule_of_the_paper(settings):
    before, after = (weakest_over_strongest(reallocated(steps, **settings)) for steps in (9, 10))
    assert after > 0.8 * before


def test_importance_turns_with_the_ranks():
    controller = reallocated(9)
    bank = controller._bank
    before = bank.importance_sq.clone()
    rotation = orthonormal(3, 3)
    bank.rotate([[0, 1, 3], [1]], [rotation, None])
    torch.testing.assert_close(bank.importance_sq[[0, 1, 3]], rotation.square().float() @ before[[0, 1, 3]])
    assert torch.equal(bank.importance_sq[[2, 4, 5, 6, 7]], before[[2, 4, 5, 6, 7]])


def test_rows_that_were_just_dealt_and_pressed_ones_do_not_turn():
    controller = reallocated(9)
    bank = controller._bank
    bank.value[1], bank.age[6] = 0.5, 0
    assert bank.rows_at_one() == [[0, 2, 3], [0, 1, 3]]


def several():
    """Adapters of different shapes, dtypes and numbers of rows, with the rows to be rotated, and their optimizer."""
    kinds = [(12, 9, torch.float64), (12, 9, torch.float32), (9, 12, torch.float32), (12, 12, torch.bfloat16)]
    chosen = [[0, 1, 2, 3, 4], [0, 2, 3], [1, 4], [2], [], [0, 1, 2, 3, 4], [0, 2, 3], [0, 1, 2, 3, 4]]
    adapters = []
    for seed, rows in enumerate(chosen):
        inputs, outputs, dtype = kinds[seed % 4]
        generator = torch.Generator().manual_seed(seed)
        made = L1RALinear(inputs, outputs, rank=5, adapter_dtype=dtype, reserve=8 if seed % 3 else None)
        for param in (made.lora_A, made.lora_B):
            param.data.copy_(torch.randn(param.shape, generator=generator))
        adapters.append((made, rows))
    adapters[5][0].lora_B.data[1, 1] = torch.nan
    adapters[6][0].lora_B.data.zero_()
    optimizer = torch.optim.AdamW([p for made, _ in adapters for p in (made.lora_A, made.lora_B)], lr=0.0)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).to(param)
    optimizer.step()
    return adapters, optimizer


def test_adapters_are_rotated_together_as_one_by_one_and_one_that_is_not_finite_keeps_none_from_it():
    (together, optimizer), (alone, other) = several(), several()
    rotations = rotate_to_principal_axes(together, [optimizer])
    expected = [rotate_to_principal_axes([one], [other])[0] for one in alone]
    assert [rotation is None for rotation in rotations] == [False, False, False, True, True, True, True, False]
    for (first, _), (second, _), rotation, wanted in zip(together, alone, rotations, expected, strict=True):
        assert rotation is wanted or torch.allclose(rotation, wanted, rtol=1e-9, atol=1e-12)
        for param, twin in ((first.lora_A, second.lora_A), (first.lora_B, second.lora_B)):
            state, old = optimizer.state[param], other.state[twin]
            pairs = [(param, twin), (param.grad, twin.grad), *((state[name], old[name]) for name in state)]
            for found, right in pairs:
                torch.testing.assert_close(found, right, equal_nan=True)
                assert rotation is not None or torch.equal(found.nan_to_num(9.0), right.nan_to_num(9.0))


def test_a_rotation_in_small_batches_is_the_same(monkeypatch):
    (together, optimizer), (batches, other) = several(), several()
    rotate_to_principal_axes(together, [optimizer])
    monkeypatch.setattr("l1ra.layers.tensor_lists.ELEMENTS", 50)
    rotate_to_principal_axes(batches, [other])
    for (first, _), (second, _) in zip(together, batches, strict=True):
        torch.testing.assert_close(first.lora_A, second.lora_A, equal_nan=True)
        torch.testing.assert_close(first.lora_B, second.lora_B, equal_nan=True)


def test_state_of_unknown_names_is_judged_by_its_values():
    made, rows = layer(), range(5)
    optimizer = torch.optim.SGD([made.lora_A, made.lora_B], lr=0.0)
    for param in (made.lora_A, made.lora_B):
        optimizer.state[param] = {"squares": torch.rand_like(param), "sums": torch.randn_like(param)}
    before = {
        param: {name: value.clone() for name, value in optimizer.state[param].items()} for param in optimizer.state
    }
    (rotation,) = rotate_to_principal_axes([(made, rows)], [optimizer])
    for param, old in before.items():
        torch.testing.assert_close(optimizer.state[param]["squares"].detach(), rotation.square() @ old["squares"])
        torch.testing.assert_close(optimizer.state[param]["sums"].detach(), rotation @ old["sums"])
