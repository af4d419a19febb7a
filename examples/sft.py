"""Supervised fine-tuning with TRL's SFTTrainer; L1RA is the one call of l1ra.patch.

Without --model a tiny random Llama is trained, in seconds: it shows that everything runs, and learns nothing of use.
"""

from __future__ import annotations

import common
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import l1ra


def main() -> None:
    parser = common.parser(__doc__, data="JSONL: prompt and completion, or text")
    add = parser.add_argument
    add("--optim", default="adamw_torch", help="the Trainer's name, e.g. adamw_8bit or schedule_free_adamw")
    add("--bf16", action="store_true", help="mixed precision in bfloat16")
    add("--fp16", action="store_true", help="mixed precision in float16 (on a GPU: without one accelerate ignores it)")
    add("--gradient-checkpointing", action="store_true")
    add("--compile", metavar="BACKEND", help="torch.compile the model, e.g. with inductor")
    add("--out", default="runs/sft", help="folder for the adapter, in PEFT's format (default: %(default)s)")
    options = parser.parse_args()

    model, tokenizer = common.load(options.model)
    data = Dataset.from_json(options.data) if options.data else Dataset.from_list(common.questions())
    controller = l1ra.patch(model, **common.budget_and_reserve(model, options.budget, bool(options.compile)))

    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.lr,
            lr_scheduler_type="constant" if options.optim.startswith("schedule_free") else "linear",
            optim=options.optim,
            bf16=options.bf16,
            fp16=options.fp16,
            gradient_checkpointing=options.gradient_checkpointing,
            torch_compile_backend=options.compile,
            max_length=512,
            logging_steps=50,
            # trainer.evaluate() before train() would let each of several processes train for itself: accelerate takes
            # the model for one that it has wrapped.
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    before = trainer.state.log_history[0]["eval_loss"]
    after = trainer.evaluate()["eval_loss"]

    l1ra.export_peft(model, options.out)  # of several processes all call it
    if trainer.is_world_process_zero():
        print(l1ra.report(model))
        print(f"\nloss on the training data {before:.3f} -> {after:.3f}, {controller.moved} ranks moved")
        print(f"written to {options.out}: PeftModel.from_pretrained(model, {options.out!r}) loads it")


if __name__ == "__main__":
    main()
