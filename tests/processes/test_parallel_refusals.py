"""What can't be done under tensor parallelism and FSDP 1 is refused by name, in two real processes (gloo)."""

import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
from helpers import BRISK, MLP, Residual, assert_untouched, patched, same_bits, snapshot, step, trainable
from torch import distributed, multiprocessing, nn

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, lambda_auto_wrap_policy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import l1ra

NOT_WHOLE = "under tensor parallelism (parallelize_module, tp_plan) each process computes a part of the layer"
FLAT = "FullyShardedDataParallel (FSDP 1) holds blocks.0 and other adapters as parts of flat tensors"


def refused(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)


def mesh():
    return distributed.init_device_mesh("cpu", (2,))


def parallel_mlp(depth=2):
    """The first layers divided among the processes, the last one whole if there are three."""
    torch.manual_seed(0)
    model = MLP((6, 10, 8, 4)[: depth + 2])
    plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
    return parallelize_module(model, mesh(), plan)


def divided_before(number):
    model, x = parallel_mlp(), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    before = model(x).detach()
    untouched = snapshot(model)
    named = refused(lambda: l1ra.patch(model, 4, target_modules=["layers.1", "layers.2"]))
    assert_untouched(model, untouched)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        controller = l1ra.patch(model, 4, reserve=4, **BRISK)
        same = torch.equal(model(x), before)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        losses = [step(model, optimizer, x, torch.ones(16, 4)).item() for _ in range(30)]
    return {
        "named": named,
        "none left": refused(lambda: l1ra.patch(parallel_mlp(1), 4)),
        "by itself": refused(lambda: l1ra.L1RALinear.from_linear(model.layers[0], rank=2)),
        "said": [str(warning.message) for warning in said],
        "adapted": list(controller.adapters),
        "same": same,
        "losses": losses,
    }


def divided_after(number):
    model, *_ = patched()
    parallelize_module(model, mesh(), {"blocks.1.base_layer": ColwiseParallel()})
    return {"forward": refused(lambda: model(torch.randn(2, 12)))}


def sharded_before(number):
    """FSDP 2 divides weights, too, but not what a layer computes."""
    model = fully_shard(Residual(), mesh=mesh())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        controller = l1ra.patch(model, 16, reserve=12)
    return {"adapted": len(controller.adapters), "said": [str(warning.message) for warning in said]}


def summoned(number, folder, reserve):
    """A training under FSDP 1 with original parameters."""
    torch.manual_seed(0)
    model, controller, _, x, y = patched(reserve=reserve)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({l1ra.L1RALinear}), use_orig_params=True, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for _ in range(20):
            step(wrapped, optimizer, x[number::2], y[number::2])
    told = [str(warning.message) for warning in said if "rank" in str(warning.message)]
    found = {"said": told, "ranks": controller.ranks, "statistics": controller.statistics(), "text": str(wrapped)}
    own = folder / f"process {number}, reserve {reserve}"
    calls = {
        "save": lambda: controller.save(own / "saved"),
        "export": lambda: l1ra.export_peft(model, own / "exported"),
        "state": controller.state_dict,
        "load": lambda: controller.load_state_dict({}),
        "report": lambda: l1ra.report(model),
        "merge": lambda: l1ra.merge(model),
        "reference": controller.set_reference,
    }
    found["refused"] = {name: refused(call) for name, call in calls.items()}
    found["written"] = own.exists()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        whole = {n: [p.clone() for p in (a.lora_A, a.gate, a.lora_B)] for n, a in controller.adapters.items()}
        controller.load_state_dict(controller.state_dict())
        calls["save"](), calls["export"](), calls["report"]()
    found["gates"] = [gate[:4].tolist() for _, gate, _ in whole.values()]
    found["trained"] = all(b.any() for *_, b in whole.values())
    found["output"] = wrapped(x).detach()
    return found | {"x": x, "whole": whole, "saved": own}


def flat(number):
    """Without original parameters the optimizer holds flat ones."""
    model, _, _, x, y = patched()
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, l1ra.L1RALinear | nn.Linear))
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    optimizer, other = (torch.optim.SGD(trainable(m), lr=1e-2) for m in (wrapped, nn.Linear(2, 2)))
    other.step()  # of another model: none of this one's business
    return {"step": refused(lambda: step(wrapped, optimizer, x, y))}


def by_hand(number):
    model, controller, _, x, y = patched(auto=False)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    step(wrapped, optimizer, x, y)
    return {"step": refused(lambda: controller.step(optimizer))}


