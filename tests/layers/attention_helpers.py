"""A tiny attention whose layers read one input, on the fused kernels: on a GPU, or in Triton's interpreter."""

import threading

import torch
from helpers import shake, trainable
from torch import nn

import l1ra
from l1ra_kernels import choice

# Where the kernels run: in the interpreter there is no other device than the CPU.
DEVICE = "cpu" if choice.interpreting() else "cuda"


def randn(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


class Attention(nn.Module):
    """Three layers that read one input, and one that reads another."""

    def __init__(self, width=16):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x, other=None):
        q, k, v = self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)
        return self.o_proj(torch.tanh(q) * torch.tanh(k) + v)


def attention(**settings):
    torch.manual_seed(0)
    model = Attention().to(DEVICE)
    l1ra.patch(model, 12, **settings)
    return shake(model)


def as_stepped(model):
    """Write to the adapters' parameters, as an optimizer's step does, but leave their values."""
    with torch.no_grad():
        for p in trainable(model):
            p.mul_(1)


def calls(monkeypatch):
    """Collects how many layers each call of the fused op serves."""
    from l1ra_kernels import autograd

    seen, original = [], autograd.fused

    def count(x, layers, dropout):
        seen.append(len(layers))
        return original(x, layers, dropout)

    monkeypatch.setattr(autograd, "fused", count)
    return seen


class Wide(nn.Module):
    """Two layers that widen one input, and one that narrows."""

    def __init__(self, width=16):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width)
        self.down_proj = nn.Linear(3 * width, width)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def wide(**settings):
    torch.manual_seed(0)
    model = Wide().to(DEVICE)
    l1ra.patch(model, 12, augment=True, **settings)
    return shake(model)


def gradients(model, run, x, seed=0):
    """Output and gradients of one forward and backward."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in trainable(model))]


def example():
    return randn(5, 16)


def settled_attention():
    model = attention()
    model(example())
    as_stepped(model)
    return model


def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()) + 1e-7)
