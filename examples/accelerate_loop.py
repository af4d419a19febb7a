"""A loop of one's own with accelerate: mixed precision, accumulated gradients, clipping and a learning-rate schedule.

Without --model a tiny random Llama is trained, in seconds: it shows that everything runs, and learns nothing of use.
"""

from __future__ import annotations

import common
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import l1ra


def main() -> None:
    parser = common.parser(__doc__, data="JSONL or CSV: prompt and completion, or text")
    add = parser.add_argument
    add("--accumulate", type=int, default=2, help="batches of 4 to an optimizer step (default: %(default)s)")
    add("--mixed-precision", default="no", choices=["no", "bf16", "fp16"], help="(default: %(default)s)")
    options = parser.parse_args()

    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate)
    model, tokenizer = common.load(options.model)
    loader = common.loader(options.data, tokenizer, batch_size=4)
    controller = l1ra.patch(model, **common.budget_and_reserve(model, options.budget), total_steps=options.steps)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.lr)
    ticks = options.steps * accelerator.num_processes  # accelerate lets each process tick at every step
    schedule = get_linear_schedule_with_warmup(optimizer, ticks // 20, ticks)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    before = mean_loss(model, loader)
    model.train()
    while controller.steps < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # while gradients accumulate, accelerate skips these three
                schedule.step()
                optimizer.zero_grad()
            if controller.steps == options.steps:
                break
    after = mean_loss(model, loader)

    if accelerator.is_main_process:
        print(l1ra.report(accelerator.unwrap_model(model)))
        print(f"\nloss on the training data {before:.3f} -> {after:.3f}, {controller.moved} ranks moved")


@torch.no_grad()
def mean_loss(model: torch.nn.Module, loader: DataLoader) -> float:
    model.eval()
    losses = [model(**batch).loss.item() for batch in loader]
    return common.mean_over_processes(sum(losses) / len(losses), next(model.parameters()).device)


if __name__ == "__main__":
    main()
