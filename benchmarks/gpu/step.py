"""One training step of a whole, randomly initialised model: frozen backbone, PEFT and ours, at equal budgets.

The model is built once; adapters are put in and taken out again in every round, a different competitor first each time.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import l1ra
from benchmarks.common.statistics import ratios, spread
from benchmarks.common.tables import spread_text
from benchmarks.gpu import required_tests
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.llama import build
from benchmarks.gpu.providers import install_peft
from benchmarks.gpu.sizes import ModelShape
from benchmarks.gpu.tables import FROZEN, OURS
from benchmarks.gpu.timing import Budget

__all__ = ["PROVIDERS", "run"]

# The optimizer's first step writes the parameters: from the second forward on, ours reads shared inputs once.
WARM_UPS = 2


class BottomBias:
    """Adds a trainable vector to the embeddings: the least that makes backward run through the whole model."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = model.get_input_embeddings()
        weight = embeddings.weight
        self.bias = nn.Parameter(torch.zeros(weight.shape[1], device=weight.device, dtype=weight.dtype))
        self.handle = embeddings.register_forward_hook(lambda module, args, output: output + self.bias)


@contextmanager
def frozen(bench: Bench, model: nn.Module, rank: int):
    bottom = BottomBias(model)
    try:
        yield [bottom.bias], "", "1 vector at the bottom"
    finally:
        bottom.handle.remove()


def peft_lora(fp32: bool):
    @contextmanager
    def attach(bench: Bench, model: nn.Module, rank: int):
        wrapped = install_peft(model, names(bench), rank, fp32, task_type="CAUSAL_LM")
        try:
            yield [p for p in wrapped.parameters() if p.requires_grad], "", ""
        finally:
            wrapped.unload()
            # With gradient checkpointing PEFT leaves a hook on the embeddings; older versions leave their settings too.
            if getattr(model, "_require_grads_hook", None) is not None:
                model.disable_input_require_grads()
            vars(model).pop("peft_config", None)

    return attach


def ours(probing: bool):
    @contextmanager
    def attach(bench: Bench, model: nn.Module, rank: int):
        adapters = len(names(bench)) * model.config.num_hidden_layers
        # The timed steps are the first ones of a long training: no reallocation falls into them, and probes ride along
        # in all of them, or in none where the first interval with a reallocation is far off.
        late = {} if probing else {"warmup": 0.5}
        controller = l1ra.patch(model, rank * adapters, target_modules=names(bench), total_steps=10_000, **late)
        try:
            paths = "; ".join(dict.fromkeys(row.path for row in l1ra.report(model).rows))
            yield [p for p in model.parameters() if p.requires_grad], paths, ""
            riding = {layer.probe is not None for layer in controller.adapters.values()}
            if controller.steps and riding != {probing}:
                raise RuntimeError(f"probes ride along: {riding}, not {probing} as the table says.")
        finally:
            l1ra.unpatch(model)

    return attach


PROVIDERS: dict[str, Callable] = {
    FROZEN: frozen,
    "PEFT default": peft_lora(fp32=True),
    "PEFT bf16": peft_lora(fp32=False),
    OURS: ours(probing=False),
    # What a step costs while it collects directions for new ranks: half of the interval before each reallocation.
    f"{OURS}, probing": ours(probing=True),
}


def names(bench: Bench) -> list[str]:
    return list(bench.sizes.layer.linears)


