"""Random walks over what can be done to an adapted model: after every step all that must hold does."""

import copy
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import MLP, OPTIMIZERS, as_lists, assert_untouched, same_bits, snapshot, trainable

import l1ra
from l1ra.layers.adapted_model import find_adapters

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
stateful = pytest.importorskip("hypothesis.stateful")
rule, precondition = stateful.rule, stateful.precondition

WALKS = 200
SIZES = (6, 12, 8, 6)
HEAD = "layers.2"
SCHEDULE = {"interval": 3, "total_steps": 1000, "warmup": 0.0, "margin": 1.0, "turnover": 0.5}
RULES = {"adaptive-l1": {"gate_lr": 1.0}, "l1": {"gate_lr": 0.5, "l1_lambda": 1.0}}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
done = Counter()

merged = precondition(lambda self: self.merged)
not_merged = precondition(lambda self: not self.merged)


class Walk(stateful.RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        done["walks"] += 1

    def teardown(self):
        shutil.rmtree(self.folder)

    @stateful.initialize(
        name=st.sampled_from(list(RULES)),
        unit=st.sampled_from(["ranks", "params"]),
        optimizer=st.sampled_from(["AdamW", "SGD momentum", "RMSprop", "Adagrad", "Adam amsgrad"]),
        head=st.booleans(),
        more=st.fixed_dictionaries(
            {},
            optional={
                "reserve": st.just(5),
                "max_rank": st.just(4),
                "alpha": st.just(5.0),
                "principal_axes": st.just(False),
                "scale_with_rank": st.just(False),
                "min_coherence": st.just(-1.0),
                "min_rank": st.just(2),
                "init": st.just("gaussian"),
            },
        ),
    )
    def begin(self, name, unit, optimizer, head, more):
        torch.manual_seed(0)
        self.model = MLP(SIZES)
        self.x, self.y = torch.randn(8, SIZES[0]), torch.randn(8, SIZES[-1])
        self.settings = {**SCHEDULE, "rule": name, **RULES[name], "budget_unit": unit, **more}
        self.settings["modules_to_save"] = [HEAD] if head else []
        self.budget = 8 if unit == "ranks" else 170
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.base = {
            n: (m, m.weight.detach().clone(), m.bias.detach().clone())
            for n, m in self.model.named_modules()
            if n and n != "layers"
        }
        self.dtype = torch.float32
        self.patch()
        for _ in range(2 * SCHEDULE["interval"]):
            self.step()
        self.save()

    # --- what the rules are made of

    def patch(self):
        self.controller = l1ra.patch(self.model, self.budget, **self.settings)
        self.adapters = dict(find_adapters(self.model))
        self.params = [p for layer in self.adapters.values() for p in (layer.lora_A, layer.gate, layer.lora_B)]
        self.optimizer = self.make_optimizer(trainable(self.model))
        self.history, self.saved, self.merged = [], None, False
        self.coarse = self.epsilon()
        inner = self.controller._reallocate

        def reallocate():
            before = self.outputs()
            inner()
            self.same(self.outputs(), before)
            done["reallocations"] += 1
            done["moved"] += self.controller.history[-1]["moved"]

        self.controller._reallocate = reallocate

    def state(self):
        return as_lists(self.controller.state_dict())

    def epsilon(self):
        """Of the coarser numbers of the two that the model computes with."""
        return max(torch.finfo(dtype).eps for dtype in (self.dtype, self.params[0].dtype))

    @torch.no_grad()
    def outputs(self, model=None):
        return (model or self.model)(self.x.to(self.dtype)).double()

    def same(self, a, b, epsilon=0.0):
        # Three layers of sums over up to 12 numbers, each rounded: 100 roundings are plenty, and a wrong rank is more.
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 100 * max(self.coarse, epsilon) * max(1.0, b.abs().max())

    @torch.no_grad()
    def reference(self):
        x = self.x.to(self.dtype).double()
        for i in range(len(SIZES) - 1):
            name = f"layers.{i}"
            layer = self.model.get_submodule(name)
            if name in self.adapters:
                _, weight, bias = self.base[name]
                a, gate, b = (p[: layer.rank].double() for p in (layer.lora_A, layer.gate, layer.lora_B))
                y = x @ weight.double().T + bias.double() + layer.scaling * (x @ a.T * gate) @ b
            else:
                y = x @ layer.weight.double().T + layer.bias.double()
            x = torch.tanh(y) if i < len(SIZES) - 2 else y
        return x

    def before_patch(self):
        """A model as this one was before it was patched, with the head as it is now."""
        model = MLP(SIZES).to(self.x.device, self.dtype)
        with torch.no_grad():
            for name, (_, weight, bias) in self.base.items():
                layer = model.get_submodule(name)
                source = self.model.get_submodule(name) if name == HEAD and name not in self.adapters else None
                layer.weight.copy_(weight if source is None else source.weight)
                layer.bias.copy_(bias if source is None else source.bias)
        return model

    def backward(self):
        loss = (self.model(self.x.to(self.dtype)) - self.y.to(self.dtype)).square().mean()
        loss.backward()

    def step(self, batches=1):
        for _ in range(batches):
            self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.coarse = self.epsilon()  # gates that were rounded to other numbers are written anew

    def refused(self, error, call):
        before, kept = snapshot(self.model), self.state()
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        with pytest.raises(error):
            call()
        assert_untouched(self.model, before)
        assert self.state() == kept
        for p, grad in zip(self.params, grads, strict=True):
            assert (p.grad is None) == (grad is None) and (grad is None or same_bits(p.grad, grad))

    # --- the rules

    @not_merged
    @rule(steps=st.integers(1, 4), batches=st.integers(1, 2), more=st.booleans())
    def train(self, steps, batches, more):
        for _ in range(steps):
            self.step(batches)
        if more:  # a gradient that waits for its step
            self.backward()

    @not_merged
    @rule(times=st.integers(1, 3))
    def train_to_a_reallocation(self, times):
        entries = len(self.controller.history)
        while len(self.controller.history) < entries + times:
            self.step()

    @not_merged
    @rule(bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]), which=st.integers(0, 1))
    def poison_a_gate(self, bad, which):
        self.optimizer.zero_grad()
        self.backward()
        list(self.adapters.values())[which].gate.grad[0] = bad
        gates, skipped, entries = self.controller.gates(), self.controller.skipped_steps, len(self.controller.history)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.controller.skipped_steps == skipped + 1
        if len(self.controller.history) == entries:
            assert self.controller.gates() == gates

    @rule()
    def save(self):
        before, kept, folder = snapshot(self.model), self.state(), self.folder / "saved"
        self.controller.save(folder)
        assert_untouched(self.model, before)
        assert self.state() == kept
        self.saved = {
            "tensors": {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "controller": kept,
        }
        other = self.before_patch()
        loaded = l1ra.load(other, folder)
        assert loaded.gates() == self.controller.gates() and loaded.ranks == self.controller.ranks
        self.same(self.outputs(other), self.outputs(), torch.finfo(torch.float32).eps)
        loaded.close()

    @precondition(lambda self: self.saved and not self.merged)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        assert l1ra.load(self.model, self.folder / "saved") is self.controller
        for name, p in self.model.named_parameters():
            if name in self.saved["tensors"] and not name.endswith("gate"):
                assert same_bits(p, self.saved["tensors"][name].to(p.dtype))
        kept = copy.deepcopy(self.saved["controller"])
        for name, probe in kept["probes"].items():  # rounded as the adapter is that it rides beside
            mix = torch.tensor(probe["mix"], dtype=torch.float64)
            probe["mix"] = mix.to(self.adapters[name].lora_A.dtype).tolist()
        assert self.state() == kept
        self.history = []
        if fresh:
            self.optimizer = self.make_optimizer(trainable(self.model))
        else:
            self.optimizer.load_state_dict(self.saved["optimizer"])

    @rule()
    def reload_state_dicts(self):
        before = self.outputs()
        parts = (self.model, self.controller, self.optimizer)
        for part, state in zip(parts, [copy.deepcopy(part.state_dict()) for part in parts], strict=True):
            part.load_state_dict(state)
        self.same(self.outputs(), before)

    @not_merged
    @rule()
    def merge(self):
        before = self.outputs()
        l1ra.merge(self.model)
        self.merged = True
        self.same(self.outputs(), before)

    @merged
    @rule()
    def unmerge(self):
        before = self.outputs()
        l1ra.unmerge(self.model)
        self.same(self.outputs(), before)
        self.merged = False
        self.cast_base()

    def cast_base(self):
        for name, (module, weight, bias) in self.base.items():
            weight, bias = weight.to(self.x.device), bias.to(self.x.device, self.dtype)
            # What a merged layer keeps of its weight is cast when it is given back.
            self.base[name] = module, weight if self.merged else weight.to(self.dtype), bias

    @rule(uniform=st.booleans())
    def export(self, uniform):
        before, kept = snapshot(self.model), self.state()
        l1ra.export_peft(self.model, self.folder / "lora", uniform=uniform)
        assert_untouched(self.model, before)
        assert self.state() == kept
        other = self.before_patch()
        l1ra.from_peft(other, self.folder / "lora").close()
        self.same(self.outputs(other), self.outputs(), torch.finfo(torch.float32).eps)

    @rule(merge=st.booleans())
    def unpatch_and_patch_anew(self, merge):
        before = self.outputs()
        l1ra.unpatch(self.model, merge=merge)
        self.merged = False
        self.cast_base()
        if merge:
            self.same(self.outputs(), before)
        for name, (module, weight, bias) in self.base.items():
            found = self.model.get_submodule(name)
            assert found is module and all(p.requires_grad for p in found.parameters())
            if name in self.adapters and not merge:
                assert same_bits(found.weight, weight) and same_bits(found.bias, bias)
            self.base[name] = (module, found.weight.detach().clone(), found.bias.detach().clone())
        self.patch()

    @rule(dtype=st.sampled_from(DTYPES), device=st.sampled_from(["cpu", *["cuda"] * torch.cuda.is_available()]))
    def move(self, dtype, device):
        before = self.outputs()
        self.model.to(dtype).to(device)
        self.x, self.y = self.x.to(device), self.y.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # casts
        self.dtype = dtype
        self.coarse = max(self.coarse, self.epsilon())
        self.same(self.outputs(), before)
        self.cast_base()

    @not_merged
    @rule()
    def disable(self):
        before = self.outputs()
        with self.controller.disabled():
            assert torch.equal(self.outputs(), self.outputs(self.before_patch()))
            self.refused(RuntimeError, lambda: l1ra.merge(self.model))
            self.refused(RuntimeError, self.optimizer.step)
        assert torch.equal(self.outputs(), before)

    @rule()
    def take_another_optimizer(self):
        self.optimizer.zero_grad()
        self.optimizer = self.make_optimizer(trainable(self.model))

    @rule(which=st.integers(0, 6))
    def a_mistake(self, which):
        saved = self.merged and self.saved
        mistakes = [
            (ValueError, lambda: l1ra.patch(self.model, 8)),
            (ValueError, lambda: l1ra.RankController(self.model, self.budget)),
            (RuntimeError, lambda: self.controller.step(self.optimizer)),
            (RuntimeError, lambda: (l1ra.merge if self.merged else l1ra.unmerge)(self.model)),
            (
                RuntimeError if saved else FileNotFoundError,
                lambda: l1ra.load(self.model, self.folder / ("saved" if saved else "nowhere")),
            ),
            (ValueError, lambda: l1ra.from_peft(self.model, self.folder / "nowhere")),
            (ValueError, lambda: self.controller.load_state_dict({**self.controller.state_dict(), "budget": 99})),
        ]
        self.refused(*mistakes[which])

    # --- what always holds

    @stateful.invariant()
    def all_is_well(self):
        done["steps"] += 1
        controller, config = self.controller, self.controller.config
        sizes = {n: (layer.in_features, layer.out_features) for n, layer in self.adapters.items()}
        costs = {n: 1 if config.budget_unit == "ranks" else sum(size) for n, size in sizes.items()}
        assert sum(costs[n] * layer.rank for n, layer in self.adapters.items()) + controller.spare == self.budget
        assert controller.spare >= 0
        for name, layer in self.adapters.items():
            cap = min(*sizes[name], config.max_rank or 99, config.reserve or 99)
            assert config.min_rank <= layer.rank <= cap
            rows = layer.rank if layer.reserve is None else layer.reserve
            assert layer.reserve == config.reserve
            assert layer.lora_A.shape == (rows, layer.in_features) and layer.lora_B.shape == (rows, layer.out_features)
            assert layer.gate.shape == (rows,)
            assert not any(p[layer.rank :].any() for p in (layer.lora_A, layer.gate, layer.lora_B))
            assert layer.merged == self.merged
            if not self.merged:
                assert same_bits(layer.base_layer.weight, self.base[name][1])
        gates = controller.gates()
        assert {n: len(row) for n, row in gates.items()} == controller.ranks
        assert all(0 <= gate <= 1 for row in gates.values() for gate in row)

        found = [p for layer in self.adapters.values() for p in (layer.lora_A, layer.gate, layer.lora_B)]
        assert all(p is q for p, q in zip(found, self.params, strict=True))
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for p in self.params:
            assert id(p) in held and p.requires_grad and (p.grad is None or p.grad.shape == p.shape)
            state = self.optimizer.state.get(p, {})
            assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())

        entries = controller.history
        assert entries[: len(self.history)] == self.history
        steps = [entry["step"] for entry in entries]
        assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] <= controller.steps
        assert entries[-1]["ranks"] == controller.ranks and entries[-1]["spare"] == controller.spare
        assert sum(entry["moved"] for entry in entries) == controller.moved
        self.history = copy.deepcopy(entries)
        self.same(self.outputs(), self.reference())


def test_random_walks_lose_nothing():
    """Deterministic; hypothesis prints the shortest walk that breaks something, as code."""
    done.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stateful.run_state_machine_as_test(
            Walk,
            settings=hypothesis.settings(
                max_examples=WALKS,
                stateful_step_count=12,
                derandomize=True,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
    assert done["walks"] >= WALKS and done["steps"] > 5 * WALKS
    assert done["reallocations"] > WALKS and done["moved"] > WALKS
