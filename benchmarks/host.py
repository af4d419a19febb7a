"""Host time of adapted layers, forward and backward, on a machine without a GPU: what Python and torch need to launch.

    python -m benchmarks.host [--rounds 15] [--backends eager aot_eager inductor]

Frozen layers, PEFT's default (float32 adapters), PEFT with bf16 adapters, and L1RA's fused path, compiled for an sm_90.
All products run, those of all four alike; layers have so few features that a product takes about as long as it takes to
launch one on a GPU. Launches of our kernels pass through all of Triton's Python, as on a GPU, but the driver below it
does nothing. So the driver's own part of a launch is in no figure: 2 to 4 microseconds, of our kernels as of torch's.
The last columns add ``DRIVER`` for each launch that the designs count; they are modelled.

All four are measured in turn, another one first each round, in process time: other load matters little.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from triton.runtime import driver

import l1ra
from benchmarks.common.environment import processor_name, versions
from benchmarks.common.statistics import spread
from benchmarks.common.tables import markdown_table
from benchmarks.compiled import ARCHITECTURES, _Driver, set_environment
from benchmarks.designs import DESIGNS, Shape
from benchmarks.gpu.problem import DecoderLinears
from benchmarks.gpu.providers import install_peft
from l1ra_kernels import choice, configs

__all__ = ["CASES", "main", "measure"]

ARCH = "sm_90"
DRIVER = 2.5  # microseconds of the driver for a launch, an assumption
HIDDEN, KV, MLP, RANK = 16, 8, 32, 8
EAGER = "eager"
BACKENDS = (EAGER, "aot_eager", "inductor")
FROZEN, PEFT, PEFT_BF16, OURS = "frozen", "PEFT default", "PEFT bf16", "L1RA"
NAMES = (FROZEN, PEFT, PEFT_BF16, OURS)
DESIGN_OF = {PEFT: "PEFT fp32, no autocast", PEFT_BF16: "PEFT bf16", OURS: "chain"}


class OnOneInput(nn.Module):
    """Linear layers that read one input."""

    def __init__(self, **outputs: int) -> None:
        super().__init__()
        inputs = outputs.pop("inputs", HIDDEN)
        for name, n in outputs.items():
            self.add_module(name, nn.Linear(inputs, n, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple([layer(x) for layer in self.children()])


def decoder_layer() -> nn.Module:
    sizes = {
        **{"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KV), "v_proj": (HIDDEN, KV), "o_proj": (HIDDEN, HIDDEN)},
        **{"gate_proj": (HIDDEN, MLP), "up_proj": (HIDDEN, MLP), "down_proj": (MLP, HIDDEN)},
    }
    return DecoderLinears({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


@dataclass(frozen=True)
class Case:
    """Frozen layers.

    Attributes:
        build: makes them.
        inputs: the shape of each input.
        groups: for each input, the outputs of the layers that read it.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]

    def launches(self, name: str, shared: bool) -> int:
        """Of a competitor, forward and backward, those of torch included."""
        frozen = sum(2 * len(outputs) + len(outputs) - 1 for outputs in self.groups)  # products, sums of dX
        if name == FROZEN:
            return frozen
        design, ours = DESIGNS[DESIGN_OF[name]], name == OURS
        count = frozen - sum(len(outputs) - 1 for outputs in self.groups if ours and shared)
        for shape, outputs in zip(self.inputs, self.groups, strict=True):
            for together in (outputs,) if ours and shared else [(n,) for n in outputs]:
                passes = design.count(Shape(math.prod(shape[:-1]), shape[-1], together, RANK))
                count += sum(t.launches for terms in passes for t in terms)
        return count


Q_K_V, GATE_UP = (HIDDEN, KV, KV), (MLP, MLP)
CASES = {
    "one linear, x (M, K)": Case(lambda: OnOneInput(proj=HIDDEN), ((8, HIDDEN),), ((HIDDEN,),)),
    "one linear, x (B, T, K)": Case(lambda: OnOneInput(proj=HIDDEN), ((2, 4, HIDDEN),), ((HIDDEN,),)),
    "q, k, v": Case(lambda: OnOneInput(q_proj=HIDDEN, k_proj=KV, v_proj=KV), ((2, 4, HIDDEN),), (Q_K_V,)),
    "gate, up": Case(lambda: OnOneInput(gate_proj=MLP, up_proj=MLP), ((2, 4, HIDDEN),), (GATE_UP,)),
    "o": Case(lambda: OnOneInput(o_proj=HIDDEN), ((2, 4, HIDDEN),), ((HIDDEN,),)),
    "down": Case(lambda: OnOneInput(down_proj=HIDDEN, inputs=MLP), ((2, 4, MLP),), ((HIDDEN,),)),
    "decoder layer, seven linears": Case(
        decoder_layer,
        tuple((2, 4, n) for n in (HIDDEN, HIDDEN, HIDDEN, MLP)),
        (Q_K_V, (HIDDEN,), GATE_UP, (HIDDEN,)),
    ),
}


