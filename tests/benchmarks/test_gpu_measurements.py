"""What the benchmark program for GPUs measures, on a CPU with tiny sizes: who is timed and left out, and how."""

import sys

import pytest
import torch

from benchmarks.gpu import bench, check, linears, llama, providers, sizes, step, tables, timing
from benchmarks.gpu.problem import decoder_layer


def tiny_bench(**more):
    return bench.Bench(torch.device("cpu"), True, **more)


# --- competitors


def doubled(run, module, rank):
    adapted = providers.ours(run, module, rank)
    layers = adapted.module
    return providers.Adapted(lambda *x: tuple(2 * y for y in layers(*x)), adapted.adapters)


def wrong_gradient(run, module, rank):
    adapted = providers.ours(run, module, rank)
    for adapter in adapted.adapters.values():
        adapter.a.register_hook(lambda grad: grad * torch.nan)
    return adapted


def gate_forgotten(run, module, rank):
    adapted = providers.ours(run, module, rank)
    for adapter in adapted.adapters.values():
        adapter.gate.requires_grad_(False)
    return adapted


def skipping(**more):
    return tiny_bench(results={"correctness": "skipped"}, budget=timing.Budget(100), **more)


@pytest.mark.parametrize("wrong", [doubled, wrong_gradient, gate_forgotten])
@pytest.mark.parametrize("name", ["ours", "a competitor"])
def test_whoever_is_wrong_is_not_timed_and_a_wrong_result_of_ours_is_a_failure(name, wrong, monkeypatch):
    given = skipping()
    monkeypatch.setattr(providers, "PROVIDERS", {"frozen": providers.frozen, name: wrong, "fine": providers.ours})
    for problem in linears.run(given)["tables"]:
        assert [row["provider"] for row in problem["rows"]] == ["frozen", "fine"]
        assert problem["left_out"][name].startswith("wrong: ")
    assert len(given.failed) == (3 if name == "ours" else 0)


def test_a_competitor_that_breaks_or_is_missing_is_left_out_by_name(monkeypatch):
    def breaks(run, module, rank):
        raise RuntimeError("out of luck")

    def missing(run, module, rank):
        raise bench.LeftOut("not on this machine")

    given = {"frozen": providers.frozen, "broken": breaks, "missing": missing, "ours": providers.ours}
    monkeypatch.setattr(providers, "PROVIDERS", given)
    found = skipping()
    for problem in linears.run(found)["tables"]:
        assert [row["provider"] for row in problem["rows"]] == ["frozen", "ours"]
        assert problem["left_out"] == {"broken": "failed: RuntimeError: out of luck", "missing": "not on this machine"}
    assert len(found.failed) == 3
    assert "Left out: missing: not on this machine." in tables.markdown(found.results)


def test_what_is_timed_launches_the_very_kernels_that_were_checked(monkeypatch):
    pytest.importorskip("triton")
    from l1ra_kernels import choice, launch

    if not choice.interpreting():
        pytest.skip("needs triton's interpreter: TRITON_INTERPRET=1")
    launched, passes = [], []

    def seen(call):
        launched.clear()
        call()
        passes.append(sorted(launched))

    def spy(kernel, grid, *args, **meta):
        launched.append((kernel.fn.__name__, meta.get("G", 1)))
        kernel[grid](*args, **meta)

    def interleave(clock, works, rounds, budget):
        for _ in range(2):
            seen(lambda: samples.append(clock.measure(works["ours"])))
        return dict.fromkeys(works, samples)

    samples, compared, settle = [], linears.check, check.settle
    monkeypatch.setattr(check, "settle", lambda *args: (settle(*args), launched.clear()))
    monkeypatch.setattr(providers, "PROVIDERS", {"ours": providers.ours})
    monkeypatch.setattr(linears, "check", lambda *args: seen(lambda: compared(*args)) or {})
    monkeypatch.setattr(linears, "interleave", interleave)
    given = skipping()
    layer = decoder_layer(given, sizes.LITTLE, 8, 4)
    with choice.using("fused"), launch.redirected(spy):
        linears.one_problem(given, layer, timing.Budget(100))
    checked, *timed = passes
    assert timed == [checked, checked]
    assert {G for name, G in checked if name == "_shrink"} == {1, 2, 3}


