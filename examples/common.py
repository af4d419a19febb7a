"""What the examples have in common: their options, and what they train if no model is named.

That is a tiny random Llama, its tokenizer, and lines made up on the spot. With it an example runs in seconds, without a
network, and shows that everything works together. The model knows nothing and learns nothing of use.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from data import encode, from_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
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
from l1ra.processes.group import launched_processes

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
    """What ``l1ra.patch`` shall give the linear layers; rows in reserve where shapes must stay: in a compiled model or
    in one of several processes."""
    layers = len(select_targets(model, "all-linear", {}))
    budget = budget or RANKS_PER_ADAPTER * layers
    shapes_stay = compiled or launched_processes() > 1
    return {"budget": budget, "reserve": 4 * budget // layers if shapes_stay else None}


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
    return DataLoader(_encoded(path, tokenizer), batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def _encoded(path: str | None, tokenizer: Any) -> list[dict]:
    rows = questions() if path is None else from_file(Path(path)).train
    return encode(rows, tokenizer, max_length=512)


# --- one of several processes, in a loop without accelerate


@contextmanager
def process() -> Iterator[torch.device]:
    """The device of this process. Within the block it can talk to the others that torchrun has started, if any."""
    # A build of torch for CUDA names that as its accelerator without a GPU, too.
    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if "LOCAL_RANK" not in os.environ:
        yield torch.device(kind)
        return
    device = torch.device(kind, 0 if kind == "cpu" else int(os.environ["LOCAL_RANK"]))
    if kind != "cpu":
        torch.accelerator.set_device_index(device.index)
    distributed.init_process_group(distributed.get_default_backend_for_device(device))
    yield device
    distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is to print: the first of several, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def loader_of_process(path: str | None, tokenizer: Any, batch_size: int) -> DataLoader:
    """As :func:`loader`; of several processes each gets batches of its own."""
    if not distributed.is_initialized():
        return loader(path, tokenizer, batch_size)
    rows = _encoded(path, tokenizer)
    return DataLoader(rows, batch_size, sampler=DistributedSampler(rows), collate_fn=DataCollatorForSeq2Seq(tokenizer))


def mean_over_processes(value: float, device: torch.device) -> float:
    """The mean of the values of all processes."""
    if not distributed.is_initialized():
        return value
    total = torch.tensor(value, device=device)
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()
