"""L1RALinear: its function, its dtypes, merge and resize."""

import copy
import itertools
import math

import pytest
import torch
from helpers import copied, full, same_bits, shake
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from l1ra import L1RALinear
from l1ra.allocation.plan import LayerPlan
from l1ra.layers.gradient_probe import coherence, start_probes, update_sketches


def bases(k=6, n=9, dtype=torch.float32):
    yield nn.Linear(k, n).to(dtype)
    yield nn.Linear(k, n, bias=False).to(dtype)
    yield Conv1D(n, k).to(dtype)


def adapted(base=None, **kwargs):
    return shake(L1RALinear.from_linear(base or nn.Linear(6, 9), **{"rank": 3, "alpha": 6, **kwargs}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", range(3))
def test_a_fresh_adapter_changes_no_bit(dtype, kind):
    base = list(bases(dtype=dtype))[kind]
    x = torch.randn(4, 6).to(dtype)
    assert same_bits(L1RALinear.from_linear(base, rank=3)(x), base(x))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("kind", range(3))
def test_forward_is_base_plus_gated_low_rank_term(lead, kind):
    base = list(bases())[kind]
    layer = adapted(base)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([1.0, 0.5, 0.0]))
    x = torch.randn(*lead, 6)
    expected = base(x) + 2.0 * ((x @ layer.lora_A.T) * layer.gate) @ layer.lora_B
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (*lead, 9)


def test_forward_takes_any_strides():
    layer, x = adapted(), torch.randn(6, 4).T
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_only_the_adapter_is_trained():
    layer = L1RALinear(6, 9, rank=3)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "gate", "lora_B"}
    assert layer.lora_A.shape == (3, 6) and layer.gate.tolist() == [1, 1, 1] and not layer.lora_B.any()


def test_scaling_is_alpha_over_the_first_rank_for_ever():
    layer = L1RALinear(20, 20, rank=4, alpha=6)
    assert layer.scaling == 1.5
    layer.resize(full(4, 12))
    assert layer.rank == 16 and layer.scaling == 1.5
    assert L1RALinear(20, 20, rank=4).scaling == 1.0
    assert L1RALinear(20, 20, rank=4, alpha=6, rank_stabilized=True).scaling == 3.0


def test_first_rows_of_a_have_the_spread_they_should():
    uniform = L1RALinear(400, 400, rank=100).lora_A.detach()
    assert uniform.abs().max() <= 0.05 + 1e-6 and uniform.std() == pytest.approx(0.05 / math.sqrt(3), rel=0.05)
    normal = L1RALinear(400, 400, rank=100, init="gaussian").lora_A.detach()
    assert normal.std() == pytest.approx(0.01, rel=0.05) and normal.mean().abs() < 1e-3


