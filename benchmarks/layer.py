"""One adapted linear layer, and a training step of a small model: frozen, PEFT's LoRA, and L1RA, measured in turn.

Each round runs forward and backward of each of them once, another one first each time, in one process; ratios are taken
round by round, so that whatever else the machine does meets all of them alike. Outputs and gradients are checked before
anything is timed. On a CPU L1RA runs as plain PyTorch, on a GPU fused: the tables say which it was.

    python -m benchmarks.layer                                          # a few minutes; OMP_NUM_THREADS=1 for one core
    python -m benchmarks.layer --shapes 4096x4096 --tokens 8192 --dtype bf16
    python -m benchmarks.layer --json layer.json > layer.md
    python -m pytest benchmarks/test_layer_speed.py --benchmark-only     # the same layers under pytest-benchmark
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import l1ra
from benchmarks.common.environment import processor_name
from benchmarks.common.files import write_text
from benchmarks.common.statistics import ratios, spread
from benchmarks.common.tables import markdown_table, spread_text
from benchmarks.gpu import environment
from benchmarks.gpu.bench import Bench, LeftOut, WrongResult
from benchmarks.gpu.check import check
from benchmarks.gpu.linears import work
from benchmarks.gpu.problem import SCALING, single
from benchmarks.gpu.providers import PROVIDERS, install_peft
from benchmarks.gpu.providers import linears as linears_of
from benchmarks.gpu.sizes import Shape
from benchmarks.gpu.step import BottomBias
from benchmarks.gpu.tables import FROZEN, OURS
from benchmarks.gpu.timing import Budget, Work, interleave
from l1ra.layers.adapted_model import find_adapters

__all__ = ["TypedBench", "layer_works", "model_works"]

PEFT = "PEFT default"
COMPETITORS = (FROZEN, PEFT, OURS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# all-MiniLM-L6-v2's linear layers, and a square one of a small language model.
SHAPES = ((384, 384), (384, 1536), (1536, 384), (2048, 2048))
TOKENS, RANKS, ROUNDS = (512, 2048), (8, 16), 30
MODEL_RANK, BATCH, LENGTH = 8, 16, 64
# all-MiniLM-L6-v2's sizes. No dropout: all three have to compute the same.
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODEL_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class TypedBench(Bench):
    """A run with a dtype of its own; stdout is left to the tables."""

    products: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        return self.products

    def say(self, text: str = "") -> None:
        print(text, file=sys.stderr, flush=True)


Works = dict[str, Work]


def layer_works(bench: Bench, shape: Shape) -> tuple[Works, str]:
    """Forward and backward of the three layers, checked, on the same input and weight; and the path that ours takes.

    Raises:
        LeftOut: peft can't be imported.
        WrongResult: an output or a gradient is.
    """
    problem = single(bench, shape)
    works, path = {}, ""
    for name in COMPETITORS:
        adapted = PROVIDERS[name](bench, problem.build(), shape.rank)
        for linear, adapter in adapted.adapters.items():
            adapter.set(*problem.rows[linear])
        check(name, adapted, problem)
        works[name] = work(adapted, problem)
        path = adapted.path or path
    problem.forget()
    return works, path


def model_works(bench: Bench, rank: int, batch: int, length: int, probing: bool) -> tuple[Works, str]:
    """Training steps of the three models, on the same tokens and from the same weights; and the path of ours.

    Every linear layer has an adapter of ``rank``. Outputs are compared before anything trains.

    Args:
        probing: whether L1RA looks at the gradients in all of these steps, as it does in a third of a training's.

    Raises:
        LeftOut: peft can't be imported.
        WrongResult: the adapted models disagree.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(**MINILM)
    backbone = BertModel(config, add_pooling_layer=False).to(bench.device, bench.dtype).requires_grad_(False).train()
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=bench.device)
    models = {name: copy.deepcopy(backbone) for name in COMPETITORS}
    names = sorted({name for _, name, _ in linears_of(backbone)})
    install_peft(models[PEFT], names, rank, fp32=True)
    count = len(linears_of(backbone))
    # The timed steps are the first ones of a long training: no rank moves in them.
    late = {} if probing else {"warmup": 0.5}
    controller = l1ra.patch(
        models[OURS], rank * count, target_modules=names, alpha=SCALING * rank, total_steps=10_000, **late
    )
    _same_rows(models[OURS], models[PEFT])
    bottom = BottomBias(models[FROZEN])
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    trained[FROZEN] = [bottom.bias]
    gradient = bench.randn(batch, length, config.hidden_size)
    _same_results(models, tokens, gradient)
    path = "; ".join(dict.fromkeys(row.path for row in l1ra.report(models[OURS]).rows))

    def check_probing() -> None:
        riding = {layer.probe is not None for layer in controller.adapters.values()}
        if controller.steps and riding != {probing}:
            raise RuntimeError(f"probes ride along: {riding}, not {probing} as the table says.")

    works = {name: _step(models[name], trained[name], tokens, gradient) for name in COMPETITORS}
    works[OURS].before = check_probing
    return works, path


