"""FSDP 2 through accelerate and transformers' Trainer: two real processes (gloo), saved, resumed, exported."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import BRISK, llama, same_bits, trainable
from torch import distributed, multiprocessing
from trainer_helpers import act_as_gpus

import l1ra

pytest.importorskip("accelerate")
if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import Trainer, TrainingArguments

from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.sharding import is_sharded, wholes

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
LAYER = "LlamaDecoderLayer"


def tokens(count):
    """Sequences in which each token follows from the one before."""
    rows = [torch.randint(0, 50, (count, 1), generator=torch.Generator().manual_seed(7))]
    for _ in range(7):
        rows.append((3 * rows[-1] + 1) % 50)
    return torch.cat(rows, 1)


def patched_llama(seed=0, **settings):
    torch.manual_seed(seed)
    model = llama()
    return model, l1ra.patch(model, 28, **{**BRISK, "reserve": 8, "min_coherence": -1.0, **settings})


def told(model, controller, said):
    state = get_model_state_dict(model)
    whole = wholes(list(state.values()))
    return {
        "sharded": all(is_sharded(layer.lora_A) for _, layer in find_adapters(model)),
        "state": {name: value.clone() for name, value in zip(state, whole, strict=True)},
        "ranks": [entry["ranks"] for entry in controller.history],
        "steps": (controller.steps, controller.total_steps),
        "said": [text for text in (str(w.message) for w in said) if "rank" in text or "adapter" in text],
    }


def with_accelerate(number, folder, kind, efficient=False):
    """Trained to 30 steps, saved, exported; then 10 steps more, and the same steps by another, resumed training."""
    found = []
    for resumed in (False, True):
        act_as_gpus("MULTI_GPU")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[LAYER],
            state_dict_type=kind,
            cpu_ram_efficient_loading=efficient,
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model, controller = patched_llama(seed=5 if resumed and not efficient else 0)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        data = tokens(40 * 8).split(8)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            if resumed:
                accelerator.load_state(folder / "state")
            for ids in data[30 * resumed :]:
                if controller.steps == 30 and not resumed:
                    accelerator.save_state(folder / "state")
                    options = {"is_main_process": number == 0, "state_dict": accelerator.get_state_dict(model)}
                    accelerator.unwrap_model(model).save_pretrained(folder / "lora", **options)
                    logits = model(input_ids=ids[:2]).logits.detach()
                optimizer.zero_grad()
                mine = ids[number::2]
                accelerator.backward(model(input_ids=mine, labels=mine).loss)
                optimizer.step()
        found.append(told(model, controller, said))
    return {"whole": found[0], "resumed": found[1], "ids": data[30][:2], "logits": logits}


def with_trainer(number, folder, kind):
    """Trained to 24 steps with a checkpoint at 12; then resumed from there by a model that began otherwise."""
    for name, seed, begin in (("whole", 0, None), ("resumed", 5, folder / "checkpoint-12")):
        AcceleratorState._reset_state()
        model, controller = patched_llama(seed, total_steps=None)
        args = TrainingArguments(
            folder,
            fsdp=True,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [LAYER], "state_dict_type": kind},
            per_device_train_batch_size=4,
            max_steps=24,
            save_steps=12,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        assert args.device.type == "cpu"
        act_as_gpus("MULTI_GPU")
        trainer = Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens(24 * 8)])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            trainer.train(resume_from_checkpoint=begin)
        if begin is None:
            trainer.save_model(folder / "final")
            l1ra.export_peft(model, folder / "lora")
            found = {"ids": tokens(2), "logits": model(input_ids=tokens(2)).logits.detach()}
        found[name] = told(model, controller, said)
    return found


def work(number, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # read, and not used: the processes have met
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=100), **meeting)
    found = {f"accelerate {kind}": with_accelerate(number, folder / f"accelerate {kind}", kind) for kind in KINDS}
    found["accelerate efficient"] = with_accelerate(number, folder / "accelerate efficient", KINDS[0], efficient=True)
    found |= {f"trainer {kind}": with_trainer(number, folder / f"trainer {kind}", kind) for kind in KINDS}
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


CASES = [*(f"{library} {kind}" for library in ("accelerate", "trainer") for kind in KINDS), "accelerate efficient"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_move_alike_and_a_resumed_training_goes_on_bit_for_bit(found, case):
    whole, resumed = found[0][case]["whole"], found[0][case]["resumed"]
    for part in found:
        for run in (part[case]["whole"], part[case]["resumed"]):
            assert run["sharded"] and not run["said"]
            assert run["ranks"] == whole["ranks"] and run["steps"] == whole["steps"]
            assert all(same_bits(value, whole["state"][name]) for name, value in run["state"].items())
    assert len(resumed["ranks"]) > 3 and whole["ranks"][0] != whole["ranks"][-1]


@pytest.mark.parametrize("case", CASES)
def test_a_lora_is_written_that_peft_loads(found, folder, case):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(llama(), folder / case / "lora")
    logits = model(input_ids=found[0][case]["ids"]).logits
    torch.testing.assert_close(logits, found[0][case]["logits"], rtol=1e-4, atol=1e-5)


def test_a_trainers_final_model_is_a_lora_where_it_gathers_whole_weights(folder):
    names = {file.name for file in (folder / "trainer FULL_STATE_DICT" / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
