"""FSDP 2 (``fully_shard``): two real processes (gloo) move the same ranks as one process, and save and resume."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import BRISK, Residual, patched, same_bits, step, trainable
from torch import distributed, multiprocessing, nn

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.sharding import columns_of, first_writes, is_sharded, part_of, wholes

STEPS = 60
SETTINGS = {"reserve": 12, "total_steps": STEPS, "min_coherence": -1.0}
MOVING = {  # name -> settings of patch
    "sharded": {},
    "sharded by columns": {},
    "columns, gradient rows": {"new_rows": "gradient"},
    "columns, two dimensions": {},
    "two dimensions": {},
    "gradient rows": {"new_rows": "gradient"},
    "probes": {"min_coherence": 0.0},
    "scaled with the rank": {"scale_with_rank": True},
    "bfloat16 and clipped": {},
    "accumulated": {},
    "SGD": {},
    "an optimizer for each parameter": {},
    "left out": {},
    "left out, accumulated": {},
    "left out, other seeds": {},
    "left out, averaged by the user": {},
    "sharded before": {},
}
LIKE_ONE_PROCESS = {  # name -> how near the parameters come
    "sharded": 1e-4,
    "sharded by columns": 1e-4,
    "columns, two dimensions": 1e-4,
    "two dimensions": 1e-4,
    "accumulated": 1e-4,
    "an optimizer for each parameter": 1e-4,
    "left out": 1e-4,
    "left out, accumulated": 1e-4,
    "left out, averaged by the user": 1e-4,
    "sharded before": 1e-4,
}
AVERAGED = [("sharded", "dict"), ("sharded", "list"), ("sharded by columns", "list"), ("left out", "dict")]
RESTING = {  # name -> what the warning says
    "no reserve": "fully_shard needs tensors that keep their shapes. Pass reserve=<rows>",
    "some left out": "some adapters are sharded and others are not",
    "other settings": "its processes differ in margin: 1.0 and 0.5",
}


def shard(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def options_of(name, model):
    adapters = [layer for _, layer in find_adapters(model)]
    if name.startswith("left out"):
        return {"ignored_params": {p for layer in adapters for p in (layer.lora_A, layer.gate, layer.lora_B)}}
    if name == "some left out":
        return {"ignored_params": {adapters[1].lora_A}}
    if name.startswith("bfloat16"):
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    return l1ra.fsdp(model) if "columns" in name else {}


def begin(name, seed=0, world=2, **more):
    torch.manual_seed(0)
    settings = {**SETTINGS, **MOVING.get(name, {}), **more}
    number = distributed.get_rank()
    if name == "other settings":
        settings["margin"] = 1.0 - number / 2
    settings["seed"] = number if name == "left out, other seeds" else seed
    shape, names = ((1, world), ("replicas", "parts")) if "two dimensions" in name else ((world,), ("parts",))
    mesh = distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    if name == "sharded before":
        from helpers import task

        model = Residual()
        x, y = task(model)
        shard(model, mesh)
        controller = l1ra.patch(model, 16, **{**BRISK, **settings})
    else:
        model, controller, _, x, y = patched(16, **settings)
        if name == "no reserve":
            model, controller = without_reserve(model, settings)
        shard(model, mesh, **options_of(name, model))
    if name == "left out, averaged by the user":
        for param in trainable(model):
            param.register_post_accumulate_grad_hook(average)
    make = torch.optim.SGD if name == "SGD" else OptimizerForEach if "for each" in name else torch.optim.AdamW
    return (
        model,
        controller,
        make(trainable(model), lr=1e-1 if name == "SGD" else 1e-2),
        x[number::world],
        y[number::world],
    )


def without_reserve(model, settings):
    """The same adapters with as many rows as ranks, as a model of a user's own may have them."""
    l1ra.unpatch(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = l1ra.L1RALinear.from_linear(block, rank=4)
    settings = {name: value for name, value in settings.items() if name != "reserve"}
    return model, l1ra.RankController(model, 16, **{**BRISK, **settings})


class OptimizerForEach:
    """Their states are gathered one after the other: in the same order in all processes."""

    def __init__(self, params, lr):
        self.optimizers = [torch.optim.AdamW([param], lr=lr) for param in params]

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def average(param):
    distributed.all_reduce(param.grad)
    param.grad /= 2


def train(name, steps=STEPS, made=None):
    model, controller, optimizer, x, y = made or begin(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        while controller.steps < steps:
            if "accumulated" in name:
                optimizer.zero_grad()
                for part, last in ((slice(None, None, 2), False), (slice(1, None, 2), True)):
                    model.set_requires_gradient_sync(last)
                    (nn.functional.mse_loss(model(x[part]), y[part]) / 2).backward()
                optimizer.step()
            elif "clipped" in name:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                nn.utils.clip_grad_norm_(trainable(model), 1.0)
                optimizer.step()
            else:
                step(model, optimizer, x, y)
    return {
        "history": controller.history,
        "model": state_of(model),
        "gates": controller.gates(),
        "said": [text for text in map(str, (w.message for w in said)) if not text.startswith("FSDP2-wrapped module")],
        "sharded": any(is_sharded(layer.lora_A) for layer in controller.adapters.values()),
        "by columns": all(columns_of(layer.lora_A) for layer in controller.adapters.values()),
    }


def state_of(model):
    state = get_model_state_dict(model)
    return dict(zip(state, (value.clone() for value in wholes(list(state.values()))), strict=True))


def save(folder):
    """After 25 steps, in every way; then 10 steps more."""
    made = begin("sharded")
    model, controller, optimizer, *_ = made
    train("sharded", 25, made)
    output = model(probe())
    controller.save(folder / "own")
    l1ra.export_peft(model, folder / "lora")
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder / "dcp")
    if distributed.get_rank() == 0:
        torch.save(controller.state_dict(), folder / "controller.pt")
    with pytest.raises(TypeError, match="its weight is a DTensor, of which each process holds a part"):
        l1ra.merge(model)
    with pytest.raises(RuntimeError, match="fully_shard has sharded the adapters together with the weights"):
        l1ra.unpatch(model)
    before = state_of(model)
    found = train("sharded", 35, made)
    return {**found, "before": before, "output": output.detach(), "report": str(l1ra.report(model))}


def resume(folder, world):
    """From what :func:`save` has written for DCP, into a model that has trained otherwise."""
    made = begin("sharded", seed=5, world=world)
    model, controller, optimizer, *_ = made
    train("sharded", 3, made)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    controller.load_state_dict(torch.load(folder / "controller.pt", weights_only=True))
    return {"loaded": state_of(model), **train("sharded", 35, made)}


def resume_fresh(folder):
    """Into an optimizer that has not stepped: DCP steps it by zeros, which is no step of the training."""
    made = begin("sharded", seed=5)
    model, controller, optimizer, *_ = made
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    counted = controller.steps
    dcp.load(states, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    controller.load_state_dict(torch.load(folder / "controller.pt", weights_only=True))
    return {"counted": counted, **train("sharded", 35, made)}


def full_state_dict(folder):
    """Of FSDP's usual form: whole tensors in the first process alone."""
    made = begin("sharded")
    train("sharded", 25, made)
    state = get_model_state_dict(made[0], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in state.items()}


def failing_write(folder):
    """The first process can't write: both must know."""
    made = begin("sharded")
    (folder / "a file").write_text("")
    try:
        made[1].save(folder / "a file")
    except (OSError, RuntimeError) as error:
        return type(error).__name__, str(error)


def trained_head(folder):
    """A module that is trained in full is sharded, too."""
    made = begin("sharded", modules_to_save=["blocks.3"])
    train("sharded", 10, made)
    made[1].save(folder / "head")
    return state_of(made[0])


def saved_by_columns(folder):
    made = begin("sharded by columns")
    train("sharded by columns", 25, made)
    made[1].save(folder / "columns")
    return made[0](probe()).detach()


def reference(name):
    """The adapters after 25 steps are the reference of the steps that follow."""
    made = begin(name)
    model, controller, *_ = made
    train(name, 25, made)
    kept = model(probe()).detach()
    controller.set_reference()
    train(name, 35, made)
    with torch.no_grad(), controller.disabled():
        return kept, model(probe())


def averaged(made, form, steps=STEPS):
    """An exponential average of one's own, which is sharded as the parameters are."""
    model, controller, optimizer, x, y = made
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    ema = {name: param.detach().clone() for name, param in named.items()}
    if form == "dict":
        controller.follow(ema)
    else:
        controller.follow(list(ema.values()), list(named.values()))
    for _ in range(steps):
        step(model, optimizer, x, y)
        torch._foreach_lerp_(list(ema.values()), [param.detach() for param in named.values()], 0.1)
    return dict(zip(ema, wholes(list(ema.values())), strict=True))


def steps_in_the_backward():
    made = begin("left out")
    model, _, _, x, y = made
    for param in trainable(model):
        optimizer = torch.optim.SGD([param], lr=0.1)
        param.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.raises(RuntimeError, match="averaged at its end: step after the backward"):
        nn.functional.mse_loss(model(x), y).backward()
    return True


def probe():
    return torch.linspace(-1, 1, 24).view(2, 12)


def work(number, folder, world):
    torch.set_num_threads(1)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"
    meeting = {"init_method": f"file://{folder}/meeting{world}", "rank": number, "world_size": world}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60), **meeting)
    if world == 1:
        found = {"alone": train("sharded", made=begin("sharded", world=1)), "resumed": resume(folder, 1)}
    else:
        found = {name: train(name) for name in (*MOVING, *RESTING)}
        found |= {"saved": save(folder), "resumed": resume(folder, 2), "resumed fresh": resume_fresh(folder)}
        found |= {"full": full_state_dict(folder), "failed": failing_write(folder), "head": trained_head(folder)}
        found |= {f"reference {name}": reference(name) for name in ("sharded", "sharded by columns")}
        found |= {f"average {name}, {form}": averaged(begin(name), form) for name, form in AVERAGED}
        found |= {"columns": saved_by_columns(folder), "in the backward": steps_in_the_backward()}
    torch.save(found, folder / f"{world}-{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    multiprocessing.spawn(work, (folder, 2), nprocs=2)
    multiprocessing.spawn(work, (folder, 1), nprocs=1)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"2-{number}.pt", weights_only=False) for number in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    return torch.load(folder / "1-0.pt", weights_only=False)


