"""A loop in plain PyTorch, with one of three optimizers, compiled or not; with torchrun in several processes.

Without --model a tiny random Llama is trained, in seconds: it shows that everything runs, and learns nothing of use.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import l1ra

OPTIMIZERS = ("adamw", "adamw-8bit", "schedule-free")


def make_optimizer(name: str, params: Any, lr: float) -> torch.optim.Optimizer:
    if name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=lr)  # parameters of less than 4,096 numbers keep 32 bits
    if name == "schedule-free":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(params, lr=lr)
    return torch.optim.AdamW(params, lr=lr)


def main() -> None:
    parser = common.parser(__doc__, data="JSONL or CSV: prompt and completion, or text")
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0], help="(default: %(default)s)")
    add("--compile", metavar="BACKEND", help="torch.compile the model, e.g. with inductor")
    options = parser.parse_args()
    with common.process() as device:
        train(options, device)


def train(options: argparse.Namespace, device: torch.device) -> None:
    model, tokenizer = common.load(options.model)
    model.to(device)
    loader = common.loader_of_process(options.data, tokenizer, batch_size=8)
    sizes = common.budget_and_reserve(model, options.budget, bool(options.compile))
    controller = l1ra.patch(model, **sizes, total_steps=options.steps)

    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = make_optimizer(options.optimizer, trained, options.lr)
    run = DistributedDataParallel(model) if distributed.is_initialized() else model
    if options.compile:
        run = torch.compile(run, backend=options.compile)

    before = mean_loss(model, loader)
    model.train()
    if options.optimizer == "schedule-free":
        optimizer.train()  # the parameters that are trained; eval() puts their averages in their place
    while controller.steps < options.steps:
        for batch in loader:
            run(**batch.to(model.device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if controller.steps == options.steps:
                break
    if options.optimizer == "schedule-free":
        optimizer.eval()
    after = mean_loss(model, loader)

    if common.is_first():
        print(l1ra.report(model))
        print(f"\nloss on the training data {before:.3f} -> {after:.3f}, {controller.moved} ranks moved")


@torch.no_grad()
def mean_loss(model: torch.nn.Module, loader: DataLoader) -> float:
    model.eval()
    losses = [model(**batch.to(model.device)).loss.item() for batch in loader]
    return common.mean_over_processes(sum(losses) / len(losses), model.device)


if __name__ == "__main__":
    main()
