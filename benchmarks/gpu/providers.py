"""The competitors: each puts adapters into a module of frozen linears, in place.

Written here where the package is no ordinary dependency: the structure is the published one, the code is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import l1ra
from benchmarks.gpu import required_tests
from benchmarks.gpu.bench import Bench, LeftOut
from benchmarks.gpu.lorafusion_style import LoRAFusionStyle
from benchmarks.gpu.problem import SCALING, DecoderLinears
from benchmarks.gpu.tables import FROZEN, OURS
from benchmarks.gpu.unsloth_style import UnslothStyle, together
from l1ra.layers.padded_weight import padding_pays_off

__all__ = ["NOTES", "PROVIDERS", "TESTED_BY", "Adapted", "Adapter", "install_peft", "peft_or_left_out"]


@dataclass
class Adapter:
    """One adapter: its Parameters as the provider holds them, B as (r, N) or transposed."""

    a: nn.Parameter
    b: nn.Parameter
    b_transposed: bool = False
    gate: nn.Parameter | None = None

    def gate_or_ones(self) -> Tensor:
        return self.a.new_ones(self.a.shape[0]) if self.gate is None else self.gate

    def gradients(self) -> dict[str, Tensor | None]:
        """As the formula has them, ranks in the rows."""
        db = self.b.grad.T if self.b_transposed and self.b.grad is not None else self.b.grad
        gradients = {"dA": self.a.grad, "dB": db}
        return gradients if self.gate is None else {**gradients, "dg": self.gate.grad}

    @torch.no_grad()
    def set(self, a: Tensor, b: Tensor) -> None:
        """Take these values; gates get some of their own, so that a forgotten gate is a wrong result."""
        self.a.copy_(a)
        self.b.copy_(b.T if self.b_transposed else b)
        if self.gate is not None:
            self.gate.copy_(torch.linspace(0.5, 1.0, self.gate.numel()))


@dataclass
class Adapted:
    """A module with adapters, the adapters by the name of the linear, and which implementation runs."""

    module: Callable[..., tuple[Tensor, ...]]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    path: str = ""

    def parameters(self) -> list[nn.Parameter]:
        adapters = self.adapters.values()
        return [p for adapter in adapters for p in (adapter.a, adapter.b, adapter.gate) if p is not None]

    def clear(self) -> None:
        for param in self.parameters():
            param.grad = None


def linears(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and linear, of each linear in ``module``."""
    parents = list(module.modules())
    return [(p, name, child) for p in parents for name, child in p.named_children() if isinstance(child, nn.Linear)]


def swap(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> dict[str, Adapter]:
    """Replace each linear by what ``make`` returns, a module with Parameters a (r, K) and b (r, N)."""
    adapters = {}
    for parent, name, linear in linears(module):
        layer = make(linear)
        setattr(parent, name, layer)
        adapters[name] = Adapter(layer.a, layer.b)
    return adapters


def frozen(bench: Bench, module: nn.Module, rank: int) -> Adapted:
    """The linears alone."""
    return Adapted(module)


def peft_or_left_out():
    """The package.

    Raises:
        LeftOut: it can't be imported.
    """
    try:
        import peft
    except Exception as error:  # an installation that does not fit its transformers fails in many ways
        raise LeftOut(f"peft can't be imported: {type(error).__name__}: {error}") from error
    return peft


def install_peft(module: nn.Module, names: list[str], rank: int, fp32: bool, **more) -> nn.Module:
    """PEFT's LoRA on the linears with these names; ``fp32``: its default, adapters in float32 for any base."""
    peft = peft_or_left_out()
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=0.0, target_modules=names, **more)
    return peft.get_peft_model(module, config, autocast_adapter_dtype=fp32)


