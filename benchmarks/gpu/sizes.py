"""Sizes of all measurements: the real ones, and tiny ones to test the program on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALWAYS", "FULL", "SECTIONS", "TINY", "ModelShape", "Shape", "Sizes", "seconds_for"]

MEGA = 1 << 20

# In the order in which they run, the most valuable first: the share of all seconds that each may take, and the most.
# Without its tests nothing of ours is timed: they may take long, should compiling be slow.
SECTIONS: dict[str, tuple[float, float]] = {
    "environment": (0.06, 40),
    "correctness": (0.24, 130),
    "trainings": (0.14, 60),
    "step": (0.25, 300),
    "linears": (0.19, 200),
    "kernels": (0.08, 100),
    "ceilings": (0.04, 40),
    "reallocation": (0.04, 40),
    "workers": (0.04, 60),
}
ALWAYS = ("environment", "correctness")


def seconds_for(section: str, seconds: float) -> float:
    """The time limit of a section in a run of ``seconds``."""
    share, most = SECTIONS[section]
    return min(share * seconds, most)


@dataclass(frozen=True)
class Shape:
    """A linear layer: M tokens, K in, N out, rank r."""

    tokens: int
    inputs: int
    outputs: int
    rank: int

    def __str__(self) -> str:
        return f"M={self.tokens} K={self.inputs} N={self.outputs} r={self.rank}"


@dataclass(frozen=True)
class ModelShape:
    """A Llama, and how it is trained: a batch of sequences, with gradient checkpointing or without.

    ``steps`` are the training steps that are timed each time an adapter is put in.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    batch: int
    sequence: int
    checkpointing: bool
    steps: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, by their names in transformers: (in, out)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclass(frozen=True)
class Sizes:
    """Everything that differs between a real run and a tiny one."""

    copy_bytes: int
    flush_bytes: int
    square: int
    shapes: tuple[Shape, ...]
    rounds: int
    layer_tokens: int
    layer_rank: int
    layer: ModelShape
    models: tuple[ModelShape, ...]
    model_rounds: int
    model_rank: int
    reallocations: int


LLAMA_8B = ModelShape("Llama-3-8B shape", 4096, 14336, 32, 32, 8, 128, 128256, False, 4, 2048, True, 3)
LLAMA_1B = ModelShape("Llama-3.2-1B shape", 2048, 8192, 16, 32, 8, 64, 128256, True, 4, 2048, False, 8)
LITTLE = ModelShape("tiny Llama", 32, 48, 2, 4, 2, 8, 64, False, 2, 8, True, 1)

FULL = Sizes(
    copy_bytes=1024 * MEGA,
    flush_bytes=256 * MEGA,
    square=8192,
    shapes=(
        Shape(8192, 4096, 4096, 16),
        Shape(8192, 4096, 1024, 16),
        Shape(8192, 4096, 14336, 16),
        Shape(8192, 14336, 4096, 16),
        Shape(2048, 4096, 4096, 16),
        Shape(8192, 4096, 4096, 64),
    ),
    rounds=40,
    layer_tokens=8192,
    layer_rank=16,
    layer=LLAMA_8B,
    models=(LLAMA_1B, LLAMA_8B),
    model_rounds=3,
    model_rank=16,
    reallocations=8,
)

TINY = Sizes(
    copy_bytes=MEGA,
    flush_bytes=MEGA,
    square=64,
    shapes=(Shape(24, 32, 32, 4), Shape(24, 48, 16, 3)),
    rounds=3,
    layer_tokens=16,
    layer_rank=4,
    layer=LITTLE,
    models=(LITTLE,),
    model_rounds=2,
    model_rank=4,
    reallocations=2,
)
