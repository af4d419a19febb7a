"""Data-parallel training: two real processes (gloo) with a replica each move the same ranks, or rest and say why."""

import copy
import warnings
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from helpers import BRISK, Residual, patched, same_bits, step, trainable
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer

import l1ra
from l1ra.allocation.plan import LayerPlan
from l1ra.processes.digests import ReplicasDiffer
from l1ra.processes.group import ReplicaGroup, world_size

STEPS = 60
MOVING = {  # name -> settings of patch; None: another value in each process
    "replicas": {},
    "with a limit": {"min_coherence": 0.2},
    "gradient rows": {"new_rows": "gradient"},
    "other seeds": {"seed": None},
    "nothing to learn at first": {},
    "wrapped before the controller": {},
    "with a frozen A": {},
    "half gradients": {},
    "compressed gradients": {},
}
HOOKS = {"half gradients", "compressed gradients", "averages of weights"}
RESTING = {  # name -> what the warning says
    "no reserve": r"Pass reserve=<rows> to l1ra.patch",
    "each for itself": "pass eval_on_start=True in place of calling evaluate() first",
    "parts of an optimizer": "ZeroRedundancyOptimizer",
    "other totals": "its processes differ in total_steps: 60 and 61",
    "uneven batches": "under Join",
    "wrapped too early": "was constructed before the adapters",
    "ignored gates": "was told to ignore them",
    "thawed after it was wrapped": "some adapters were frozen when",
    "the optimizer within ZeRO": "its processes differ in the adapters' parameters that optimizers hold",
    "averages of weights": "post_localSGD_hook lets the replicas differ",
}
# What the second process changes -> the step before which it does, None: before the model is wrapped; what is told.
DIFFERING = {
    "rank before wrapping": (None, "blocks.1 (rank, gate in process 1)"),
    "gate": (0, "blocks.1 (gate in process 1)"),
    "lora_A": (0, "blocks.1 (lora_A in process 1)"),
    "lora_A later": (20, "blocks.1 (lora_A in process 1)"),
    "lora_B": (20, "blocks.1 (lora_B in process 1)"),
    "master gate": (20, "blocks.1 (gate in process 1)"),
    "rank": (20, "blocks.1 (rank, lora_A, gate, lora_B in process 1)"),
}


def begin(number, name, seed=0):
    torch.manual_seed(seed)
    settings = {"reserve": 12, "total_steps": STEPS, **MOVING.get(name, {})}
    if name == "other totals":
        settings["total_steps"] += number
    settings = {key: number if key == "seed" else value for key, value in settings.items()}
    model, controller, optimizer, x, y = patched(16, **settings)
    replica = model
    frozen = {"with a frozen A": "lora_A", "thawed after it was wrapped": "lora_B"}.get(name)
    for layer in controller.adapters.values() if frozen else ():
        getattr(layer, frozen).requires_grad_(False)
    if name in ("wrapped too early", "wrapped before the controller"):
        controller.close()
        ranks = {"reserve": 12, "total_steps": STEPS}
        if name == "wrapped too early":
            model = Residual()
            replica = DistributedDataParallel(model)
            controller = l1ra.patch(model, 16, **{**BRISK, **ranks})
        else:
            replica = DistributedDataParallel(model)
            controller = l1ra.RankController(model, 16, **{**BRISK, "total_steps": STEPS})
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    elif name == "no reserve":
        model = without_reserve(model)
        replica, controller = DistributedDataParallel(model), l1ra.RankController(model, 16, **BRISK)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    elif name != "each for itself":
        if name == "ignored gates":
            gates = [f"{key}.gate" for key in controller.adapters]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, gates)
        replica = DistributedDataParallel(model, gradient_as_bucket_view=name == "gradient rows")
    if name in HOOKS:
        replica.register_comm_hook(*communication(name))
    if name == "parts of an optimizer":
        optimizer = ZeroRedundancyOptimizer(trainable(model), torch.optim.AdamW, lr=1e-2)
    if name == "thawed after it was wrapped":
        for layer in controller.adapters.values():
            layer.lora_B.requires_grad_(True)
    if name == "the optimizer within ZeRO":
        controller.close()
        controller = l1ra.RankController(model, 16, auto=False, **{**BRISK, "total_steps": STEPS})
        optimizer = ZeroRedundancyOptimizer(trainable(model), torch.optim.AdamW, lr=1e-2)
    return model, controller, optimizer, x[number::2], y[number::2], replica


