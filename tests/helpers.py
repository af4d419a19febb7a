"""Tiny models, data and a training step that the tests share."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools

import torch
from torch import nn
from torch.nn import functional as F

import l1ra
from l1ra.allocation.plan import LayerPlan
from l1ra.layers.linear import L1RALinear

# Name -> how to make it from parameters: the optimizers that users of adapters reach for.
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adafactor foreach": lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=True),
    "Adafactor of transformers": lambda p: hf_adafactor(p),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def hf_adafactor(params):
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=1e-2, beta1=0.9, relative_step=False, scale_parameter=False)


class MLP(nn.Module):
    """Three linear layers of different sizes."""

    def __init__(self, sizes=(6, 10, 8, 4)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Residual(nn.Module):
    """``depth`` blocks ``x + tanh(linear(x))``."""

    def __init__(self, width=12, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


class Adapted(nn.Module):
    """A model that uses :class:`L1RALinear` itself."""

    def __init__(self, rank=4):
        super().__init__()
        self.up = L1RALinear(6, 12, rank=rank)
        self.down = L1RALinear(12, 6, rank=rank)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **kwargs))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def tokens(batch=2, length=8, vocab=50):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def task(model, batch=16, seed=3):
    """Inputs, and as targets what ``model`` gives when its first layer is changed by a rank-two term."""
    generator = torch.Generator().manual_seed(seed)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    x = torch.randn(batch, layer.in_features, generator=generator)
    kept = layer.weight.detach().clone()
    change = torch.randn(layer.out_features, 2, generator=generator) @ torch.randn(
        2, layer.in_features, generator=generator
    )
    with torch.no_grad():
        layer.weight += 0.5 * change
        y = model(x)
        layer.weight.copy_(kept)
    return x, y


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, x, y):
    """One ordinary training step. The loss is returned with its graph, as a user's loop would keep it."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


# Many reallocations in a short run.
# Margin 1: every rank that is less important than a need elsewhere moves, however little.
BRISK = {"total_steps": 60, "interval": 6, "warmup": 0.0, "cooldown": 0.2, "margin": 1.0}


def patched(budget=16, device="cpu", **settings):
    model = Residual()
    x, y = (t.to(device) for t in task(model))
    model.to(device)
    controller = l1ra.patch(model, budget, **{**BRISK, **settings})
    return model, controller, torch.optim.AdamW(trainable(model), lr=1e-2), x, y


class ScriptedRule:
    """A gate rule that plays back: ``script[step]`` are the gates, an adapter a list, from that step on."""

    def __init__(self, controller, script, importance=None):
        self.controller, self.script, self.given = controller, script, importance
        self.uses_importance = controller._rule.uses_importance

    def step(self, bank, grad, at, seen=None):
        gates = self.script.get(self.controller.steps)
        return {} if gates is None else {"value": torch.tensor([g for row in gates for g in row])}

    def importance(self, bank, at):
        return self.given


def play(controller, script, importance=None):
    """Let ``script`` move the gates in place of the controller's own rule."""
    controller._rule = ScriptedRule(controller, script, importance)


def shake(model, scale=0.3):
    """Give every adapter a B that is not zero, so that it matters."""
    for module in model.modules():
        if isinstance(module, L1RALinear):
            with torch.no_grad():
                module.lora_B.normal_(0, scale)
    return model


def bits(tensor):
    """The bit pattern, for comparisons that NaN and -0.0 can't fool."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(as_int[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def as_lists(state):
    """A state with lists in place of tensors, to be compared."""
    if isinstance(state, dict):
        return {key: as_lists(part) for key, part in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def snapshot(model):
    """All that a failed call must leave alone: modules, flags, hooks, attributes and values."""
    return {
        "modules": [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
        "params": [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["attributes"] == before["attributes"]
    assert [p[:3] for p in after["params"]] == [p[:3] for p in before["params"]]
    assert all(same_bits(a[3], b[3]) for a, b in zip(after["params"], before["params"], strict=True))


def full(rank, grow=0):
    return LayerPlan(tuple(range(rank)), grow)


def copied(module, how):
    """A copy by ``"deepcopy"`` or ``"pickle"``."""
    if how == "deepcopy":
        return copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@contextlib.contextmanager
def little_room(size):
    """Within the block no file gets beyond ``size`` bytes: the system refuses, as on a disk that is full."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