def ranks(part):
    return [entry["ranks"] for entry in part["history"]]


def equal(first, second):
    return first.keys() == second.keys() and all(same_bits(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", MOVING)
def test_all_processes_move_the_same_ranks(found, name):
    first, second = (part[name] for part in found)
    assert not first["said"] and not second["said"]
    assert first["sharded"] is not (name.startswith("left out") or name == "sharded before")
    assert first["by columns"] is ("columns" in name)
    assert first["history"] == second["history"] and len(first["history"]) > 5
    assert sum(entry["moved"] for entry in first["history"]) > 0
    assert equal(first["model"], second["model"]) and first["gates"] == second["gates"]


@pytest.mark.parametrize("name", LIKE_ONE_PROCESS)
def test_they_do_what_one_process_does_with_all_examples(found, name):
    torch.manual_seed(0)
    model, controller, optimizer, x, y = patched(16, **{**SETTINGS, **MOVING[name]})
    if "for each" in name:
        optimizer = OptimizerForEach(trainable(model), lr=1e-2)
    for _ in range(STEPS):
        step(model, optimizer, x, y)
    assert [entry["ranks"] for entry in controller.history] == ranks(found[0][name])
    for key, value in model.state_dict().items():
        bound = LIKE_ONE_PROCESS[name]
        torch.testing.assert_close(found[0][name]["model"][key], value, rtol=bound, atol=bound, msg=key)


def test_one_process_moves_ranks_too(found, alone):
    assert ranks(alone["alone"]) == ranks(found[0]["sharded"]) and not alone["alone"]["said"]


@pytest.mark.parametrize("name", RESTING)
def test_ranks_rest_where_they_must_and_a_warning_says_why(found, name):
    for part in found:
        (said,) = part[name]["said"]
        assert "no rank moves in this distributed training" in said and RESTING[name] in said
        assert len(part[name]["history"]) == 1
        assert all(gate == 1 for gates in part[name]["gates"].values() for gate in gates)


def test_a_checkpoint_is_written_once_and_whole(found, folder):
    torch.manual_seed(0)
    controller = l1ra.load(model := Residual(), folder / "own")
    saved = found[0]["saved"]
    assert controller.ranks == saved["history"][4]["ranks"] and controller.steps == 25
    assert len(set(controller.ranks.values())) > 1
    torch.testing.assert_close(model(probe()), saved["output"], rtol=1e-5, atol=1e-6)
    for name, value in model.state_dict().items():
        assert same_bits(value, saved["before"][name][: len(value)]), name
    assert len(list((folder / "own").iterdir())) == 3


def test_a_model_sharded_by_columns_is_saved_whole(found, folder):
    torch.manual_seed(0)
    l1ra.load(model := Residual(), folder / "columns")
    torch.testing.assert_close(model(probe()), found[0]["columns"], rtol=1e-5, atol=1e-6)


def test_features_that_the_processes_do_not_divide_are_split_along_the_ranks():
    model, controller, *_ = patched(16, reserve=12)
    placement = [l1ra.fsdp(model, processes)["shard_placement_fn"] for processes in (4, 5)]
    layer = controller.adapters["blocks.0"]
    assert placement[0](layer.lora_A) == placement[0](layer.lora_B) is not None
    assert placement[0](layer.gate) is placement[0](layer.base_layer.weight) is placement[1](layer.lora_A) is None
    with pytest.raises(ValueError, match=r"call l1ra.patch\(model, budget=...\) before fully_shard"):
        l1ra.fsdp(Residual())


def test_adapters_of_another_dtype_than_their_gates_are_refused():
    model, *_ = patched(16, reserve=12, adapter_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"adapters are torch.bfloat16 and their gates torch.float32.*model.bfloat16"):
        l1ra.fsdp(model)
    assert l1ra.fsdp(model.bfloat16())


def test_a_lora_is_written_once_and_whole(found, folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Residual(), folder / "lora")
    torch.testing.assert_close(model(probe()), found[0]["saved"]["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resumed", "resumed fresh"])
def test_a_resumed_training_goes_on_bit_for_bit(found, name):
    for part in found:
        assert ranks(part[name]) == ranks(part["saved"]) and not part[name]["said"]
        assert equal(part[name]["model"], part["saved"]["model"])
    assert all(equal(part["resumed"]["loaded"], part["saved"]["before"]) for part in found)
    assert found[0]["resumed fresh"]["counted"] == 0


def test_it_goes_on_with_another_number_of_processes(found, alone):
    assert equal(alone["resumed"]["loaded"], found[0]["saved"]["before"])
    assert ranks(alone["resumed"]) == ranks(found[0]["saved"])


def test_a_full_state_dict_goes_into_a_plain_model(found):
    model, controller, *_ = patched(16, **SETTINGS)
    model.load_state_dict(found[0]["full"])
    assert controller.ranks == found[0]["saved"]["history"][4]["ranks"] and not found[1]["full"]


def test_a_write_that_fails_is_known_in_all_processes(found):
    kinds = [part["failed"][0] for part in found]
    assert (
        kinds == ["FileExistsError", "RuntimeError"] and "the process that writes has failed" in found[1]["failed"][1]
    )


def test_a_module_trained_in_full_is_saved_whole(found, folder):
    torch.manual_seed(0)
    l1ra.load(model := Residual(), folder / "head")
    assert same_bits(model.blocks[3].weight, found[0]["head"]["blocks.3.weight"])
    torch.manual_seed(0)
    assert not same_bits(model.blocks[3].weight, Residual().blocks[3].weight)


@pytest.mark.parametrize("name", ["sharded", "sharded by columns"])
def test_a_reference_is_kept_whole_in_each_process(found, name):
    for part in found:
        torch.testing.assert_close(*part[f"reference {name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "form"), AVERAGED)
def test_sharded_averages_move_with_the_ranks(found, name, form):
    torch.manual_seed(0)
    alone = averaged(patched(16, **SETTINGS), form)
    for part in found:
        torch.testing.assert_close(part[f"average {name}, {form}"], alone, rtol=1e-4, atol=1e-4)


def test_what_is_not_possible_is_refused_by_name(found):
    assert found[0]["in the backward"] and "blocks.0" in found[0]["saved"]["report"]


def test_a_plain_tensor_is_its_own_whole_and_part():
    rows = torch.ones(2, 3)
    (whole,) = wholes([rows])
    assert whole.data_ptr() == rows.data_ptr() and part_of(rows).of(rows) is not None
    number = torch.tensor(3.0)
    assert part_of(number).of(number) == 3
    with first_writes([rows]) as writes:
        assert writes