@torch.no_grad()
def _same_rows(ours: nn.Module, theirs: nn.Module) -> None:
    """Random B in both models, and our A in both."""
    for name, layer in find_adapters(ours):
        layer.lora_B.normal_(std=0.02)
        other = theirs.get_submodule(name)
        other.lora_A["default"].weight.copy_(layer.lora_A)
        other.lora_B["default"].weight.copy_(layer.lora_B.T)


def _same_results(models: dict[str, nn.Module], tokens: Tensor, gradient: Tensor) -> None:
    """Outputs and gradients of A and B agree.

    Raises:
        WrongResult: they don't.
    """
    found = {}
    for name in (PEFT, OURS):
        output = models[name](input_ids=tokens).last_hidden_state
        output.backward(gradient)
        found[name] = [output]
    for name, layer in find_adapters(models[OURS]):
        other = models[PEFT].get_submodule(name)
        found[OURS] += [layer.lora_A.grad, layer.lora_B.grad]
        found[PEFT] += [other.lora_A["default"].weight.grad, other.lora_B["default"].weight.grad.T]
    for ours, theirs in zip(found[OURS], found[PEFT], strict=True):
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        # Written so that NaN does not pass.
        if not error <= MODEL_BOUNDS[gradient.dtype]:
            raise WrongResult(f"the model with L1RA differs from the one with PEFT by {error:.1e}.")


def _step(model: nn.Module, trained: list[nn.Parameter], tokens: Tensor, gradient: Tensor) -> Work:
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    optimizer.zero_grad()
    held = {}

    def forward() -> None:
        held["output"] = model(input_ids=tokens).last_hidden_state

    def backward() -> None:
        held.pop("output").backward(gradient)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Work({"forward": forward, "backward": backward, "update": update})


def measure(bench: Bench, title: dict[str, Any], works: Works, path: str, rounds: int) -> dict[str, Any]:
    """A row of the results: milliseconds of each competitor, of each part, and percentages round by round."""
    samples = interleave(bench.clock, works, rounds, Budget(math.inf))
    total = {name: [s.total for s in samples[name]] for name in works}
    row = {
        **title,
        "path": path,
        "ms": {name: spread(values) for name, values in total.items()},
        "parts_ms": {
            name: {part: spread([s.parts[part] for s in samples[name]]) for part in works[name].parts} for name in works
        },
        "over_frozen_percent": {name: ratios(total[name], total[FROZEN]) for name in (PEFT, OURS)},
        "ours_over_peft_percent": ratios(total[OURS], total[PEFT]),
    }
    over = row["ours_over_peft_percent"]
    bench.say(f"  {name_of(row)}: ours {spread_text(over, '+.1f')} % over PEFT")
    return row


def name_of(row: dict[str, Any]) -> str:
    if "model" in row:
        probes = ", probes ride along" if row["probing"] else ""
        return f"{row['model']}, {row['batch']} x {row['length']} tokens, r={row['r']}, with AdamW{probes}"
    return f"M={row['M']} {row['K']} → {row['N']} r={row['r']}"


