"""Data-parallel training: two real processes (gloo) with a replica each move the same ranks, or rest and say why."""

import copy
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import patched, same_bits, step
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from l1ra import replicas

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

STEPS = 60
# name -> settings of patch, and how a replica is wrapped
TRAININGS = {
    "replicas": ({"reserve": 12}, DistributedDataParallel),
    "bucket views": ({"reserve": 12}, lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True)),
    "with a limit": ({"reserve": 12, "min_coherence": 0.2}, DistributedDataParallel),
    "gradient rows": ({"reserve": 12, "new_rows": "gradient"}, DistributedDataParallel),
    "other seeds": ({"reserve": 12, "seed": None}, DistributedDataParallel),
    "no reserve": ({}, DistributedDataParallel),
    "each for itself": ({"reserve": 12}, lambda m: m),
}


def begin(number, settings, wrap, seed=0):
    torch.manual_seed(seed)
    settings = {name: (number if value is None else value) for name, value in settings.items()}
    model, controller, optimizer, x, y = patched(16, total_steps=STEPS, **settings)
    return model, controller, optimizer, x[number::2], y[number::2], wrap(model)


def told(model, controller, said):
    return {
        "history": controller.history,
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "said": [str(warning.message) for warning in said],
    }


def train(number, settings, wrap):
    model, controller, optimizer, x, y, replica = begin(number, settings, wrap)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for _ in range(STEPS):
            step(replica, optimizer, x, y)
    return told(model, controller, said)


def resume(number):
    """From the first process' checkpoint of a moment at which probes look, in all processes."""
    settings, wrap = TRAININGS["with a limit"]
    model, controller, optimizer, x, y, replica = begin(number, settings, wrap)
    for _ in range(25):
        step(replica, optimizer, x, y)
    looking = bool(controller._probing) and not controller._closing
    saved = replicas.agreed(copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict())))
    model, controller, optimizer, x, y, replica = begin(number, settings, wrap, seed=1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    controller.load_state_dict(saved[2])
    step(replica, optimizer, x, y)
    seen = [probe.seen.item() for probe in controller._probing._probes.values()]
    for _ in range(26, STEPS):
        step(replica, optimizer, x, y)
    return told(model, controller, []) | {"looking": looking, "seen": seen}


def work(number, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2, "timeout": limit}
    distributed.init_process_group("gloo", **meeting)
    found = {name: train(number, *how) for name, how in TRAININGS.items()}
    found["resumed"] = resume(number)
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


@pytest.mark.parametrize("name", [*(n for n in TRAININGS if n not in ("no reserve", "each for itself")), "resumed"])
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
    assert set(first["seen"]) == {2.0} and set(second["seen"]) == {1.0}


@pytest.mark.parametrize(
    "name, why", [("no reserve", r"Pass reserve=<rows> to l1ra.patch"), ("each for itself", "are not the same")]
)
def test_ranks_rest_where_they_must_and_a_warning_says_why(found, name, why):
    for part in found:
        (said,) = part[name]["said"]
        assert "no rank moves in this distributed training" in said and why in said
        assert len(part[name]["history"]) == 1
        gates = [value for key, value in part[name]["model"].items() if key.endswith("gate")]
        assert len(gates) == 4 and all((gate[:4] == 1).all() for gate in gates)


def test_alone_everything_is_as_it_is():
    rows = [torch.ones(2)]
    replicas.add_up(rows)
    assert (replicas.count(), replicas.number()) == (1, 0)
    assert replicas.agreed(rows) is rows and torch.equal(rows[0], torch.ones(2))