def run(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = bench.results.setdefault("step", {"tables": [], "left_out": []})
    models = bench.sizes.models
    # Of the tables of an earlier process that died, the last one may lack rounds.
    for i, shape in list(enumerate(models))[max(0, len(found["tables"]) - 1) :]:
        if bench.budget.left <= 0:
            found["left_out"].append(f"{shape.name}: {bench.no_time(f'step of the {shape.name}')}")
            continue
        # The last model is the largest one by far.
        share = 1.0 if i == len(models) - 1 else 0.3
        for rows in one_model(bench, shape, Budget(share * bench.budget.left)):
            found["tables"][i:] = [rows]
            bench.save()
        show(bench, found["tables"][-1])
    return found


def one_model(bench: Bench, shape: ModelShape, budget: Budget) -> Iterator[dict[str, Any]]:
    """After each round the table so far."""
    bench.clock.release()
    start = time.monotonic()
    model = build(bench, shape)
    bench.say(f"  {shape.name} built in {time.monotonic() - start:.1f} s")
    tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=bench.device)
    seen: dict[str, dict[str, list]] = {}
    left_out: dict[str, str] = {}
    longest = 0.0
    for turn in range(bench.sizes.model_rounds):
        start = time.monotonic()
        if turn and longest > budget.left:
            break
        order = list(PROVIDERS)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name in left_out:
                continue
            try:
                bench.admit(name, required_tests.STEP if name.startswith(OURS) else ())
                result = one_turn(bench, model, tokens, PROVIDERS[name], shape)
            except Exception as error:
                bench.leave_out(left_out, shape.name, name, error)
                continue
            bench.at = None
            held = seen.setdefault(name, {"seconds": [], "peak": [], **result})
            held["seconds"] += result["times"]
            held["peak"].append(result["peak_bytes"])
            bench.say(
                f"    round {turn + 1}  {name:16s} " + " ".join(f"{1e3 * t:.1f}" for t in result["times"]) + " ms"
            )
        longest = max(longest, time.monotonic() - start)
        yield table(bench, shape, seen, left_out)
    del model
    bench.clock.release()


def one_turn(bench: Bench, model: nn.Module, tokens: Tensor, attach: Callable, shape: ModelShape) -> dict[str, Any]:
    """Put the adapters in, warm up, time some steps, take them out."""
    with attach(bench, model, bench.sizes.model_rank) as (params, path, note):
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=bench.cuda)
        trained = sum(p.numel() for p in params)
        model.train()
        for _ in range(WARM_UPS):
            loss = step(model, tokens, optimizer)
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [timed(bench, functools.partial(step, model, tokens, optimizer)) for _ in range(shape.steps)]
        peak = torch.cuda.max_memory_allocated() if bench.cuda else None
        value = loss.item()
        optimizer.zero_grad()
    del optimizer, params, loss
    gc.collect()
    # Not a number, or a loss far from that of a random guess, is a step that trains nothing.
    if not 0 < value < 10 * torch.tensor(float(shape.vocabulary)).log().item():
        raise RuntimeError(f"the loss after {WARM_UPS} steps is {value}")
    return {"times": times, "peak_bytes": peak, "trained": trained, "path": path, "note": note}


def step(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds by the wall clock, the host's part in it: a training step has no queue to hide behind."""
    if bench.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if bench.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(bench: Bench, shape: ModelShape, seen: dict, left_out: dict[str, str]) -> dict[str, Any]:
    tokens = shape.batch * shape.sequence
    base = seen.get(FROZEN, {}).get("seconds")
    rows = []
    for name in ordered(PROVIDERS, seen):
        held = seen[name]
        same_rounds = base is not None and len(base) == len(held["seconds"])
        rows.append(
            {
                "provider": name,
                "path": held["path"],
                "note": held["note"],
                "step_ms": spread([1e3 * s for s in held["seconds"]]),
                "tokens_per_s": spread([tokens / s for s in held["seconds"]]),
                "overhead_percent": ratios(held["seconds"], base) if same_rounds else None,
                "peak_gib": None if held["peak"][0] is None else max(held["peak"]) / 2**30,
                "trained_parameters": held["trained"],
            }
        )
    return {
        "model": shape.name,
        "batch": shape.batch,
        "sequence": shape.sequence,
        "checkpointing": shape.checkpointing,
        "rank": bench.sizes.model_rank,
        "rows": rows,
        "left_out": left_out,
    }


def ordered(order: Iterable[str], found: dict[str, Any]) -> list[str]:
    return [name for name in order if name in found]


def show(bench: Bench, found: dict[str, Any]) -> None:
    bench.say(f"  {found['model']}, {found['batch']} x {found['sequence']} tokens")
    for row in found["rows"]:
        over, peak = row["overhead_percent"], row["peak_gib"]
        bench.say(
            f"    {row['provider']:16s} {row['step_ms']['median']:9.1f} ms  "
            f"{row['tokens_per_s']['median']:9.0f} tokens/s"
            + ("" if over is None else f"  {spread_text(over, '+.1f')} %")
            + ("" if peak is None else f"  {peak:6.2f} GiB")
            + (f"  [{row['path']}]" if row["path"] else "")
        )
    for name, reason in found["left_out"].items():
        bench.say(f"    left out: {name}: {reason}")
