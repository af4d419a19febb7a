"""The settings of L1RA: validated once, frozen afterwards. What happens in training is never written back here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LAYER_SETTINGS", "L1RAConfig"]

RULES = ("adaptive-l1", "l1")
INITS = ("kaiming", "gaussian")
NEW_ROWS = ("gradient", "random")
BUDGET_UNITS = ("ranks", "params")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Settings that only ``patch`` reads, for the layers that it makes.
LAYER_SETTINGS = {"alpha", "rank_stabilized", "scale_with_rank", "dropout", "init", "adapter_dtype", "reserve"}
LAYER_SETTINGS |= {"augment", "strict"}


@dataclass(frozen=True)
class L1RAConfig:
    """How ranks are scaled, judged and moved.

    ``L1RAConfig()`` is the preset ``"default"``. ``L1RAConfig.from_preset("reference")`` is the paper as its authors
    ran it; it departs from their code in this only: optimizer state is carried along at a reallocation instead of
    being thrown away, ranks that find no receiver are kept as spare and offered again instead of being lost, no
    adapter gets more ranks than its weight has, and Parameters keep their identity.

    Attributes:
        alpha: numerator of the scaling; None (default) means the adapter's initial rank, a scaling of 1.
        rank_stabilized: scaling ``alpha / sqrt(initial rank)`` (rsLoRA, arXiv:2312.03732) instead of
            ``alpha / initial rank``. Default False.
        scale_with_rank: when an adapter's rank changes, so does its scaling, by the root of ``old rank / new rank``
            (the law of rsLoRA): it does not learn faster for having got ranks. B is scaled so that the output stays.
            False: the scaling of the start for good, as in the paper. Default True.
        dropout: probability with which an input element of the adapter branch is dropped. Default 0.
        init: first values of A; B starts at 0. ``"kaiming"`` (default): uniform within ``1 / sqrt(in_features)``, as
            PEFT. ``"gaussian"``: normal with standard deviation ``1 / initial rank``, as the paper.
        new_rows: A of a rank that an adapter receives. ``"random"`` (default): as ``init``. ``"gradient"``: along the
            leading directions of the layer's weight gradients in the first half of the interval before the
            reallocation, scaled so that the gradient's response to them is as large as to random rows.
        rule: how gates move. ``"adaptive-l1"`` (default): an L1 step weighted by each rank's measured importance.
            ``"l1"``: the paper's AdamE, Adam with a decoupled elastic net.
        l1_lambda: strength of the L1 penalty. Rule ``"l1"``: the step is ``gate_lr * l1_lambda`` (default 1e-3).
            Rule ``"adaptive-l1"``: relative to the pull that brings gates back to 1 (default 1).
        l2_lambda: strength of the decoupled L2 penalty, rule ``"l1"`` only. Default 0.
        gate_lr: the gates' own learning rate, per step, constant. Rule ``"l1"``: default 2e-2. Rule
            ``"adaptive-l1"``: None (default) lets a useless gate fade from 1 to 0 within half an interval.
        margin: at the last reallocation the adaptive rule gives a rank up only if its importance is below this share of
            another adapter's need; the share starts at 1 and falls geometrically. Smaller moves fewer. Default 0.25.
        principal_axes: at a reallocation, turn each adapter's ranks onto the singular directions of what it adds:
            ranks that learned the same are then not taken for many important ones. Adaptive rule only; an adapter
            whose optimizer state can't be turned (quantised moments) stays as it is. Default True.
        min_coherence: where the gradients of different batches agree less than this, or less than half as much as where
            they agree most, an adapter is not needy, whatever its ranks are worth: a new one would learn noise. A
            cosine, see ``Probe.coherence``; at -1 all of them may be needy. Adaptive rule only. Default 0.1.
        turnover: largest share of all ranks that the adaptive rule gives up in an interval. Default 0.3.
        total_steps: optimizer steps of the whole training; None (default) takes it from the Trainer.
        interval: between two reallocations: optimizer steps (an int), or a share of the total (a float in (0, 1)).
            The adaptive rule judges ranks that have been trained for one; the first ones in the middle of the first
            one already, unless anything beside the adapters is trained, such as a fresh head. Default 0.05.
        min_interval: shortest interval in steps when it is given as a share: in fewer, the worth of a rank can't be
            told from noise, and what is dealt has no time to learn. Default 40.
        warmup: share of the total at the start without reallocation. Default 0.05.
        cooldown: share of the total at the end without reallocation. Default 0.3.
        prune_threshold: gates strictly below are cut at a reallocation. Default 1e-10: those at exactly 0, in effect.
        min_rank: rank that every adapter keeps, at least 1. Default 1.
        max_rank: largest rank of an adapter; None (default) means that of its weight.
        budget_unit: what the budget counts: ``"ranks"`` (default), or ``"params"``, adapter parameters
            (in_features + out_features a rank; gates are not counted).
        exclude_pruned: an adapter that has just had a rank cut gets none at the same reallocation; with the adaptive
            rule, only what no other adapter can take. Default True.
        seed: of all random numbers drawn here; torch's global generator is never touched. Default 0.
        adapter_dtype: of A and B: ``"float32"`` (default), ``"bfloat16"``, ``"float16"``, ``"float64"`` or a
            torch.dtype. Gates are float32, in float64 adapters float64.
        reserve: rows that every adapter's tensors have for good, and so the largest rank; those beyond the rank are 0
            and cost memory only. Shapes and addresses never change then: ``torch.compile`` does not compile anew when
            ranks move, captured graphs stay valid, and DistributedDataParallel goes on, where ranks rest without it.
            Begin with 4 times the mean rank. Default None: no reserve, the tensors have as many rows as ranks.
        augment: store the weights of layers that are wider than their input (out_features from 1.5 times in_features)
            with 128 columns of room, in which the kernels put the adapter: one product then does both. Costs memory
            (3 % of such a weight at 4096 inputs), saves a pass over the output. Default False.
        strict: raise, when patching and in every forward, where an adapter would run as plain PyTorch instead of in
            the fused kernels. Default False: it falls back, and ``l1ra.report`` says why.

    Raises:
        ValueError, TypeError: a value is out of its range; the message says what to write.
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
        for name, choices in (
            ("init", INITS),
            ("new_rows", NEW_ROWS),
            ("rule", RULES),
            ("budget_unit", BUDGET_UNITS),
        ):
            _check_choice(name, getattr(self, name), choices)
        for name in ("rank_stabilized", "scale_with_rank", "principal_axes", "exclude_pruned", "augment", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        for name, low in (
            ("total_steps", 1),
            ("min_interval", 1),
            ("min_rank", 1),
            ("max_rank", 1),
            ("reserve", 1),
            ("seed", 0),
        ):
            _check_int(name, getattr(self, name), low, optional=name in ("total_steps", "max_rank", "reserve"))
        for name, low, high in (
            ("alpha", 0.0, None),
            ("gate_lr", 0.0, None),
            ("l1_lambda", 0.0, None),
            ("l2_lambda", 0.0, None),
            ("prune_threshold", 0.0, 1.0),
            ("dropout", 0.0, 1.0),
            ("warmup", 0.0, 1.0),
            ("cooldown", 0.0, 1.0),
        ):
            optional = name in ("alpha", "gate_lr", "l1_lambda")
            _check_float(name, getattr(self, name), low, high, optional=optional)
        for name, low in (("margin", 0.0), ("turnover", 0.0), ("min_coherence", -1.0)):
            _check_float(name, getattr(self, name), low, math.nextafter(1.0, 2.0), optional=False)
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
        if isinstance(self.adapter_dtype, torch.dtype):
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
        _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)

    @classmethod
    def from_preset(cls, preset: str = "default", **overrides: Any) -> L1RAConfig:
        """The preset ``"default"`` or ``"reference"``, with single fields replaced.

        Raises:
            ValueError: no such preset.
            TypeError: a keyword that is no field.
        """
        _check_choice("preset", preset, tuple(_PRESETS))
        return cls().replace(**{**_PRESETS[preset], **overrides})

    def replace(self, **overrides: Any) -> L1RAConfig:
        """A copy with single fields replaced, validated anew."""
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


def _check_int(name: str, value: object, low: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{' or None' if optional else ''}, not {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, not {value}.")


def _check_float(name: str, value: object, low: float, high: float | None, optional: bool) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, not {value!r}.")
    if not value >= low or value == float("inf") or (high is not None and value >= high):
        span = f"from {low:g}" + (f" to below {high:g}" if high is not None else "")
        raise ValueError(f"{name} must be {span}, not {value}.")