def work(number, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2, "timeout": limit}
    distributed.init_process_group("gloo", **meeting)
    cases = (divided_before, divided_after, sharded_before, flat, by_hand)
    found = {case.__name__: case(number) for case in cases}
    found |= {f"reserve {reserve}": summoned(number, folder, reserve) for reserve in (None, 12)}
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def test_layers_under_tensor_parallelism_are_left_out_and_named(found):
    for part in found:
        told = part["divided_before"]
        (left_out,) = told["said"]
        assert left_out.startswith("layers.0, layers.1 can't be adapted") and NOT_WHOLE in left_out
        assert told["adapted"] == ["layers.2"] and told["same"] and told["losses"][-1] < told["losses"][0]
    assert found[0]["divided_before"]["losses"] == found[1]["divided_before"]["losses"]


def test_layers_under_tensor_parallelism_that_are_named_are_refused(found):
    for part in found:
        kind, said = part["divided_before"]["named"]
        assert (
            kind == "ValueError" and said.startswith("target_modules: layers.1 can't be adapted") and NOT_WHOLE in said
        )
        kind, said = part["divided_before"]["none left"]
        assert kind == "ValueError" and said.startswith('target_modules="all-linear": layers.0, layers.1 can')
        assert (
            part["divided_before"]["by itself"][0] == "TypeError"
            and NOT_WHOLE in part["divided_before"]["by itself"][1]
        )


def test_an_adapted_layer_that_is_divided_later_says_so_when_it_is_called(found):
    for part in found:
        kind, said = part["divided_after"]["forward"]
        assert kind == "RuntimeError" and NOT_WHOLE in said and "Leave the adapted layers out of the plan" in said


def test_weights_that_fsdp_2_has_sharded_are_adapted(found):
    assert all(part["sharded_before"] == {"adapted": 4, "said": []} for part in found)


@pytest.mark.parametrize("mark", [{"_hf_tp_plan": "colwise"}, {"forward": None}], ids=str)
def test_layers_that_transformers_has_divided_are_known_by_its_marks(mark):
    def tp_forward(x):
        return x

    model = MLP()
    vars(model.layers[0]).update({name: value or tp_forward for name, value in mark.items()})
    with pytest.warns(UserWarning, match=r"layers\.0 can't be adapted: under tensor parallelism"):
        controller = l1ra.patch(model, 4)
    assert list(controller.adapters) == ["layers.1", "layers.2"]


@pytest.mark.parametrize("reserve", [None, 12])
def test_under_fsdp_1_ranks_and_gates_rest(found, reserve):
    for part in found:
        told = part[f"reserve {reserve}"]
        (said,) = told["said"]
        assert "no rank moves" in said and "(FSDP 1)" in said and "fully_shard in its place" in said
        assert set(told["ranks"].values()) == {4} and told["statistics"]["l1ra/ranks"] == 16
        assert told["gates"] == [[1.0] * 4] * 4 and told["trained"] and "rank=4" in told["text"]


@pytest.mark.parametrize("reserve", [None, 12])
def test_fsdp_1_writes_whole_adapters_or_none(found, reserve):
    for part in found:
        told = part[f"reserve {reserve}"]
        for name, (kind, said) in told["refused"].items():
            assert kind == "RuntimeError" and "summon_full_params(wrapped_model)" in said, name
        assert told["refused"]["save"][1].startswith(FLAT) and not told["written"]
        model = Residual()
        controller = l1ra.load(plain_weights(model), told["saved"] / "saved")
        for name, layer in controller.adapters.items():
            loaded = zip((layer.lora_A, layer.gate, layer.lora_B), told["whole"][name], strict=True)
            assert all(same_bits(own, whole) for own, whole in loaded)
        assert torch.equal(model(told["x"]), told["output"])
        exported = l1ra.from_peft(plain_weights(Residual()), told["saved"] / "exported")
        torch.testing.assert_close(exported.model(told["x"]), told["output"])


def plain_weights(model):
    torch.manual_seed(0)
    for layer, own in zip(Residual().blocks, model.blocks, strict=True):
        own.load_state_dict(layer.state_dict())
    return model


def test_gates_within_flat_parameters_are_refused(found):
    for part in found:
        kind, said = part["flat"]["step"]
        assert kind == "RuntimeError" and "pass use_orig_params=True" in said and "fully_shard" in said


def test_gates_that_an_optimizer_has_moved_are_refused(found):
    for part in found:
        kind, said = part["by_hand"]["step"]
        assert kind == "RuntimeError" and "pass auto=True" in said
