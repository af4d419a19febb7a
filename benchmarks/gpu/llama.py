"""A randomly initialised Llama of a given shape, built on the device."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import ModelShape

__all__ = ["build"]


def build(bench: Bench, shape: ModelShape) -> nn.Module:
    """The model with all parameters frozen, in training mode, in ``bench.dtype``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(shape.sequence, 8),
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(bench.seed)
    with default_dtype(bench.dtype), torch.device(bench.device):
        model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    if shape.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