class _IdleDriver(_Driver):
    """Triton's driver for a GPU that is not there: it loads and launches nothing."""

    def __init__(self) -> None:
        super().__init__(ARCHITECTURES[ARCH].target)
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), 0, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": ARCHITECTURES[ARCH].shared},
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return _launch_nothing


def _launch_nothing(*args: Any) -> None:
    pass


@contextmanager
def fused_without_a_gpu() -> Iterator[None]:
    """Within the block, tensors on the CPU take the fused path, whose launches do nothing."""
    set_environment()
    driver.set_active(_IdleDriver())
    with ExitStack() as stack:
        stack.enter_context(patch.object(choice, "_INTERPRETING", True))  # the path is open to tensors on the CPU
        stack.enter_context(patch.object(configs, "architecture", lambda device: ARCH))
        stack.enter_context(choice.using("fused"))
        yield


def adapted(case: Case) -> dict[str, nn.Module]:
    """The four competitors, with the same frozen layers in bf16."""
    base = case.build().to(torch.bfloat16).requires_grad_(False)
    names = [name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    models = {name: copy.deepcopy(base) for name in NAMES}
    for name, fp32 in ((PEFT, True), (PEFT_BF16, False)):
        models[name] = install_peft(models[name], names, RANK, fp32).get_base_model()
    # The timed steps are the first ones of a long training: no rank moves in them, and no probe rides along.
    l1ra.patch(models[OURS], RANK * len(names), target_modules=names, total_steps=10**6, warmup=0.5)
    return models


def step(model: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], parameters: list[Tensor]) -> float:
    """CPU seconds of a forward and a backward."""
    for tensor in (*inputs, *parameters):
        tensor.grad = None
    start = time.process_time()
    outputs = model(*inputs)
    between = time.process_time()
    gradients = [torch.ones_like(y) for y in outputs]
    again = time.process_time()
    torch.autograd.backward(outputs, gradients)
    return time.process_time() - again + between - start


def measure(case: Case, rounds: int, repeats: int, backend: str) -> dict[str, list[float]]:
    """Microseconds of a forward and backward, a value for each round: the mean of ``repeats``."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with fused_without_a_gpu():
        works, optimizers = {}, {}
        for name, model in adapted(case).items():
            parameters = [p for p in model.parameters() if p.requires_grad]
            inputs = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in case.inputs]
            run = model if backend == EAGER else torch.compile(model, backend=backend)
            works[name] = (run, inputs, parameters)
            # Layers begin to share reads after a step.
            optimizers[name] = torch.optim.SGD(parameters or inputs, lr=0.0)
            for _ in range(3):
                step(*works[name])
                optimizers[name].step()
        for i in range(rounds):
            for name in (*NAMES[i % len(NAMES) :], *NAMES[: i % len(NAMES)]):
                found[name].append(sum(step(*works[name]) for _ in range(repeats)) / repeats * 1e6)
                optimizers[name].step()
    return found


def line(title: str, case: Case, found: dict[str, list[float]], backend: str) -> list[str]:
    launches = {name: case.launches(name, shared=backend == EAGER) for name in NAMES}
    cells = [f"{spread(found[name])['median']:.0f}" for name in NAMES]
    for driver_us in (0.0, DRIVER):
        for other in (PEFT, PEFT_BF16):
            pairs = zip(found[OURS], found[other], strict=True)
            more, theirs = driver_us * launches[OURS], driver_us * launches[other]
            ratio = spread([(a + more) / (b + theirs) for a, b in pairs])
            text = f"{ratio['median']:.2f}"
            cells.append(text if driver_us else f"{text} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
    counts = " / ".join(str(launches[name]) for name in NAMES) if backend == EAGER else ""
    cells = [*cells[:6], *(cells[6:] if backend == EAGER else ("", "")), counts]
    return [title if backend == EAGER else f"{title}; {backend}", *cells]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=30, help="steps of a round")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="these cases")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[EAGER], help="default: eager")
    parser.add_argument("--tiny", action="store_true", help="one round of two steps: finds bugs, measures nothing")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: kernels would not be compiled. Unset it.", file=sys.stderr)
        return 2
    rounds, repeats = (1, 2) if arguments.tiny else (arguments.rounds, arguments.repeats)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for backend in arguments.backends:
        for title in arguments.only:
            torch.compiler.reset()
            lines.append(line(title, CASES[title], measure(CASES[title], rounds, repeats, backend), backend))
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    packages = ", ".join(f"{name} {version}" for name, version in versions("torch", "peft", "triton").items())
    print(f"{processor_name()}, one thread; {packages}; {rounds} rounds of {repeats} steps.\n")
    ratios = ["**over PEFT default**", "over PEFT bf16"]
    head = ["µs", *NAMES, *(f"L1RA {ratio}" for ratio in ratios), *(f"{ratio}, with driver" for ratio in ratios)]
    print(markdown_table([*head, "launches of the four"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