def test_a_generator_makes_the_rows_repeatable_and_spares_the_global_one():
    base = nn.Linear(6, 9)
    before = torch.get_rng_state()
    twins = [L1RALinear.from_linear(base, rank=2, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert same_bits(twins[0].lora_A, twins[1].lora_A) and torch.equal(before, torch.get_rng_state())


def test_dropout_falls_on_the_adapter_alone_and_only_in_training():
    layer, x = adapted(dropout=0.5), torch.randn(7, 6)
    base = layer.base_layer(x)
    layer.eval()
    quiet = layer(x)
    torch.testing.assert_close(quiet, base + x @ layer.delta_weight().T)
    layer.train()
    torch.manual_seed(1)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), base + kept @ layer.delta_weight().T)
    nn.init.zeros_(layer.lora_B)
    assert same_bits(layer(x), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_over_a_16_bit_base(dtype):
    layer = adapted(nn.Linear(6, 9).to(dtype))
    x = torch.randn(5, 6).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert {p.grad.dtype for p in (layer.lora_A, layer.gate, layer.lora_B)} == {torch.float32}
    exact = layer.base_layer(x).float() + x.float() @ layer.delta_weight().T
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


def test_no_fp32_copy_of_a_16_bit_input_is_saved_for_backward():
    layer, x = adapted(nn.Linear(64, 64).bfloat16()), torch.randn(128, 64).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not [t for t in saved if t.numel() >= x.numel() and t.dtype == torch.float32]
    assert [t for t in saved if t.numel() >= x.numel()]  # the input itself is


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_the_adapter_works_in_the_dtype_of_the_base(low):
    layer, x = adapted(), torch.randn(5, 6)
    with torch.autocast("cpu", low):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == low
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(2)
        layer, x = adapted(dropout=0.3), torch.randn(5, 6, requires_grad=True)
        run(layer, x).square().sum().backward()
        grads.append([x.grad, layer.lora_A.grad, layer.gate.grad, layer.lora_B.grad])
    assert all(itertools.starmap(same_bits, zip(*grads, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", range(3))
def test_merge_gives_the_same_output_and_unmerge_the_same_bits(dtype, kind):
    layer = adapted(list(bases(dtype=dtype))[kind])
    weight, x = layer.weight.detach().clone(), torch.randn(5, 6).to(dtype)
    before = layer(x)
    layer.merge()
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    assert layer.merged and not torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), before, **tolerance)
    assert same_bits(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert not layer.merged and same_bits(layer.weight, weight) and same_bits(layer(x), before)


def test_merging_twice_or_unmerging_nothing_is_an_error():
    layer = adapted()
    with pytest.raises(RuntimeError, match="call merge"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.merge()


def test_resize_keeps_rows_in_order_and_appends_silent_ones():
    layer = adapted(rank=4)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    new = torch.randn(2, 6)
    layer.resize(LayerPlan((1, 3), 2), new)
    assert layer.rank == 4 and layer.gate.tolist() == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert same_bits(layer.lora_A, torch.cat([a[[1, 3]], new])) and same_bits(layer.lora_B[:2], b[[1, 3]])
    assert not layer.lora_B[2:].any()


def test_resize_changes_nothing_where_the_gate_was_zero():
    layer, x = adapted(rank=4), torch.randn(5, 6)
    with torch.no_grad():
        layer.gate[1:3] = 0
    before = layer(x)
    layer.resize(LayerPlan((0, 3), 3))
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_resize_keeps_the_parameters_their_hooks_and_their_gradients():
    layer, x = adapted(), torch.randn(5, 6)
    params, fired = [layer.lora_A, layer.gate, layer.lora_B], []
    layer.lora_A.register_hook(lambda grad: fired.append(grad.shape))
    layer.lora_A.register_post_accumulate_grad_hook(lambda p: fired.append("after"))
    loss = layer(x).sum()  # stays alive, with its graph, as in every training loop
    loss.backward()
    grad = layer.lora_A.grad.clone()
    layer.resize(LayerPlan((0, 2), 3))
    assert all(p is q for p, q in zip(params, [layer.lora_A, layer.gate, layer.lora_B], strict=True))
    assert same_bits(layer.lora_A.grad[:2], grad[[0, 2]]) and not layer.lora_A.grad[2:].any()
    fired.clear()
    layer(x).sum().backward()
    assert fired == [(5, 6), "after"] and layer.gate.grad.shape == (5,)
    del loss


@pytest.mark.parametrize(
    "plan, rows, message",
    [
        (LayerPlan((0, 3)), None, "below the rank 3"),
        (LayerPlan((1, 0)), None, "in ascending order"),
        (LayerPlan((1, 1)), None, "in ascending order"),
        (LayerPlan((-1, 0)), None, "in ascending order"),
        (LayerPlan(()), None, "at least 1 must stay"),
        (LayerPlan((0,), -1), None, "at least 1 must stay"),
        (LayerPlan((0,), 2), torch.zeros(1, 6), "new_rows must be"),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error_and_changes_nothing(plan, rows, message):
    layer = adapted()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.resize(plan, rows)
    assert all(same_bits(before[name], value) for name, value in layer.state_dict().items())


def test_a_merged_adapter_can_not_be_resized():
    layer = adapted()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.resize(full(3, 1))


@pytest.mark.parametrize("rank", [0, -1, 7, 2.0, "4"])
def test_a_rank_out_of_range_is_an_error(rank):
    with pytest.raises(ValueError, match="rank must be from 1 to 6"):
        L1RALinear(6, 9, rank=rank)


@pytest.mark.parametrize("base", [nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Bilinear(2, 2, 2)])
def test_other_layers_can_not_be_adapted(base):
    with pytest.raises(TypeError, match=f"{type(base).__name__} can't be adapted"):
        L1RALinear.from_linear(base, rank=1)


def test_a_state_dict_of_another_rank_is_taken_without_touching_the_global_rng():
    here, there = adapted(), adapted()
    there.base_layer.load_state_dict(here.base_layer.state_dict())
    there.resize(full(3, 2))
    shake(there)
    before, ids = torch.get_rng_state(), [id(p) for p in here.parameters()]
    here.load_state_dict(there.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert here.rank == 5 and ids == [id(p) for p in here.parameters()]
    x = torch.randn(3, 6)
    assert same_bits(here(x), there(x))


@pytest.mark.parametrize("name", ["lora_A", "gate", "lora_B"])
def test_a_state_dict_that_does_not_fit_leaves_the_rank_alone(name):
    layer = adapted(rank=2)
    state = adapted(rank=5).state_dict()
    state[name] = state[name][:4] if name == "gate" else state[name][:, :4]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        layer.load_state_dict(state)
    assert layer.rank == 2 and layer.gate.shape == (2,) and layer.lora_B.shape == (2, 9)


def start_probe(layer, count):
    (probe,) = start_probes(
        count, [(layer.lora_A, layer.in_features, layer.out_features)], torch.Generator().manual_seed(1)
    )
    return probe


def test_the_probe_changes_no_bit_and_sketches_the_weight_gradient():
    layer, x, target = adapted(dropout=0.0), torch.randn(8, 6), torch.randn(8, 9)
    before = layer(x)
    layer.probe = start_probe(layer, 4)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)
    for _ in range(2):  # summed over passes
        F.mse_loss(layer(x), target).backward()
    layer.base_layer.weight.requires_grad_(True)
    full_gradient = torch.autograd.grad(F.mse_loss(layer(x), target), layer.base_layer.weight)[0]
    expected = 2 * layer.scaling * layer.probe.mix @ full_gradient
    torch.testing.assert_close(layer.probe.gradient, expected)
    update_sketches([layer.probe])
    torch.testing.assert_close(layer.probe.sketch, expected / expected.norm())
    assert layer.probe.seen == 1 and not layer.probe.gradient.any()


def probe_of(layer):
    layer.probe = start_probe(layer, 4)
    return layer.probe


def test_a_probe_moves_with_its_layer():
    layer = adapted(dropout=0.0)
    probe = probe_of(layer)
    layer(torch.randn(8, 6)).sum().backward()
    update_sketches([probe])
    before = probe.state()
    layer.to(torch.bfloat16)
    assert torch.equal(probe.mix, before["mix"].bfloat16())
    assert same_bits(probe.sketch, before["sketch"]) and probe.seen == 1
    layer(torch.randn(8, 6, dtype=torch.bfloat16)).sum().backward()
    assert probe.gradient.dtype == torch.bfloat16
    update_sketches([probe])
    assert probe.sketch.dtype == torch.float32 and not torch.equal(probe.sketch, before["sketch"]) and probe.seen == 2
    assert layer.to("meta").probe.mix.is_meta and layer.probe.sketch.is_meta


def coherence_of(probe):
    return coherence([probe]).item()


def seen_by(probe, gradients):
    for gradient in gradients:
        probe.gradient.copy_(gradient)
        update_sketches([probe])
    return probe


@pytest.mark.parametrize("scales", [[1.0] * 12, [1e-15, 1e15, 65536.0] * 4])
def test_coherence_is_the_mean_cosine_of_two_steps_told_for_two_halves_of_them(scales):
    probe, pull = probe_of(adapted(dropout=0.0)), torch.randn(4, 6, dtype=torch.float64)
    gradients = [0.3 * pull + torch.randn(4, 6, dtype=torch.float64) for _ in scales]
    seen_by(probe, [g * scale for g, scale in zip(gradients, scales, strict=True)])
    unit = torch.stack([g.flatten() / g.norm() for g in gradients])
    cosine = (unit @ unit.T)[~torch.eye(12, dtype=torch.bool)].mean()
    assert coherence_of(probe) == pytest.approx((6 * cosine / (1 + 5 * cosine)).item(), rel=1e-4)


def test_a_probe_tells_gradients_that_agree_from_noise_and_from_steps_that_overshoot():
    found = {}
    for share in (0.0, 1.0):
        layer, pull = adapted(dropout=0.0), torch.randn(9)
        probe = probe_of(layer)
        for _ in range(100):
            (layer(torch.randn(8, 6) + share) * (share * pull + torch.randn(8, 9))).mean().backward()
            update_sketches([probe])
        found[share] = coherence_of(probe)
    assert found[1.0] > 0.9 and abs(found[0.0]) < 0.4  # of noise the sketch has no more than 24 directions
    pull = torch.randn(4, 6)
    assert coherence_of(seen_by(probe_of(layer), [pull, -pull] * 5)) < -0.9


def test_what_a_probe_has_not_seen_does_not_count():
    probe, pull = probe_of(adapted(dropout=0.0)), torch.randn(4, 6)
    assert coherence_of(probe) == 0  # nobody needs ranks where no gradient comes
    assert coherence_of(seen_by(probe, [0 * pull])) == 0
    assert math.isnan(coherence_of(seen_by(probe, [pull])))
    useless = [pull * torch.inf, pull * torch.nan, 1e-25 * pull, 1e30 * pull]
    assert coherence_of(seen_by(probe, [*useless, pull])) == pytest.approx(1.0)
    assert probe.seen == 2


def test_a_probe_keeps_no_graph():
    layer = adapted(dropout=0.0)
    probe = probe_of(layer)
    loss = layer(torch.randn(8, 6)).square().sum()
    loss.backward(create_graph=True)
    update_sketches([probe])
    assert not probe.gradient.requires_grad and not probe.sketch.requires_grad


@pytest.mark.parametrize("count", range(2, 40))
def test_coherence_is_a_cosine(count):
    probe, pull = probe_of(adapted(dropout=0.0)), torch.randn(4, 6)
    gradients = [sign * pull for _ in range(count // 2) for sign in (1, -1)]
    found = [coherence_of(seen_by(probe, gradients)) for _ in range(2)]
    assert all(c >= -1 for c in found)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_works_and_carries_no_probe(how):
    layer, x = adapted(dropout=0.1).eval(), torch.randn(3, 6)
    layer.probe = start_probe(layer, 2)
    layer(x).sum().backward()
    twin = copied(layer, how)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=1e-6)
    assert twin.lora_A is not layer.lora_A and twin.probe is None and layer.probe is not None
    twin.resize(full(3, 1))
    assert (twin.rank, layer.rank) == (4, 3)


def test_shapes_can_be_inferred_on_the_meta_device():
    layer = L1RALinear(6, 5, rank=2, device="meta", dtype=torch.bfloat16)
    out = layer(torch.empty(3, 4, 6, device="meta", dtype=torch.bfloat16))
    assert out.shape == (3, 4, 5) and out.dtype == torch.bfloat16 and out.is_meta


@pytest.mark.parametrize(
    "wrong", [{"init": "zeros"}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.5}, {"dropout": 1.0}]
)
def test_settings_of_a_layer_are_checked_before_its_base_is_frozen(wrong):
    base, message = nn.Linear(6, 5), f"{next(iter(wrong))} must be"
    with pytest.raises(ValueError, match=message):
        L1RALinear.from_linear(base, rank=2, **wrong)
    assert base.weight.requires_grad and base.bias.requires_grad
    with pytest.raises(ValueError, match=message):
        L1RALinear(6, 5, rank=2, **wrong)


def test_merging_16_bit_adapters_into_a_wider_weight_rounds_the_sum_alone():
    torch.manual_seed(0)
    layer = L1RALinear(64, 48, rank=8, adapter_dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    exact = layer.base_layer.weight.double() + layer.scaling * layer.lora_B.double().T @ layer.lora_A.double()
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_replica_of_data_parallel_on_another_device_trains_with_probes():
    """Two GPUs stood in for: a replica shares the probe, and must keep nothing of its own."""
    torch.manual_seed(0)
    layer = L1RALinear(6, 5, rank=2)
    layer.probe = start_probe(layer, 3)
    layer.sharing = object()
    replica = layer._replicate_for_data_parallel()
    for name, param in layer.named_parameters(recurse=False):
        setattr(replica, name, param.to("meta"))
    assert replica.sharing is None and replica.padded_weight is None and layer.sharing is not None
    a, gate, b = layer.probe.append_to(replica.lora_A, replica.gate, replica.lora_B)
    assert {part.device.type for part in (a, gate, b)} == {"meta"} and len(a) == len(gate) == len(b) == 5


def test_patch_under_another_default_device_draws_rows_where_the_generator_is():
    with torch.device("meta"):
        layer = L1RALinear(6, 5, rank=2)
        (probe,) = start_probes(3, [(torch.empty(2, 6), 6, 5)], torch.Generator())
        assert layer.initial_rows(2, torch.Generator()).device.type == "cpu" and probe.mix.device.type == "meta"
