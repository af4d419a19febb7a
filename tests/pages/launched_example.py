"""Launched by torchrun: run an example as it stands, and write what has become of it in this process.

Arguments: the folder to write to; the example and its arguments. If the environment asks for FSDP or DeepSpeed, as
``accelerate launch`` sets it, the processes of a machine without a GPU act as if they had some.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

import torch
from trainer_helpers import act_as_gpus

import l1ra
from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.sharding import is_sharded

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ACTS_AS = {"ACCELERATE_USE_FSDP": "MULTI_GPU", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}


def act_in_trainers(kind):
    """From the moment when a trainer is made: what its arguments are read for on a CPU comes before."""
    from trl import SFTTrainer

    make = SFTTrainer.__init__

    def make_as_with_gpus(self, model, args, **options):
        args.use_cpu = False
        act_as_gpus(kind)
        make(self, model, args=args, **options)

    SFTTrainer.__init__ = make_as_with_gpus


def run(folder, name, *arguments):
    controllers = []
    make = l1ra.RankController.__init__

    def make_noted(self, *args, **options):
        make(self, *args, **options)
        controllers.append(self)

    l1ra.RankController.__init__ = make_noted
    for variable, kind in ACTS_AS.items():
        if os.environ.get(variable):
            act_in_trainers(kind)
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [name, *arguments]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    (controller,) = controllers
    layer = next(iter(controller.adapters.values()))
    held = "parts" if is_sharded(layer.lora_A) or is_partitioned(layer.lora_A) else "whole"
    own = (
        {n: p.detach() for n, p in controller.model.named_parameters() if p.requires_grad} if held == "whole" else None
    )
    found = {"history": controller.history, "steps": controller.steps, "held": held, "trained": own}
    found["said"] = [text for text in (str(w.message) for w in said) if "rank" in text or "adapter" in text]
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    run(*sys.argv[1:])
