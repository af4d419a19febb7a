"""Loops as users write them: gates move as the controller says in all of them, and nowhere else."""

import pytest
import torch
from helpers import BRISK, Residual, patched, shake, step, task, trainable
from torch.utils.checkpoint import checkpoint

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra_kernels.reference import adam_elastic_net_step

LR, L1 = 2e-2, 1e-3


class Expected:
    """The paper's rule, fed with the gradients that stand on the gates just before the optimizer's step."""

    def __init__(self, model):
        self.layers = [layer for _, layer in find_adapters(model)]
        self.gate = torch.cat([layer.gate.detach() for layer in self.layers])
        self.m = self.v = torch.zeros_like(self.gate)
        self.steps = 0

    def note(self, scale=1.0):
        grad = torch.cat([layer.gate.grad for layer in self.layers]) / scale
        age = torch.full_like(grad, float(self.steps))
        self.gate, self.m, self.v = adam_elastic_net_step(self.gate, grad, self.m, self.v, age, lr=LR, l1=L1, l2=0.0)
        self.steps += 1

    def check(self):
        gates = torch.cat([layer.gate.detach() for layer in self.layers])
        torch.testing.assert_close(gates, self.gate, rtol=1e-4, atol=1e-5)
        assert all(layer.gate.grad is None or not layer.gate.grad.any() for layer in self.layers)


def plain(model, optimizer, x, y, expected):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    expected.note()
    optimizer.step()


def accumulated(model, optimizer, x, y, expected):
    for part in range(4):
        ((model(x[part::4]) - y[part::4]).square().mean() / 4).backward()
    expected.note()
    optimizer.step()
    optimizer.zero_grad()


def clipped(model, optimizer, x, y, expected):
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected.note()
    optimizer.step()


def zeroed(model, optimizer, x, y, expected):
    optimizer.zero_grad(set_to_none=False)
    plain(model, optimizer, x, y, expected)


LOOPS = {f.__name__: f for f in (plain, accumulated, clipped, zeroed)}


def all_in_one(model):
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.5)


def gates_in_a_group_of_their_own(model):
    gates = [layer.gate for _, layer in find_adapters(model)]
    rest = [p for p in trainable(model) if all(p is not gate for gate in gates)]
    return torch.optim.SGD([{"params": gates, "lr": 10.0, "weight_decay": 0.9}, {"params": rest}], lr=1e-2)


def gates_left_out(model):
    return torch.optim.Adam([p for p in trainable(model) if p.dim() == 2], lr=1e-2)