def without_reserve(model):
    """The same adapters with as many rows as ranks, as a model of a user's own may have them."""
    l1ra.unpatch(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = l1ra.L1RALinear.from_linear(block, rank=4)
    return model


def communication(name):
    if name == "half gradients":
        return None, fp16_compress_hook
    if name == "compressed gradients":
        return PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook
    alone, _ = distributed.new_subgroups(group_size=1)
    return PostLocalSGDState(None, alone, start_localSGD_iter=10), post_localSGD_hook


def told(model, controller, said):
    return {
        "history": controller.history,
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "said": [str(warning.message) for warning in said],
    }


def train(number, name):
    model, controller, optimizer, x, y, replica = begin(number, name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        if name == "nothing to learn at first":
            (0 * replica(x).sum()).backward()
            optimizer.step()
        with Join([replica]) if name == "uneven batches" else nullcontext():
            more = {"nothing to learn at first": -1, "uneven batches": -3 * number}.get(name, 0)
            for _ in range(STEPS + more):
                step(replica, optimizer, x, y)
                if not controller.auto:
                    controller.step(optimizer.optim)
    unused = [
        tensor[layer.rank :].count_nonzero().item()
        for layer in controller.adapters.values()
        for param in (layer.lora_A, layer.lora_B)
        for tensor in (param, *optimizer.state.get(param, {}).values())
        if name in HOOKS and tensor.dim() == 2
    ]
    return told(model, controller, said) | {"unused": unused}


def differ(number, name):
    """The second process changes the adapter of a block: what each process is told, and the ranks before that."""
    when, _ = DIFFERING[name]
    model, controller, optimizer, x, y = patched(16, total_steps=STEPS, reserve=12)
    layer, keep = model.blocks[1], LayerPlan((0, 2))
    if number and when is None:
        layer.resize(keep)
    replica = DistributedDataParallel(model)
    try:
        for i in range(STEPS):
            if number and i == when:
                with torch.no_grad():
                    if name == "rank":
                        layer.resize(LayerPlan(tuple(range(layer.rank)), 1))
                    elif name == "master gate":
                        controller._bank.value[controller._bank.ranks[0]] = 0.25
                    else:
                        getattr(layer, name.split()[0])[0] += 0.1
            step(replica, optimizer, x[number::2], y[number::2])
    except ReplicasDiffer as error:
        return {"error": str(error), "step": i, "ranks": controller.ranks, "history": controller.history}


def resume(number):
    """From the first process' checkpoint of a moment at which probes look, in all processes, twice."""
    name = "with a limit"
    model, controller, optimizer, x, y, replica = begin(number, name)
    for _ in range(25):
        step(replica, optimizer, x, y)
    looking = bool(controller._interval.probes) and not controller._interval.fading
    saved = [copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))]
    distributed.broadcast_object_list(saved, src=0)
    model, controller, optimizer, x, y, replica = begin(number, name, seed=1)
    seen = []
    for _ in range(2):
        for part, state in zip((model, optimizer, controller), saved[0], strict=True):
            part.load_state_dict(copy.deepcopy(state))
        step(replica, optimizer, x, y)
        seen += [{probe.seen.item() for probe in controller._interval.probes._probes.values()}]
    for _ in range(26, STEPS):
        step(replica, optimizer, x, y)
    return told(model, controller, []) | {"looking": looking, "seen": seen}


def while_others_wait(number):
    """The first process trains, the second does not."""
    return train(0, "each for itself") if number == 0 else None


def work(number, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2, "timeout": limit}
    distributed.init_process_group("gloo", **meeting)
    found = {name: train(number, name) for name in (*MOVING, *RESTING)}
    found |= {f"differing: {name}": differ(number, name) for name in DIFFERING}
    found["resumed"], found["alone"] = resume(number), while_others_wait(number)
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


@pytest.mark.parametrize("name", [*MOVING, "resumed"])
def test_replicas_take_the_same_decisions_and_stay_the_same(found, name):
    first, second = (part[name] for part in found)
    assert first["history"] == second["history"] and len(first["history"]) > 5
    assert sum(entry["moved"] for entry in first["history"]) > 0
    assert first["model"].keys() == second["model"].keys()
    assert all(same_bits(value, second["model"][key]) for key, value in first["model"].items())
    assert not first["said"] and not second["said"]


