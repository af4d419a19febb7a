"""L1RAConfig: the settings of L1RA, validated at construction and immutable."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["INITS", "LAYER_SETTINGS", "RULES", "L1RAConfig"]

RULES = ("adaptive-l1", "l1")
INITS = ("kaiming", "gaussian")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Settings of the layers, which l1ra.patch passes to them. A RankController made for existing layers can't have them.
LAYER_SETTINGS = {"alpha", "rank_stabilized", "scale_with_rank", "dropout", "init", "adapter_dtype", "reserve"}
LAYER_SETTINGS |= {"augment", "strict"}

# The values that the settings may have.
CHOICES = {
    "init": INITS,
    "new_rows": ("gradient", "random"),
    "rule": RULES,
    "budget_unit": ("ranks", "params"),
    "adapter_dtype": ADAPTER_DTYPES,
}
FLAGS = ("rank_stabilized", "scale_with_rank", "principal_axes", "exclude_pruned", "augment", "strict")
AT_LEAST = {"total_steps": 1, "min_interval": 1, "min_rank": 1, "max_rank": 1, "reserve": 1, "seed": 0}
NOT_NEGATIVE = ("alpha", "gate_lr", "l1_lambda", "l2_lambda")
BELOW_1 = ("prune_threshold", "dropout", "warmup", "cooldown")  # and not negative
UP_TO_1 = {"margin": 0, "turnover": 0, "min_coherence": -1}  # setting -> smallest value
OPTIONAL = ("alpha", "gate_lr", "l1_lambda", "total_steps", "max_rank", "reserve")  # may be None


@dataclass(frozen=True)
class L1RAConfig:
    """The settings of L1RA: how adapters are made and scaled, and how their ranks are judged and reallocated.

    ``L1RAConfig()`` is the preset ``"default"``. The preset ``"reference"`` is the paper (L1RA, arXiv:2509.04884) as
    its authors ran it, see :meth:`from_preset`.

    Example::

        config = l1ra.L1RAConfig(alpha=16, dropout=0.05)
        controller = l1ra.patch(model, budget=8 * 24, config=config)

    Attributes:
        alpha: numerator of the scaling. None (default) stands for the adapter's initial rank. The scaling is then 1.
        rank_stabilized: use the scaling ``alpha / sqrt(initial rank)`` (rsLoRA, arXiv:2312.03732) instead of
            ``alpha / initial rank``. Default False.
        scale_with_rank: multiply the scaling by ``sqrt(old rank / new rank)`` when an adapter's rank changes, as in
            rsLoRA, and divide B by this factor, so that the output does not change. An adapter then does not learn
            faster because its rank grows. False: the scaling does not change, as in the paper. Default True.
        dropout: dropout probability of the adapter's input, from 0 to below 1. Default 0.
        init: initial values of A; B is initialised to 0. ``"kaiming"`` (default): uniform in
            ``[-1 / sqrt(in_features), 1 / sqrt(in_features)]``, as in PEFT. ``"gaussian"``: normal with standard
            deviation ``1 / initial rank``, as in the paper.
        new_rows: values of A for ranks that an adapter receives. ``"random"`` (default): as in ``init``.
            ``"gradient"``: the leading directions of the layer's weight gradient in the first half of the interval
            before the reallocation, scaled so that the gradient's response to them is as large as to random rows.
        rule: how gates move. ``"adaptive-l1"`` (default): an L1 penalty on the least important ranks, by their measured
            importance. ``"l1"``: the AdamE optimizer of the paper, Adam with a decoupled elastic net.
        l1_lambda: strength of the L1 penalty. With the rule ``"l1"`` each step reduces a gate by ``gate_lr *
            l1_lambda``; None (default) stands for 1e-3. With ``"adaptive-l1"`` it is relative to the step that moves a
            gate back towards 1; None (default) stands for 1.
        l2_lambda: strength of the decoupled L2 penalty. Only used by the rule ``"l1"``. Default 0.
        gate_lr: learning rate of the gates, constant. With the rule ``"l1"``, None (default) stands for 2e-2. With
            ``"adaptive-l1"``, None (default) stands for the rate at which a penalised gate falls from 1 to 0 within
            half an interval.
        margin: a rank is pruned only if its importance is below this share of another adapter's need. The share is 1 at
            the start and falls geometrically to ``margin`` at the last reallocation. Smaller values move fewer ranks.
            From 0 to 1. Only used by the adaptive rule. Default 0.25.
        principal_axes: rotate each adapter's ranks onto the singular directions of ``B.T @ A`` at a reallocation.
            Otherwise several ranks that have learned the same direction look equally important. Adapters whose
            optimizer state can't be rotated are left unchanged. Only used by the adaptive rule. Default True.
        min_coherence: an adapter receives no ranks while the gradients of different batches agree less than this, or
            less than half as much as in the adapter where they agree most: a new rank would learn noise. A cosine, see
            ``gradient_probe.coherence``, from -1 (all adapters may receive ranks) to 1. Only used by the adaptive rule.
            Default 0.1.
        turnover: largest share of all ranks that are pruned in an interval, from 0 to 1. Only used by the adaptive
            rule. Default 0.3.
        total_steps: number of optimizer steps of the whole training. None (default) takes it from the Trainer.
        interval: optimizer steps between two reallocations (an int), or a share of all steps (a float between 0 and
            1). The adaptive rule judges a rank once it has been trained for an interval. The initial ranks are judged
            in the middle of the first interval already, unless other parameters than those of the adapters are
            trained, such as a new head. Default 0.05.
        min_interval: smallest number of steps of an interval that is given as a share. In fewer steps the importance of
            a rank can't be distinguished from noise, and new ranks have no time to learn. Default 40.
        warmup: share of all optimizer steps, at the start, without reallocations. Default 0.05.
        cooldown: share of all optimizer steps, at the end, without reallocations. Default 0.3.
        prune_threshold: ranks whose gate is strictly below this value are pruned at a reallocation. Default 1e-10, in
            effect those whose gate is 0.
        min_rank: smallest rank of an adapter, at least 1. Default 1.
        max_rank: largest rank of an adapter. None (default) stands for the largest possible rank of its weight.
        budget_unit: unit of the budget. ``"ranks"`` (default), or ``"params"``: the number of parameters of the
            adapters, ``in_features + out_features`` for each rank, without the gates.
        exclude_pruned: an adapter that loses a rank at a reallocation receives none at the same reallocation. With the
            adaptive rule it receives only ranks that no other adapter can take. Default True.
        seed: seed of all random numbers drawn by L1RA. torch's global generator is not used. Default 0.
        adapter_dtype: dtype of A and B: ``"float32"`` (default), ``"bfloat16"``, ``"float16"``, ``"float64"``, or a
            torch.dtype. Gates are float64 if A and B are, otherwise float32.
        reserve: constant number of rows of each adapter's parameters, and so its largest rank. Rows beyond the rank are
            0 and only cost memory. Shapes and addresses don't change with the rank then: ``torch.compile`` does not
            recompile, captured graphs stay valid, and ranks move where several processes train, where they don't
            without a reserve. None (default): as many rows as ranks; in one of several processes :func:`l1ra.patch`
            takes 4 times the mean rank.
        augment: store the weights of layers with ``out_features >= 1.5 * in_features`` with 128 more columns, into
            which the kernels write the adapter, so that a single product computes the layer. It saves a pass over the
            output and costs memory, 3 % of a weight with 4096 inputs. Default False.
        strict: raise an error at ``l1ra.patch`` and in the forward if an adapter would run as plain PyTorch instead of
            in the fused kernels. Default False: it runs as plain PyTorch, and ``l1ra.report`` states the reason.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range. Both messages say which values are accepted.
    """

    alpha: float | None = None
    rank_stabilized: bool = False
    scale_with_rank: bool = True
    dropout: float = 0.0
    init: str = "kaiming"
    new_rows: str = "random"
    rule: str = "adaptive-l1"
    l1_lambda: float | None = None
    l2_lambda: float = 0.0
    gate_lr: float | None = None
    margin: float = 0.25
    principal_axes: bool = True
    min_coherence: float = 0.1
    turnover: float = 0.3
    total_steps: int | None = None
    interval: int | float = 0.05
    min_interval: int = 40
    warmup: float = 0.05
    cooldown: float = 0.3
    prune_threshold: float = 1e-10
    min_rank: int = 1
    max_rank: int | None = None
    budget_unit: str = "ranks"
    exclude_pruned: bool = True
    seed: int = 0
    adapter_dtype: str | torch.dtype = "float32"
    reserve: int | None = None
    augment: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.adapter_dtype, torch.dtype):
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        for name, least in AT_LEAST.items():
            _check_int(name, getattr(self, name), least)
        for name in NOT_NEGATIVE:
            _check_number(name, getattr(self, name), lambda x: 0 <= x < float("inf"), "finite and at least 0")
        for name in BELOW_1:
            _check_number(name, getattr(self, name), lambda x: 0 <= x < 1, "from 0 to below 1")
        for name, least in UP_TO_1.items():
            _check_number(name, getattr(self, name), lambda x, least=least: least <= x <= 1, f"from {least} to 1")
        if self.alpha == 0:
            raise ValueError("alpha must be above 0: at 0 the adapters would do nothing.")
        if isinstance(self.interval, int) and not isinstance(self.interval, bool):
            _check_int("interval", self.interval, 1)
        elif not (isinstance(self.interval, float) and 0 < self.interval < 1):
            raise ValueError(
                "interval must be a number of steps (an int from 1) or a share of the total (a float between 0 "
                f"and 1), not {self.interval!r}."
            )
        if self.warmup + self.cooldown >= 1:
            raise ValueError(
                f"warmup {self.warmup} and cooldown {self.cooldown} leave no step for reallocations: "
                "their sum must be below 1."
            )
        for name in ("max_rank", "reserve"):
            if getattr(self, name) is not None and getattr(self, name) < self.min_rank:
                raise ValueError(f"{name} {getattr(self, name)} is below min_rank {self.min_rank}.")

    @classmethod
    def from_preset(cls, preset: str = "default", **overrides: Any) -> L1RAConfig:
        """The settings of a preset.

        ``"reference"`` follows the code of the paper's authors, with four differences: optimizer state is moved with
        the ranks at a reallocation instead of being discarded; ranks that no adapter can take are kept as spare and
        offered again instead of being lost; the rank of an adapter does not exceed that of its weight; Parameters
        remain the same objects.

        Example::

            config = l1ra.L1RAConfig.from_preset("reference", l1_lambda=5e-3)
            controller = l1ra.patch(model, budget=8 * 24, config=config)

        Args:
            preset: ``"default"`` or ``"reference"``.
            **overrides: settings that replace those of the preset.

        Raises:
            ValueError: no such preset, or a value is out of its range.
            TypeError: no such setting, or a value has the wrong type.
        """
        _check_choice("preset", preset, tuple(_PRESETS))
        return cls().replace(**{**_PRESETS[preset], **overrides})

    def replace(self, **overrides: Any) -> L1RAConfig:
        """A copy in which some settings are replaced. It is validated as a new config.

        Raises:
            ValueError: a value is out of its range.
            TypeError: no such setting, or a value has the wrong type.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(fields)}."
                raise TypeError(f"{name!r} is no setting of L1RA: {hint}")
        return dataclasses.replace(self, **overrides)

    @property
    def dtype(self) -> torch.dtype:
        """``adapter_dtype`` as a torch.dtype."""
        return getattr(torch, self.adapter_dtype)


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {
        "scale_with_rank": False,
        "init": "gaussian",
        "rule": "l1",
        "l1_lambda": 1e-3,
        "gate_lr": 2e-2,
        "interval": 0.1,
        "min_interval": 1,
        "warmup": 0.0,
        "cooldown": 0.0,
        "prune_threshold": 1e-10,
        "min_rank": 1,
        "exclude_pruned": True,
        "adapter_dtype": "float32",
    },
}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def _check_int(name: str, value: object, least: int) -> None:
    optional = name in OPTIONAL
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{' or None' if optional else ''}, not {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}.")


def _check_number(name: str, value: object, in_range: Callable[[float], bool], span: str) -> None:
    optional = name in OPTIONAL
    if optional and value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, not {value!r}.")
    if not in_range(value):
        raise ValueError(f"{name} must be {span}, not {value}.")