def surroundings(bench: Bench) -> dict[str, Any]:
    """Hardware, versions, threads, seed, and how busy the machine is."""
    found = environment.run(bench)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**found, "processor": processor_name(), "cores": cores, "load_before": load()}


def load() -> float | None:
    """Processes that wanted to run, mean of the last minute; this one is among them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def markdown(results: dict[str, Any]) -> str:
    found = results["environment"]
    packages = ", ".join(f"{p} {found['packages'][p]}" for p in ("torch", "triton", "transformers", "peft"))
    where = found["processor"] if found["device"] == "CPU" else f"{found['device']} on {found['processor']}"
    lines = [
        f"{where}, {found['cores']} cores for this process, {found['cpu_threads']} threads; Python {found['python']}, "
        f"{packages}; {found['dtype']}, seed {found['seed']}, commit {found['commit']}; load of the machine "
        f"{found['load_before']} before, {found['load_after']} after.",
        "",
        "Milliseconds of forward + backward, median; percentages round by round, median (20th to 80th percentile).",
        "",
    ]
    head = ["", "frozen", "PEFT", "L1RA", "PEFT over frozen", "L1RA over frozen", "**L1RA over PEFT**", "rounds"]
    rows = []
    for row in results["rows"]:
        over = row["over_frozen_percent"]
        cells = [f"{row['ms'][name]['median']:.2f}" for name in COMPETITORS]
        percents = (over[PEFT], over[OURS], row["ours_over_peft_percent"])
        cells += [f"{spread_text(percent, '+.1f')} %" for percent in percents]
        rows.append([name_of(row), *cells, str(row["ms"][OURS]["n"])])
    paths = dict.fromkeys(row["path"] for row in results["rows"])
    return "\n".join([*lines, markdown_table(head, rows), "", f"L1RA ran as: {'; '.join(paths)}."]) + "\n"


def run(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for.

    Raises:
        LeftOut: peft can't be imported.
        WrongResult: a result is, and nothing after it was timed.
    """
    torch.manual_seed(bench.seed)
    results: dict[str, Any] = {"environment": surroundings(bench), "rows": []}
    for inputs, outputs in arguments.shapes:
        for tokens in arguments.tokens:
            for rank in arguments.rank:
                title = {"M": tokens, "K": inputs, "N": outputs, "r": rank}
                works, path = layer_works(bench, Shape(tokens, inputs, outputs, rank))
                results["rows"].append(measure(bench, title, works, path, arguments.rounds))
                bench.clock.release()
    size = {"batch": arguments.batch, "length": arguments.length}
    for probing in (False, True) if arguments.model else ():
        works, path = model_works(bench, MODEL_RANK, **size, probing=probing)
        title = {"model": "MiniLM shape", **size, "r": MODEL_RANK, "probing": probing}
        results["rows"].append(measure(bench, title, works, path, arguments.rounds))
    results["environment"]["load_after"] = load()
    return results


def shape(text: str) -> tuple[int, int]:
    inputs, _, outputs = text.partition("x")
    if not (inputs.isdigit() and outputs.isdigit() and int(inputs) and int(outputs)):
        raise argparse.ArgumentTypeError(f"write inputs and outputs as 384x1536, not {text!r}")
    return int(inputs), int(outputs)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shapes", nargs="*", type=shape, default=list(SHAPES), metavar="KxN", help="inputs x outputs")
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--rank", nargs="+", type=int, default=list(RANKS))
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--rounds", type=int, default=ROUNDS, help="at least 3")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, help="of torch on the CPU")
    p.add_argument("--no-model", dest="model", action="store_false", help="layers only")
    p.add_argument("--batch", type=int, default=BATCH, help="of the model's step")
    p.add_argument("--length", type=int, default=LENGTH, help="tokens of each of its sequences, at most 512")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    bench = TypedBench(device, False, seed=arguments.seed, products=dtype)
    try:
        results = run(bench, arguments)
    except (LeftOut, WrongResult) as reason:
        print(f"nothing is reported: {reason}", file=sys.stderr)
        return 1
    if arguments.json:
        write_text(arguments.json, json.dumps(results, ensure_ascii=False) + "\n")
    print(markdown(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