def test_replicas_do_what_one_process_does_with_all_examples(found):
    torch.manual_seed(0)
    model, controller, optimizer, x, y = patched(16, total_steps=STEPS, reserve=12)
    for _ in range(STEPS):
        step(model, optimizer, x, y)
    replica = found[0]["replicas"]
    assert [entry["ranks"] for entry in controller.history] == [entry["ranks"] for entry in replica["history"]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(replica["model"][name], value, rtol=1e-2, atol=1e-3)


def test_what_all_processes_have_seen_counts(found):
    looked = [entry["coherence"] for entry in found[0]["with a limit"]["history"][1:]]
    assert all(len(entry) == 4 for entry in looked)
    torch.manual_seed(0)
    model, controller, optimizer, x, y = patched(16, total_steps=STEPS, reserve=12, min_coherence=0.2)
    for _ in range(6):
        step(model, optimizer, x[::2], y[::2])
    alone = controller.history[1]["coherence"]
    assert all(abs(looked[0][name] - alone[name]) > 1e-3 for name in alone)  # half of the gradients say something else


def test_a_checkpoint_in_the_midst_of_looking_counts_once(found):
    first, second = (part["resumed"] for part in found)
    assert first["looking"] and second["looking"]
    assert first["seen"] == [{2.0}, {2.0}] and second["seen"] == [{1.0}, {1.0}]


@pytest.mark.parametrize("name", RESTING)
def test_ranks_rest_where_they_must_and_a_warning_says_why(found, name):
    for part in found:
        (said,) = part[name]["said"]
        assert "no rank moves in this distributed training" in said and RESTING[name] in said
        assert len(part[name]["history"]) == 1
        gates = [value for key, value in part[name]["model"].items() if key.endswith("gate")]
        assert len(gates) == 4 and all((gate[:4] == 1).all() for gate in gates)


@pytest.mark.parametrize("name", ["half gradients", "compressed gradients"])
def test_what_a_communication_hook_puts_into_reserved_rows_is_dropped(found, name):
    trained = found[0][name]
    assert len(trained["unused"]) == 24 and not any(trained["unused"])
    model, controller, *_ = patched(16, total_steps=STEPS, reserve=12)
    model.load_state_dict(trained["model"])
    assert controller.ranks == trained["history"][-1]["ranks"]


@pytest.mark.parametrize("name", DIFFERING)
def test_adapters_that_differ_stop_all_processes_with_one_error_that_names_them(found, name):
    first, second = (part[f"differing: {name}"] for part in found)
    when, difference = DIFFERING[name]
    assert f"not those of process 0: {difference}. " in first["error"]
    assert first["error"] == second["error"] and first["history"] == second["history"]
    # Found at the first step, or at the next decision, with no rank moved since.
    assert first["step"] == second["step"] == (20 if when == 20 else 0)
    assert first["ranks"] == first["history"][-1]["ranks"]


def test_a_process_that_trains_alone_waits_for_nobody(found):
    assert "each process trains for itself" in found[0]["alone"]["said"][0] and found[1]["alone"] is None


def test_alone_everything_is_as_it_is():
    rows, alone = [torch.ones(2)], ReplicaGroup()
    alone.sum_over_replicas(rows)
    assert alone.broadcast(rows) is rows and torch.equal(rows[0], torch.ones(2))
    assert (world_size(), alone.number, alone.gather(3)) == (1, 0, [3])


def test_layers_of_one_process_of_several_get_rows_in_reserve(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as torchrun says before torch.distributed is initialised
    with pytest.warns(UserWarning, match="this is one of 8 processes.*each gets reserve=8 rows"):
        controller = patched(8)[1]
    assert controller.config.reserve == 8 and {layer.reserve for layer in controller.adapters.values()} == {8}
    assert set(controller.ranks.values()) == {2}
    for settings in ({"reserve": 6}, {"reserve": 6, "max_rank": 5}):
        assert patched(8, **settings)[1].config.reserve == 6  # no warning
    with pytest.warns(UserWarning, match="reserve=5 rows"):
        patched(8, max_rank=5)
    with pytest.warns(UserWarning, match="reserve=12 rows"):
        patched(9, min_rank=2)


def test_a_checkpoint_of_one_process_has_room_in_one_of_several(tmp_path, monkeypatch):
    controller = patched(16)[1]
    layers = list(controller.adapters.values())
    for layer, rank in zip(layers, (12, 2, 1, 1), strict=True):
        layer.resize(l1ra.allocation.plan.LayerPlan((), rank), torch.zeros(rank, 12))
    controller.save(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded = l1ra.load(Residual(), tmp_path)
    assert loaded.ranks == controller.ranks and loaded.config.reserve == 16
