"""A loop in plain PyTorch on several GPUs, among which FSDP 2 (fully_shard) divides the model; saved and resumed.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Without a GPU the same command takes the CPU. Without --model a tiny random Llama is trained, in seconds: it shows that
everything runs, and learns nothing of use.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import l1ra


def main() -> None:
    parser = common.parser(__doc__, data="JSONL or CSV: prompt and completion, or text")
    add = parser.add_argument
    add("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("runs/fsdp2"),
        help="folder for checkpoints and the LoRA (default: %(default)s)",
    )
    add("--resume", type=Path, metavar="FOLDER", help="go on from this checkpoint, e.g. runs/fsdp2/checkpoint-100")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit("fsdp2: launch it as torchrun --nproc-per-node 2 examples/fsdp2.py")
    with common.process() as device:
        train(options, device)


def train(options: argparse.Namespace, device: torch.device) -> None:
    model, tokenizer = common.load(options.model)  # on the CPU; fully_shard moves each process's part to its GPU
    loader = common.loader_of_process(options.data, tokenizer, batch_size=8)
    if options.resume is None:
        sizes = common.budget_and_reserve(model, options.budget)
        controller = l1ra.patch(model, **sizes, total_steps=options.steps)
    else:
        controller = l1ra.load(model, options.resume)

    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    split = l1ra.fsdp(model)  # by which a reallocation gathers nothing
    for block in model.get_decoder().layers:
        fully_shard(block, mesh=mesh, **split)
    fully_shard(model, mesh=mesh, **split)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.lr)
    if options.resume is not None:
        load_optimizer(model, optimizer, options.resume)

    before = mean_loss(model, loader, device)
    model.train()
    for batch in itertools.islice(batches(loader), controller.steps, options.steps):
        model(**batch.to(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.steps % options.save_every == 0:
            save(controller, optimizer, options.out / f"checkpoint-{controller.steps}")
    after = mean_loss(model, loader, device)

    l1ra.export_peft(model, options.out)  # all processes call it, and the first one writes
    if common.is_first():
        print(l1ra.report(model))
        print(f"\nloss on the training data {before:.3f} -> {after:.3f}, {controller.moved} ranks moved")
        print(f"written to {options.out}: PeftModel.from_pretrained(model, '{options.out}') loads it")


def batches(loader: DataLoader) -> Iterator[Any]:
    """Without an end; each epoch in another order, which is the same in a resumed training."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def save(controller: l1ra.RankController, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """All processes call this together."""
    controller.save(folder)  # the adapters, whole, and the controller
    dcp.save({"optimizer": get_optimizer_state_dict(controller.model, optimizer)}, checkpoint_id=folder / "optimizer")


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What :func:`save` has written, also by another number of processes."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


@torch.no_grad()
def mean_loss(model: torch.nn.Module, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    losses = [model(**batch.to(device)).loss.item() for batch in loader]
    return common.mean_over_processes(sum(losses) / len(losses), device)


if __name__ == "__main__":
    main()