def test_one_that_breaks_while_it_is_timed_is_left_out_and_the_others_are_timed(monkeypatch):
    def breaks_later(run, module, rank):
        calls = iter([None] * 4)
        adapted = providers.unsloth_style(run, module, rank)
        layers = adapted.module

        def forward(*x):
            next(calls)
            return layers(*x)

        return providers.Adapted(forward, adapted.adapters)

    monkeypatch.setattr(providers, "PROVIDERS", {"frozen": providers.frozen, "late": breaks_later})
    given = skipping()
    for layers in linears.run(given)["tables"]:
        assert [row["provider"] for row in layers["rows"]] == ["frozen"]
        assert layers["left_out"]["late"].startswith("failed: StopIteration")
    assert len(given.failed) == 3


def test_without_peft_its_providers_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(bench.LeftOut, match="peft can't be imported"):
        providers.peft_or_left_out()


# --- the clock


def test_competitors_take_turns_and_each_leads_a_round():
    calls = []
    works = {name: timing.Work({"part": lambda name=name: calls.append(name)}) for name in "abc"}
    clock = timing.Clock(torch.device("cpu"), 1)
    samples = timing.interleave(clock, works, rounds=4, budget=timing.Budget(100))
    measured = "".join(calls[timing.WARM_UPS * len(works) :])
    assert measured == "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_without_time_there_are_three_rounds_and_no_more():
    works = {"a": timing.Work({"part": lambda: None})}
    samples = timing.interleave(timing.Clock(torch.device("cpu"), 1), works, rounds=40, budget=timing.Budget(0))
    assert len(samples["a"]) == timing.MIN_ROUNDS


@pytest.mark.parametrize("name", step.PROVIDERS)
def test_the_model_is_as_before_once_an_adapter_is_out_again(name):
    run = tiny_bench()
    model = llama.build(run, sizes.LITTLE)

    def picture():
        return {n: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}

    before = picture()
    attach = step.PROVIDERS[name]
    with attach(run, model, 4) as (params, _, _):
        assert params and all(p.requires_grad for p in params)
        assert picture() != before
    assert picture() == before and not any(p.requires_grad for p in model.parameters())


def test_competitors_in_a_training_step_have_the_same_budget():
    run = tiny_bench()
    model = llama.build(run, sizes.LITTLE)
    trained = {}
    for name in ("PEFT default", "ours"):
        with step.PROVIDERS[name](run, model, 4) as (params, _, _):
            trained[name] = sum(p.numel() for p in params if p.dim() == 2)
    assert trained["PEFT default"] == trained["ours"]


def test_on_a_gpu_the_device_is_kept_busy_while_the_host_queues(monkeypatch):
    log, now = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.at - self.at

    def read(buffer, dim, out, real=torch.sum):
        log.append("flush")
        return real(buffer, dim, out=out)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing.Clock, "cuda", property(lambda self: True))
    monkeypatch.setattr(torch, "sum", read)
    clock = timing.Clock(torch.device("cpu"), 1 << 16)
    clock._prepare()
    monkeypatch.setattr(clock, "_flush_ms", 0.5)
    assert clock._flush.nbytes == 1 << 16
    log.clear()
    written = clock._flush._version
    work = timing.Work({"forward": lambda: log.append("forward"), "backward": lambda: log.append("backward")})
    sample = clock.measure(work, host_ms=1.0)
    # 1.2 times what the host is expected to take; by reads alone.
    assert log == ["wait", *["flush"] * 4, "event", "forward", "event", "backward", "event", "wait"]
    assert clock._flush._version == written
    assert sample.parts == {"forward": 1, "backward": 1} and sample.total == 2


def test_what_was_lost_is_listed_also_in_memory():
    def row(name, ms, peak):
        return {"provider": name, "total_ms": {"median": ms}, "peak_mib": peak}

    rows = [row("frozen", 1.0, 10), row("lean", 3.0, 20), row("fast", 1.5, 40), row("ours", 2.0, 30)]
    results = {"linears": {"tables": [{"title": "a layer", "rows": rows}]}}
    text = tables.verdict(results)
    assert "less time in 1 of 2" in text
    assert "a layer: 33.3 % slower than fast" in text and "a layer: 50.0 % more peak memory than lean" in text
    assert "slower than lean" not in text and "frozen" not in text