def a_and_b_at_rates_of_their_own(model):
    """As LoRA+ does."""
    groups = {"lora_A": [], "lora_B": [], "gate": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[name.rsplit(".", 1)[-1]].append(p)
    return torch.optim.AdamW(
        [{"params": groups["lora_A"]}, {"params": groups["lora_B"], "lr": 0.1}, {"params": groups["gate"]}], lr=1e-3
    )


OPTIMIZERS = {
    f.__name__: f for f in (all_in_one, gates_in_a_group_of_their_own, gates_left_out, a_and_b_at_rates_of_their_own)
}


def paper():
    model = Residual()
    x, y = task(model)
    controller = l1ra.patch(model, 16, preset="reference", total_steps=1000, gate_lr=LR, l1_lambda=L1)
    # From the middle, where a gate can move both ways, and with a B that gives it a gradient.
    shake(model)
    controller._bank.value.fill_(0.6)
    controller._bank.write_to_layers()
    return model, controller, x, y


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_gates_follow_the_rule_alone(loop, make):
    model, controller, x, y = paper()
    optimizer, expected = make(model), Expected(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
    for n in range(1, 21):
        loop(model, optimizer, x, y, expected)
        schedule.step()
        expected.check()
        assert controller.steps == n
    assert (expected.gate - 0.6).abs().min() > 1e-3
    for _, layer in find_adapters(model):
        assert layer.gate not in optimizer.state


def scaled_loop(model, optimizer, x, y, scaler, unscale=False):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = (model(x) - y).square().mean()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_does_not_show_in_the_gates(fused, unscale):
    model, controller, x, y = paper()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler, expected = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5), Expected(model)
    for n in range(1, 21):
        scaled_loop(model, optimizer, x, y, scaler, unscale)
        expected.note(1.0 if unscale else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        expected.check()
        assert controller.steps == n
    assert scaler.get_scale() > 64 and (expected.gate - 0.6).abs().max() > 0.01


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_move_no_gate(fused):
    model, controller, x, y = paper()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    skipped = 0
    while controller.skipped_steps + skipped < 3:
        gates = controller.gates()
        scaled_loop(model, optimizer, x, y, scaler)
        steps = controller.steps
        scaler.step(optimizer)
        scaler.update()
        skipped += controller.steps == steps
        assert controller.gates() == gates
    rows = [p.detach().clone() for p in trainable(model)]
    for _ in range(40):  # the scale comes down
        scaled_loop(model, optimizer, x, y, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert controller.gates() != gates and all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(trainable(model), rows, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_because_of_another_parameter_moves_no_gate(fused):
    model, controller, x, y = paper()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    gates = controller.gates()
    scaled_loop(model, optimizer, x, y, scaler)
    model.blocks[1].lora_A.grad[0, 0] = torch.inf  # the gates' own gradients are fine
    scaler.step(optimizer)
    scaler.update()
    assert controller.gates() == gates and scaler.get_scale() == 32


def test_gates_in_bf16_move_by_steps_too_small_for_bf16():
    model, controller, x, y = paper()
    model.bfloat16()
    controller._rule.lr = 1e-4
    optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
    for _ in range(200):
        step(model, optimizer, x.bfloat16(), y.bfloat16())
    gates = [layer.gate for _, layer in find_adapters(model)]
    assert {gate.dtype for gate in gates} == {torch.bfloat16}
    assert max((gate.float() - 0.6).abs().max() for gate in gates) > 0.01  # a step of 1e-4 alone is rounded away


def test_ranks_move_under_a_grad_scaler_and_a_fused_optimizer():
    model, controller, _, x, y = patched()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    for _ in range(60):
        scaled_loop(model, optimizer, x, y, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert controller.moved > 0 and sum(controller.ranks.values()) + controller.spare == 16


@pytest.mark.parametrize("rule", ["adaptive-l1", "l1"])
def test_eight_micro_batches_of_one_and_four_of_two_give_the_same_ranks(rule):
    settings = {"gate_lr": 0.1, "l1_lambda": 1.0} if rule == "l1" else {}

    def run(micro):
        torch.manual_seed(0)
        model = Residual()
        x, y = (t.double() for t in task(model, batch=8))
        model.double()
        controller = l1ra.patch(model, 16, rule=rule, adapter_dtype="float64", **BRISK, **settings)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        gates = []
        for _ in range(60):
            for a, b in zip(x.split(micro), y.split(micro), strict=True):
                ((model(a) - b).square().mean() * micro / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
            gates.append([g for row in controller.gates().values() for g in row])
        assert controller.steps == 60 and sum(entry["pruned"] for entry in controller.history) > 0
        return [entry["ranks"] for entry in controller.history], gates

    (ranks, gates), (other_ranks, other_gates), (whole_ranks, _) = run(1), run(2), run(8)
    assert ranks == other_ranks == whole_ranks
    for mine, theirs in zip(gates, other_gates, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


class Checkpointed(Residual):
    kind = None

    def forward(self, x):
        if self.kind is None:
            return super().forward(x)
        # The reentrant kind needs an input that wants a gradient; transformers models get that from patch.
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = checkpoint(lambda t, block=block: t + torch.tanh(block(t)), x, use_reentrant=self.kind == "reentrant")
        return x


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_neither_gates_nor_ranks(kind):
    def run(kind):
        torch.manual_seed(0)
        model = Checkpointed()
        x, y = task(model)
        model.kind = kind
        controller = l1ra.patch(model, 16, dropout=0.1, **BRISK)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for _ in range(40):
            step(model, optimizer, x, y)
        assert controller.moved > 0
        return [entry["ranks"] for entry in controller.history], controller.gates()

    (ranks, gates), (ranks_too, gates_too) = run(None), run(kind)
    assert ranks == ranks_too
    assert gates == {name: pytest.approx(row, abs=1e-4) for name, row in gates_too.items()}


def test_evaluation_between_steps_changes_nothing():
    def run(evaluates):
        torch.manual_seed(0)
        model, controller, optimizer, x, y = patched()
        for _ in range(40):
            step(model, optimizer, x, y)
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(x)
                model.train()
        return controller.history, controller.gates()

    assert run(False) == run(True)


def test_adapters_that_a_batch_does_not_use_stand_still():
    """As the experts of a mixture, or the vision tower at a text batch."""
    model, controller, _, x, y = patched(interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    unused = model.blocks[3]
    for n in range(1, 31):
        optimizer.zero_grad()
        out = x
        for block in model.blocks[: 4 if n % 2 else 3]:
            out = out + torch.tanh(block(out))
        (out - y).square().mean().backward()
        before = unused.gate.detach().clone() if n % 2 == 0 and unused.rank == unused.gate.numel() else None
        reallocations = len(controller.history)
        optimizer.step()
        if before is not None and len(controller.history) == reallocations:
            assert torch.equal(unused.gate, before)
    assert controller.steps == 30 and sum(controller.ranks.values()) + controller.spare == 16


def test_a_loop_of_accelerate_drives_it_once_a_real_step():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, controller, _, x, y = patched()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for n in range(240):
        part = n % 4
        with accelerator.accumulate(model):
            accelerator.backward((model(x[part::4]) - y[part::4]).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert controller.steps == (n + 1) // 4
    assert controller.moved > 0 and sum(controller.ranks.values()) + controller.spare == 16


def test_a_compiled_model_is_driven_just_the_same():
    runs = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        model, controller, optimizer, x, y = patched(total_steps=25, interval=8)
        use = wrap(model)
        for _ in range(25):
            step(use, optimizer, x, y)
        runs.append((controller.ranks, controller.moved, model(x).detach()))
    (ranks, moved, out), (compiled_ranks, compiled_moved, compiled_out) = runs
    assert moved > 0 and (compiled_ranks, compiled_moved) == (ranks, moved)
    torch.testing.assert_close(compiled_out, out, rtol=1e-3, atol=1e-4)
