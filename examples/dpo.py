"""Preference tuning with TRL's DPOTrainer; the reference is the model without its adapters, no second one is loaded.

Without --model a tiny random Llama is trained, in seconds: it shows that everything runs, and learns nothing of use.
"""

from __future__ import annotations

import common
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import l1ra


def main() -> None:
    parser = common.parser(__doc__, data="JSONL: prompt, chosen and rejected", lr=1e-3)
    add = parser.add_argument
    add("--beta", type=float, default=0.1, help="how near to stay to the reference (default: %(default)s)")
    add("--bf16", action="store_true", help="mixed precision in bfloat16")
    add("--out", default="runs/dpo", help="folder for the adapter, in PEFT's format (default: %(default)s)")
    options = parser.parse_args()

    model, tokenizer = common.load(options.model)
    data = Dataset.from_json(options.data) if options.data else Dataset.from_list(common.preferences())
    controller = l1ra.patch(model, **common.budget_and_reserve(model, options.budget))

    # With precompute_ref_log_probs the trainer asks the reference here, once and for all: in this block that is the
    # model as it was before patch, also if the adapters have learned something already.
    with controller.disabled():
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=options.out,
                precompute_ref_log_probs=True,
                beta=options.beta,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                learning_rate=options.lr,
                bf16=options.bf16,
                max_length=512,
                logging_steps=50,
                eval_on_start=True,  # trainer.evaluate() before train() lets each of several processes train for itself
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
            ),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
    trainer.train()
    before = trainer.state.log_history[0]
    after = trainer.evaluate()

    l1ra.export_peft(model, options.out)  # of several processes all call it
    if trainer.is_world_process_zero():
        print(l1ra.report(model))
        print(f"\nloss on the training data {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}, ", end="")
        print(f"right {after['eval_rewards/accuracies']:.0%}, {controller.moved} ranks moved")
        print(f"written to {options.out}: PeftModel.from_pretrained(model, {options.out!r}) loads it")


if __name__ == "__main__":
    main()
