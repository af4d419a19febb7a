"""Fine-tune a small model with L1RA, next to a frozen baseline and to plain LoRA at the same rank budget.

Without arguments: all-MiniLM-L6-v2 on movie reviews, a few minutes on two CPU cores. All that L1RA needs is the one
call of ``l1ra.patch`` in ``main``; the rest is what any fine-tuning needs, and the comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from data import Data, DataError, batches, encode, load, packaged_model
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import l1ra
from l1ra.model.targets import saved_modules, select_targets

RANKS_PER_ADAPTER = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="name on the model hub, or a local folder (default: all-MiniLM-L6-v2)")
    add("--data", help="JSONL or CSV: text and label; text; or prompt and completion (default: movie reviews)")
    add("--budget", type=int, help=f"sum of all ranks (default: {RANKS_PER_ADAPTER} an adapted layer)")
    add("--target-modules", nargs="+", help="names of the layers to adapt (default: every linear layer but the head)")
    add("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="examples a step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate of both methods (default: %(default)s)")
    add("--max-length", type=int, default=64, help="tokens of an example (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the head, the order of the data and the adapters")
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder for the results (default: %(default)s)")
    return parser.parse_args()


def load_model(name: str, data: Data, tokenizer: Any, seed: int) -> nn.Module:
    """The pretrained model, on the device; a new head is drawn from ``seed``."""
    set_seed(seed)
    if data.is_classification:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(data.labels))
    else:
        architectures = AutoConfig.from_pretrained(name).architectures or []
        if not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
            raise DataError(
                f"{data.name} has no labels, so it needs a causal language model, and {name} is "
                f"{' '.join(architectures) or 'none'}: pass one with --model, or add a column 'label'."
            )
        model = AutoModelForCausalLM.from_pretrained(name)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.float().to("cuda" if torch.cuda.is_available() else "cpu")


# --- what is measured


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[dict], collate: Any) -> float:
    """Accuracy from 0 to 1, or perplexity of the labelled tokens."""
    model.eval()
    total, count = 0.0, 0
    for _, batch in batches(examples, collate, model.device):
        labels = batch.pop("labels")
        classes = labels.dim() == 1
        logits = model(**batch).logits
        if classes:
            total += (logits.argmax(-1) == labels).sum().item()
            count += len(labels)
        else:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += (labels >= 0).sum().item()
    return total / count if classes else math.exp(total / count)


@torch.no_grad()
def embed(model: nn.Module, examples: list[dict], collate: Any) -> np.ndarray:
    """Mean of the last hidden states over the tokens, ``(examples, hidden)``."""
    model.eval()
    rows = {}
    for numbers, batch in batches(examples, collate, model.device):
        batch.pop("labels")
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model.base_model(**batch).last_hidden_state
        mean = (hidden * mask).sum(1) / mask.sum(1)
        rows.update(zip(numbers, mean.cpu().numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(examples))])


def frozen_accuracy(model: nn.Module, train: list[dict], test: list[dict], collate: Any) -> float:
    """A logistic regression on the embeddings of the frozen model: what needs no fine-tuning at all."""
    regression = LogisticRegression(max_iter=1000)
    regression.fit(embed(model, train, collate), [e["labels"] for e in train])
    return float(regression.score(embed(model, test, collate), [e["labels"] for e in test]))


def train(model: nn.Module, examples: list[dict], collate: Any, options: argparse.Namespace) -> float:
    """Train with the unmodified ``transformers.Trainer``; the seconds it took."""
    # Batches of similar length pad little, at almost twice the speed; transformers 5 has renamed the option.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    by_length = (
        {"group_by_length": True} if "group_by_length" in known else {"train_sampling_strategy": "group_by_length"}
    )
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        warmup_steps=options.steps // 20,
        seed=options.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **by_length,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def plain_lora(model: nn.Module, ranks: dict[str, int], head: list[str]) -> nn.Module:
    """PEFT's LoRA on the same layers as L1RA, with the ranks it began with, its scaling of 1, and the same head."""
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        modules_to_save=head or None,
    )
    return peft.get_peft_model(model, config)


