"""Recovery: a damaged copy of a model learns to give back the hidden states of the original.

It is what adapters are put to after a model was rounded to few bits (QLoRA's successors: LoftQ, arXiv:2310.08659),
pruned (arXiv:2312.15230), or lost some of its layers (arXiv:2403.17887). Nothing but text is needed, and the error of
every token says what is still missing, so that little of what is measured is luck.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Examples, Part
from benchmarks.quality.training import precision, reading

__all__ = ["Recovered", "Recovery", "judge", "load"]


@dataclass
class Recovered:
    """The output of :class:`Recovery`: ``loss``, both models' last hidden states ``(batch, length, hidden)``, and a
    language model's head, which makes logits of them."""

    loss: Tensor
    hidden: Tensor
    wanted: Tensor
    head: nn.Module | None


class Recovery(nn.Module):
    """The damaged copy. The original is beside it, but not a submodule: it is neither adapted nor trained nor saved."""

    def __init__(self, original: nn.Module, damage: Callable[[nn.Module], None], head: nn.Module | None = None) -> None:
        """
        Args:
            head: of a language model, which is not damaged; for :func:`judge` alone.
        """
        super().__init__()
        self.student = copy.deepcopy(original)
        damage(self.student)
        self.config = self.student.config
        self._original = [original.requires_grad_(False).eval()]
        self._head = [head]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Recovered:
        """Its ``loss`` is the squared error of all tokens' states, relative to the original's squares.

        Args: ids and mask are ``(batch, length)``; labels, which every task's batches have, are not looked at.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with torch.no_grad():
            wanted = self._original[0].to(input_ids.device)(**inputs).last_hidden_state.float()
        hidden = self.student(**inputs).last_hidden_state.float()
        error, size = squares(hidden, wanted, attention_mask)
        return Recovered(error / size, hidden, wanted, self._head[0])


def squares(hidden: Tensor, wanted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scalars, sums over all tokens: of the squared error, and of the original's squares.

    Args: both models' states ``(batch, length, hidden)``, and the attention mask ``(batch, length)``.
    """
    mask = mask.unsqueeze(-1)
    return ((hidden - wanted).square() * mask).sum(), (wanted.square() * mask).sum()


def load(folder: Path, damage: Callable[[nn.Module], None]) -> Recovery:
    """A pretrained encoder or language model in float32, without dropout and pooler, beside its damaged copy."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.from_pretrained(folder, **still)
    if not any(name.endswith("ForCausalLM") for name in config.architectures):
        return Recovery(AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False).float(), damage)
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config).float()
    return Recovery(model.base_model, damage, model.get_output_embeddings().requires_grad_(False))


# --- how much of it is recovered


@torch.no_grad()
def judge(model: nn.Module, part: Part, examples: Examples) -> tuple[float, float]:
    """Relative squared error, and agreement with the original, from 0 to 1.

    Of an encoder: the share of the part's texts with the same nearest neighbour in the part, by the cosine of mean
    states, as this kind of model is used. Of a language model: the share of tokens after which the same is the
    likeliest.
    """
    model.eval()
    device = next(model.parameters()).device
    error = size = 0.0
    kept = []
    for _, batch in reading(part, examples, device):
        with precision(device):
            found = model(**batch)
        mask = batch["attention_mask"]
        missing, whole = squares(found.hidden, found.wanted, mask)
        error, size = error + missing.item(), size + whole.item()
        both = (found.hidden, found.wanted)
        if found.head is None:
            # Sums for means: a cosine does not see the number of tokens.
            kept.append(torch.stack([(states * mask.unsqueeze(-1)).sum(1) for states in both]).cpu())
        else:
            head = found.head.to(device)
            kept.append(torch.stack([head(states[mask == 1]).argmax(-1) for states in both]).cpu())
    mended, original = torch.cat(kept, dim=1)
    if found.head is None:
        mended, original = _neighbours(mended), _neighbours(original)
    return error / size, (mended == original).double().mean().item()


def _neighbours(rows: Tensor) -> Tensor:
    rows = nn.functional.normalize(rows, dim=1)
    return (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1)
