"""Ways to damage a model, so that adapters can be trained to recover it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["prune_weights", "round_weights", "without_layers"]

GROUP = 64  # weights of a row that share a scale


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Each linear layer's weight to the nearest of ``2**bits`` levels, symmetric, one scale for 64 of a row."""
    top = 2 ** (bits - 1) - 1
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            groups = layer.weight.split(GROUP, dim=1)
            layer.weight.copy_(torch.cat([_rounded(group, top) for group in groups], dim=1))


def _rounded(weight: Tensor, top: int) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
    return (weight / scale).round().clamp(-top - 1, top) * scale


@torch.no_grad()
def prune_weights(model: nn.Module, share: float) -> None:
    """This share (0 to 1, rounded down to whole weights) of each row of a linear layer's weight to 0: the smallest."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            least = layer.weight.abs().topk(int(share * layer.in_features), dim=1, largest=False).indices
            layer.weight.scatter_(1, least, 0.0)


def without_layers(model: nn.Module, numbers: tuple[int, ...]) -> None:
    """Take these of an encoder's layers out."""
    layers = model.encoder.layer
    model.encoder.layer = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in numbers)
    model.config.num_hidden_layers = len(model.encoder.layer)