# --- results


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def show(summary: dict[str, Any]) -> str:
    def metric(value: float) -> str:
        return f"{100 * value:.1f} %" if summary["metric"] == "accuracy" else f"{value:.2f}"

    budget = summary["budget"]
    lines = [("", summary["metric"], "seconds"), ("before training", metric(summary["metric_before"]), "")]
    if summary["metric_frozen"] is not None:
        lines.append(("frozen model + logistic regression", metric(summary["metric_frozen"]), ""))
    lines.append((f"plain LoRA, budget {budget}", metric(summary["metric_lora"]), f"{summary['seconds_lora']:.0f}"))
    lines.append((f"L1RA, budget {budget}", metric(summary["metric_after"]), f"{summary['seconds']:.0f}"))
    return "\n".join(f"{name:<36}{value:>12}{seconds:>10}" for name, value, seconds in lines)


def main() -> None:
    options = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = options.model or str(packaged_model())
    data = load(options.data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise DataError(f"can't load {name!r}: pass a local folder, or a name on the model hub. {error}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = (DataCollatorWithPadding if data.is_classification else DataCollatorForSeq2Seq)(tokenizer)
    train_set, test_set = (encode(part, tokenizer, options.max_length) for part in (data.train, data.test))
    model = load_model(name, data, tokenizer, options.seed)
    print(f"{data.name}: {len(train_set)} examples to train on, {len(test_set)} to test on; {hardware()}", flush=True)

    targets = options.target_modules or "all-linear"
    head = saved_modules(model, None)
    try:
        budget = options.budget or RANKS_PER_ADAPTER * len(select_targets(model, targets, head))
        # The whole integration. The model's output is still the same to the last bit.
        controller = l1ra.patch(model, budget=budget, target_modules=targets, seed=options.seed)
    except ValueError as error:  # a budget or names that do not fit this model
        raise DataError(str(error)) from None

    print("measuring the model before training, and the frozen baseline ...", flush=True)
    before = evaluate(model, test_set, collate)
    frozen = frozen_accuracy(model, train_set, test_set, collate) if data.is_classification else None

    print(f"training with L1RA, {options.steps} steps ...", flush=True)
    seconds = train(model, train_set, collate, options)
    after = evaluate(model, test_set, collate)

    print(f"training with plain LoRA, {options.steps} steps ...", flush=True)
    lora = plain_lora(load_model(name, data, tokenizer, options.seed), controller.initial_ranks, list(head))
    seconds_lora = train(lora, train_set, collate, options)
    summary = {
        "model": Path(name).name if options.model is None else name,
        "data": data.name,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "budget": budget,
        "metric": "accuracy" if data.is_classification else "perplexity",
        "metric_before": before,
        "metric_after": after,
        "metric_frozen": frozen,
        "metric_lora": evaluate(lora, test_set, collate),
        "ranks_before": controller.initial_ranks,
        "ranks_after": controller.ranks,
        "moved": controller.moved,
        "spare": controller.spare,
        "learning_rate": options.lr,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "seed": options.seed,
        "seconds_lora": round(seconds_lora, 1),
        "train_examples": len(train_set),
        "test_examples": len(test_set),
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (l1ra, torch, transformers, peft)},
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_summary(options.out / "summary.json", summary)
    l1ra.plot_ranks(model, options.out / "ranks.png")
    print(f"\n{l1ra.report(model)}\n\n{show(summary)}\n\nwritten to {options.out}/: summary.json, ranks.png")
    if controller.moved == 0:
        sys.exit(
            "\nNO RANK HAS MOVED: this was plain LoRA. The training may be too short for the ranks to be judged "
            f"({options.steps} steps): raise --steps."
        )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"quickstart: {error}")
