"""What the examples have in common: their options, and what they train if no model is named.

That is a tiny random Llama, its tokenizer, and lines made up on the spot. With it an example runs in seconds, without a
network, and shows that everything works together. The model knows nothing and learns nothing of use.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from data import encode, from_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from l1ra.model.targets import select_targets

UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS = UNITS + [f"{n}teen" for n in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
RANKS_PER_ADAPTER = 4


def parser(description: str, data: str, lr: float = 2e-3) -> argparse.ArgumentParser:
    """With the options that all examples have; ``data`` says what a file must hold."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="name on the model hub, or a local folder (default: a tiny random one)")
    made.add_argument("--data", help=f"{data} (default: made-up lines)")
    made.add_argument("--budget", type=int, help=f"sum of all ranks (default: {RANKS_PER_ADAPTER} an adapted layer)")
    made.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    made.add_argument("--lr", type=float, default=lr, help="learning rate (default: %(default)s)")
    return made


def load(name: str | None) -> tuple[Any, Any]:
    """The causal language model ``name``, or the tiny one, in float32; and its tokenizer."""
    set_seed(0)
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name).float(), tokenizer
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,  # at the usual 0.02 a model of this size does next to nothing
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "after", "before", "comes", *NUMBERS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def budget_and_reserve(model: Any, budget: int | None, compiled: bool = False) -> dict[str, int | None]:
    """What ``l1ra.patch`` shall give the linear layers; rows in reserve in a compiled model, whose shapes must stay."""
    layers = len(select_targets(model, "all-linear", {}))
    budget = budget or RANKS_PER_ADAPTER * layers
    return {"budget": budget, "reserve": 4 * budget // layers if compiled else None}


def questions() -> list[dict]:
    """Dicts with ``prompt`` and ``completion``."""
    pairs = list(itertools.pairwise(NUMBERS))
    after = [{"prompt": f"after {low} comes", "completion": f" {high}"} for low, high in pairs]
    before = [{"prompt": f"before {high} comes", "completion": f" {low}"} for low, high in pairs]
    return after + before


def preferences() -> list[dict]:
    """Dicts with ``prompt``, the ``chosen`` completion, which is right, and the ``rejected`` one, which is wrong."""
    rows = questions()
    wrong = [row["completion"] for row in rows[7:] + rows[:7]]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
        for row, other in zip(rows, wrong, strict=True)
    ]


def loader(path: str | None, tokenizer: Any, batch_size: int) -> DataLoader:
    """Shuffled batches of a file, or of the made-up lines, for a loop of one's own."""
    rows = questions() if path is None else from_file(Path(path)).train
    collate = DataCollatorForSeq2Seq(tokenizer)
    return DataLoader(encode(rows, tokenizer, max_length=512), batch_size, shuffle=True, collate_fn=collate)
