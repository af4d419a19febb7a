"""DeepSpeed's ZeRO: two real processes (gloo) that hold parts of the adapters move the same ranks as one plain one."""

import os
import sys
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import BRISK, Residual, patched, task, trainable
from torch import distributed, multiprocessing
from torch.nn import functional as F

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
pytest.importorskip("deepspeed")

import l1ra

STEPS = 40
CLIPPED = {"gradient_clipping": 0.05}
FLOAT32 = "1 in bfloat16, accumulated in float32"
MOVING = {  # name -> stage, DeepSpeed's configuration
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "3, gathered between steps": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 10**6}}),
    "2, accumulated and clipped": (2, {**CLIPPED, "gradient_accumulation_steps": 2}),
    "3, accumulated and clipped": (3, {**CLIPPED, "gradient_accumulation_steps": 2}),
    "1, two groups": (1, {}),
    "3, two groups": (3, {}),
    "3, offloaded": (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "2 in bfloat16": (2, {"bf16": {"enabled": True}}),
    FLOAT32: (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
}
RESTING = {  # name -> stage, DeepSpeed's configuration, what the warning says
    "2 without reserve": (2, {}, r"Pass reserve=<rows> to l1ra.patch"),
    "3 without reserve": (3, {}, r"Pass reserve=<rows> to l1ra.patch"),
    "0 in bfloat16": (0, {"bf16": {"enabled": True}}, "keeps a second copy of adapters"),
    "2, another limit": (2, {}, "its processes differ in min_coherence"),
}


def adapted(name, number=0):
    torch.manual_seed(0)
    limit = {"min_coherence": 0.1 * number} if "another limit" in name else {}
    model, controller, _, x, y = patched(16, total_steps=STEPS, reserve=12, **limit)
    if "without reserve" in name:  # as a model of a user's own may have its adapters
        l1ra.unpatch(model)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = l1ra.L1RALinear.from_linear(block, rank=4)
        controller = l1ra.RankController(model, 16, **{**BRISK, "total_steps": STEPS})
    return model, controller, x, y


def engine_of(model, name, stage, config):
    import deepspeed

    params = trainable(model)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-2}] if "two groups" in name else params
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config = {
        "train_micro_batch_size_per_gpu": 8 // config.get("gradient_accumulation_steps", 1),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": {**zero, **config.get("zero_optimization", {})},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=model, model_parameters=params, optimizer=optimizer, config=config)[0]


def steps_of(engine, x, y, count):
    losses, parts = [], engine.gradient_accumulation_steps()
    for _ in range(count):
        total = torch.zeros(())
        for part in range(parts):
            out = engine(x[part::parts].to(engine.module.blocks[0].lora_A.dtype))
            loss = F.mse_loss(out.float(), y[part::parts])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / parts
        distributed.all_reduce(total)
        losses.append(total.item() / distributed.get_world_size())
    return losses


def whole_gates(controller):
    zero = controller._zero_steps.zero
    with torch.no_grad():
        return [gate.tolist() for gate in zero.gates()] if zero._flats else []


def train(number, name, stage, config):
    model, controller, x, y = adapted(name, number)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        engine = engine_of(model, name, stage, config)
        losses = steps_of(engine, x[number::2], y[number::2], STEPS)
    if stage < 3:
        held = [layer.gate.tolist() for layer in controller.adapters.values()]
    else:
        held = [layer.gate.ds_tensor.tolist() for layer in controller.adapters.values()]
    said = [str(w.message) for w in said if "/l1ra/" in w.filename or "rank" in str(w.message)]
    found = {"history": controller.history, "steps": controller.steps, "losses": losses, "said": said}
    return engine, controller, {**found, "held": held, "gates": whole_gates(controller)}


def found_late(number):
    """In the first step the first block gets no gradient in one of the processes."""
    model, controller, x, y = adapted("late")
    engine = engine_of(model, "late", *MOVING[FLOAT32])  # the one that takes fewer gradients in one of the processes
    blocks = list(model.blocks)
    if number == 1:
        model.blocks = torch.nn.ModuleList(blocks[1:])
    engine.backward(F.mse_loss(engine(x[number::2].bfloat16()).float(), y[number::2]))
    model.blocks = torch.nn.ModuleList(blocks)
    engine.step()
    gates = [layer.gate.tolist() for layer in controller.adapters.values()]
    steps_of(engine, x[number::2], y[number::2], STEPS - 1)
    return {"first": gates, "history": controller.history, "steps": controller.steps}


def saved(number, controller, engine, folder):
    model, report = controller.model, l1ra.report(controller.model)
    controller.save(folder / "save")
    l1ra.export_peft(engine, folder / "export")
    for action in (lambda: l1ra.merge(model), controller.set_reference):
        with pytest.raises(RuntimeError, match="partitioned the"):
            action()
    with pytest.raises(ValueError, match=r"make the controller before deepspeed.initialize"):
        controller.close()
        l1ra.RankController(model, 16)
    assert all(row.smallest_gate != row.smallest_gate for row in l1ra.report(model).rows)
    return {"ranks": controller.ranks, "report": report.rows}


def resumed(number, stage, folder):
    """The losses after a checkpoint in the midst of a training: of this one, and of one that takes it over."""
    model, controller, x, y = adapted("resumed")
    engine = engine_of(model, "resumed", stage, {})
    x, y = x[number::2], y[number::2]
    steps_of(engine, x, y, 22)
    engine.save_checkpoint(str(folder / f"engine{stage}"), client_state={"l1ra": controller.state_dict()})
    straight = steps_of(engine, x, y, STEPS - 22)
    found = {}
    for takes_over in (True, False):
        model, again, _, _ = adapted("resumed")
        engine = engine_of(model, "resumed", stage, {})
        _, client = engine.load_checkpoint(str(folder / f"engine{stage}"))
        try:
            if takes_over:
                again.load_state_dict(client["l1ra"])
            found[takes_over] = steps_of(engine, x, y, STEPS - 22)
        except RuntimeError as error:
            found[takes_over] = str(error)
        if takes_over:
            found["ranks"] = again.ranks == controller.ranks
    return {"straight": straight, **found}


def work(number, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import logging

    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # would compile C++
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    limit = timedelta(seconds=60)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2, "timeout": limit}
    distributed.init_process_group("gloo", **meeting)
    found = {}
    for name, (stage, config, *_) in {**MOVING, **RESTING}.items():
        engine, controller, found[name] = train(number, name, stage, config)
        if name == "3":
            found["saved"] = saved(number, controller, engine, folder)
    found["late"] = found_late(number)
    for stage in (2, 3):
        found[f"resumed {stage}"] = resumed(number, stage, folder)
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def found(folder):
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def alone(clip):
    model, controller, x, y = adapted("alone")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        losses.append(loss.item())
    return controller.history, losses


@pytest.mark.parametrize("name", MOVING)
def test_processes_move_the_ranks_that_one_moves_with_all_examples(found, name):
    history, losses = alone(MOVING[name][1].get("gradient_clipping"))
    first, second = (part[name] for part in found)
    assert first["history"] == second["history"] and not first["said"] and not second["said"]
    assert sum(entry["moved"] for entry in first["history"]) > 0 and first["steps"] == STEPS
    assert [entry["ranks"] for entry in first["history"]] == [entry["ranks"] for entry in history]
    assert first["losses"] == pytest.approx(losses, rel=2e-2 if "bfloat16" in name else 1e-4)


@pytest.mark.parametrize("name", RESTING)
def test_ranks_rest_where_they_must_and_no_gate_moves(found, name):
    for part in (found[0][name], found[1][name]):
        (said,) = part["said"]
        assert "no rank moves in this distributed training" in said and RESTING[name][2] in said
        assert len(part["history"]) == 1 and part["steps"] == STEPS
        gates = [value for held in (part["gates"], part["held"]) for gate in held for value in gate]
        assert len(gates) >= 8 and set(gates) <= {0.0, 1.0} and gates.count(1.0) >= 8


@pytest.mark.parametrize("name", ["1", "2", "3", "2 in bfloat16"])
def test_the_model_holds_the_gates_of_the_controller(found, name):
    parts = [part[name] for part in found]
    held = parts[0]["held"] if "3" not in name else [a + b for a, b in zip(*(p["held"] for p in parts), strict=True)]
    assert parts[0]["gates"] == parts[1]["gates"]
    for gate, copy in zip(parts[0]["gates"], held, strict=True):
        assert copy[: len(gate)] == pytest.approx(gate, rel=1e-2)
    assert name == "3" or parts[0]["held"] == parts[1]["held"]


def test_an_optimizer_that_one_process_finds_late_trains_no_gate(found):
    first, second = (part["late"] for part in found)
    assert first["first"] == second["first"] == [[1.0] * 4 + [0.0] * 8] * 4
    assert first["history"] == second["history"] and first["steps"] == second["steps"] == STEPS
    assert sum(entry["moved"] for entry in first["history"]) > 0


def test_what_is_saved_under_stage_3_is_whole(found, folder):
    from safetensors.torch import load_file

    ranks = found[0]["saved"]["ranks"]
    torch.manual_seed(0)
    x, y = task(model := Residual())
    controller = l1ra.load(model, folder / "save")
    assert controller.ranks == ranks and controller.steps == STEPS
    assert F.mse_loss(model(x), y).item() < 0.8 * found[0]["3"]["losses"][0]
    shapes = {tuple(tensor.shape) for tensor in load_file(folder / "export" / "adapter_model.safetensors").values()}
    assert shapes == {shape for rank in ranks.values() for shape in ((rank, 12), (12, rank))}
    for row, gates, rank in zip(found[0]["saved"]["report"], controller.gates().values(), ranks.values(), strict=True):
        assert row.smallest_gate == pytest.approx(min(gates)) and row.rank == rank and row.params == 25 * rank


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_the_engine_is_resumed_with_the_controllers_state(found, stage):
    part = found[0][f"resumed {stage}"]
    assert part[True] == pytest.approx(part["straight"], rel=1e-5) and part["ranks"]
    assert "call controller.load_state_dict after it" in part[False]