def peft_lora(fp32: bool, autocast: bool = False) -> Callable[[Bench, nn.Module, int], Adapted]:
    def adapt(bench: Bench, module: nn.Module, rank: int) -> Adapted:
        names = [name for _, name, _ in linears(module)]
        model = install_peft(module, names, rank, fp32).get_base_model()
        kind = peft_or_left_out().tuners.lora.LoraLayer
        layers = {name.rsplit(".", 1)[-1]: layer for name, layer in model.named_modules() if isinstance(layer, kind)}
        adapters = {n: Adapter(m.lora_A["default"].weight, m.lora_B["default"].weight, True) for n, m in layers.items()}
        if not autocast:
            return Adapted(model, adapters)

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(bench.device.type, dtype=torch.bfloat16) if bench.cuda else contextlib.nullcontext():
                return model(*inputs)

        return Adapted(forward, adapters)

    return adapt


class PlainLoRA(nn.Module):
    """LoRA as one would write it, for the compiler: float32 adapters, cast to the type of the activations."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = linear
        self.a, self.b = rows(linear, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALING * (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype)


def rows(linear: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Float32 A (r, K) and B (r, N)."""
    device = linear.weight.device
    return tuple(nn.Parameter(torch.empty(rank, n, device=device)) for n in (linear.in_features, linear.out_features))


def compiled(bench: Bench, module: nn.Module, rank: int) -> Adapted:
    """torch.compile over all linears at once, static shapes, default mode."""
    adapters = swap(module, lambda linear: PlainLoRA(linear, rank))
    torch._dynamo.reset()
    module.compile(dynamic=False, backend="inductor" if bench.cuda else "aot_eager")
    return Adapted(module, adapters)


def unsloth_style(bench: Bench, module: nn.Module, rank: int) -> Adapted:
    adapters = swap(module, lambda linear: UnslothStyle(linear, *rows(linear, rank), SCALING))
    if isinstance(module, DecoderLinears):
        module.together = together
    return Adapted(module, adapters)


def lorafusion_style(bench: Bench, module: nn.Module, rank: int) -> Adapted:
    return Adapted(module, swap(module, lambda linear: LoRAFusionStyle(linear, *rows(linear, rank), SCALING)))


def ours(bench: Bench, module: nn.Module, rank: int, augment: bool = False) -> Adapted:
    """``l1ra.patch`` with its defaults, with or without padding behind wide weights; ranks stay as they are."""
    if augment and not any(padding_pays_off(m.in_features, m.out_features) for _, _, m in linears(module)):
        raise LeftOut("no layer here is wide enough for it")
    budget = rank * len(linears(module))
    l1ra.patch(module, budget, alpha=SCALING * rank, total_steps=1000, augment=augment).close()
    path = "; ".join(dict.fromkeys(row.path for row in l1ra.report(module).rows))
    adapters = {
        name.rsplit(".", 1)[-1]: Adapter(layer.lora_A, layer.lora_B, gate=layer.gate)
        for name, layer in module.named_modules()
        if isinstance(layer, l1ra.L1RALinear)
    }
    return Adapted(module, adapters, path)


# In the order of the tables.
PROVIDERS: dict[str, Callable[[Bench, nn.Module, int], Adapted]] = {
    FROZEN: frozen,
    "PEFT default": peft_lora(fp32=True),
    "PEFT default, autocast": peft_lora(fp32=True, autocast=True),
    "PEFT bf16": peft_lora(fp32=False),
    "torch.compile": compiled,
    "Unsloth-style": unsloth_style,
    "LoRAFusion-style": lorafusion_style,
    OURS: ours,
    f"{OURS}, aug": partial(ours, augment=True),
}
# In which way a provider stands in for a package.
NOTES = {
    "torch.compile": "plain LoRA, all linears in one graph, the default mode with static shapes.",
    "Unsloth-style": "its published structure, in our code: products onto the output by cuBLAS, a backward written by "
    "hand, one function for linears that read one input. Its kernels between the linears are not in it, nor does it "
    "write dX over X.",
    "LoRAFusion-style": "its published structure, in our code: X W^T + s H B is one Triton product, so is dX; one more "
    "kernel makes P and dB from one read of dY; X A^T and dA are cuBLAS's. Each linear by itself, without its batches "
    "of several adapters and without dropout.",
}
TESTED_BY = {OURS: required_tests.LAYER, f"{OURS}, aug": required_tests.AUGMENT}
