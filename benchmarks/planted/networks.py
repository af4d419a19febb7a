"""The random networks that are students and teachers. Weights are large enough that every layer matters."""

from __future__ import annotations

import math

from torch import Tensor, nn


class ResidualNet(nn.Module):
    """``x <- x + branch * relu(x W + b)``, layer after layer."""

    def __init__(self, width: int, depth: int, branch: float = 0.5) -> None:
        super().__init__()
        self.branch = branch
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / width))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu() * self.branch
        return x / math.sqrt(len(self.layers))


class Block(nn.Module):
    """``x + down(relu(up(x))) / 2``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu()) / 2


class BlockNet(nn.Module):
    """Residual blocks with inner widths of their own."""

    def __init__(self, width: int, inner: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, i) for i in inner)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x / math.sqrt(len(self.blocks))


class LlamaNet(nn.Module):
    """A ``LlamaModel`` that is given embeddings: ``(batch, length, width)`` -> its last hidden state.

    Its own first weights (standard deviation 0.02) would leave every layer next to nothing beside the residual stream.
    """

    def __init__(self, width: int, depth: int, heads: int, inner: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.model = LlamaModel(
            LlamaConfig(
                vocab_size=1,  # no token is ever looked up
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                intermediate_size=inner,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state
