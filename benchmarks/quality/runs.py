"""One run: a method on a task at a budget with a seed and a learning rate, in a process of its own; one record.

python -m benchmarks.quality.runs '{"task": "polarity", "method": "l1ra", ...}'    # a Spec; the program calls this
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.environment import git_commit, processor_name, versions
from benchmarks.common.records import Record, RecordStore

__all__ = ["TUNING_SEED", "Spec", "run", "store"]

TUNING_SEED = 1000
PACKAGES = ("torch", "transformers", "peft", "numpy", "scikit-learn", "triton")


@dataclass(frozen=True)
class Spec:
    """The settings of a run, and the folder of its record.

    Attributes:
        task, method: names.
        multiplier: the budget in multiples of the number of adapted layers; 0 for what has no adapters.
        seed: of the head, the adapters, the order of the data and dropout. ``TUNING_SEED``: a try of a learning rate,
            for which nothing is tested.
        rate: the learning rate; 0 for the frozen model.
        steps: optimizer steps.
        out: folder of all records.
        device: ``"cpu"`` or ``"cuda"``.
        label: name in the record, if it is not the method's.
        settings: of ``L1RAConfig``, as pairs.
        head_rate: the learning rate of the head; None where no fresh head is trained.
    """

    task: str
    method: str
    multiplier: float
    seed: int
    rate: float
    steps: int
    out: str
    device: str = "cpu"
    label: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    head_rate: float | None = None

    @property
    def name(self) -> str:
        """Of the method, in the record."""
        return self.label or self.method

    @property
    def title(self) -> str:
        """For messages."""
        text = f"{self.task}/{self.name}/{self.multiplier:g}x-seed{self.seed}-lr{self.rate:g}"
        return text if self.head_rate is None else f"{text}-head{self.head_rate:g}"

    def record(self) -> Record | None:
        """The record of this run; None if there is none."""
        key = (self.task, self.name, self.multiplier, self.seed, self.rate, self.head_rate)
        return store(self.out).get(*key)

    @classmethod
    def parse(cls, text: str) -> Spec:
        found = json.loads(text)
        return cls(**{**found, "settings": tuple(map(tuple, found.get("settings", ())))})

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def store(out: str | Path) -> RecordStore:
    """The records in ``out``: a file for each task."""
    return RecordStore(Path(out), ("task", "method", "multiplier", "seed", "rate", "head_rate"))


def run(spec: Spec) -> Record:
    """Train, evaluate, and store the record.

    Raises:
        Any error of the training; nothing is recorded then.
    """
    import torch

    from benchmarks.quality import models, recovery, training
    from benchmarks.quality.methods import FROZEN, adapt
    from benchmarks.quality.tasks import TASKS

    begin = time.perf_counter()
    task = TASKS[spec.task]
    examples = task.examples()
    if task.damage is None:
        model, judge = models.load(task.model(), examples.classes), training.evaluate
    else:
        model, judge = recovery.load(task.model(), task.damage), recovery.judge
    model = model.to(spec.device)
    batches = training.batch_numbers(examples.train.lengths, task.batch, spec.steps, spec.seed)
    tests = spec.seed != TUNING_SEED
    record = {
        **{name: value for name, value in dataclasses.asdict(spec).items() if name != "out"},  # where it lies
        "method": spec.name,
        "base_method": spec.method,
        "settings": dict(spec.settings),
        "model": task.model_name,
        "metric": task.metric,
        "batch": task.batch,
        "max_tokens": task.max_tokens,
        "examples": {name: len(getattr(examples, name)) for name in ("train", "validation", "test")},
        "tokens": int(sum(len(numbers) * examples.train.lengths[numbers].max() for numbers in batches)),
    }
    if spec.method == FROZEN:
        record |= {"alpha": None, "diverged": False}
        if task.has_head:
            validation, test = training.frozen_classifier(model, examples, batches)
        else:
            validation, test = (judge(model, p, examples) for p in (examples.validation, examples.test))
    else:
        terms = {"alpha": task.middle, "seed": spec.seed, "steps": spec.steps, "settings": dict(spec.settings)}
        adapted = adapt(spec.method, model, spec.multiplier, **terms)
        trained = training.train(adapted, examples, batches, spec.rate, spec.seed, spec.head_rate)
        record |= {
            "alpha": float(dict(spec.settings).get("alpha", task.middle)),
            "seconds": round(trained.seconds, 3),
            "step_seconds": round(trained.step_seconds, 5),
            "peak_mib": round((trained.peak_bytes or peak_bytes()) / 2**20, 1),
            "diverged": trained.diverged,
            **spent(adapted),
        }
        model = adapted.model
        validation = judge(model, examples.validation, examples)
        test = judge(model, examples.test, examples) if tests else (None, None)
    record |= {
        "validation_loss": finite(validation[0]),
        "validation_metric": finite(validation[1]),
        "test_loss": finite(test[0]),
        "test_metric": finite(test[1]),
        "total_seconds": round(time.perf_counter() - begin, 1),
        "hardware": hardware(torch, spec.device),
        "threads": torch.get_num_threads(),
        "versions": {**versions(*PACKAGES), "commit": git_commit()},
    }
    store(spec.out).add(record)
    return record


def spent(adapted: Any) -> dict[str, Any]:
    """Ranks and parameters before and after a training."""
    after, controller = adapted.ranks(), adapted.controller
    found = {
        "budget": adapted.budget,
        "budget_unit": "ranks" if controller is None else controller.config.budget_unit,
        "adapted_layers": len(after),
        "initial_ranks": adapted.initial_ranks,
        "ranks": after,
        "layer_sizes": adapted.sizes,
        "initial_adapter_parameters": adapted.parameters_of(adapted.initial_ranks),
        "adapter_parameters": adapted.parameters_of(after),
        "head_parameters": sum(p.numel() for p in adapted.head),
        "ranks_moved": None,
        "reallocations": None,
    }
    if controller is not None:
        config = dataclasses.asdict(controller.config)
        turnover = [{k: entry[k] for k in ("step", "pruned", "moved", "spare")} for entry in controller.history[1:]]
        found |= {"ranks_moved": controller.moved, "reallocations": turnover, "config": config}
    return found


def finite(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity: a loss that is none is written as null."""
    return value if value is not None and math.isfinite(value) else None


def peak_bytes() -> int:
    """Most memory that this process has held until now."""
    try:
        # Unlike ru_maxrss, not begun with the size of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def hardware(torch: Any, device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(Spec.parse(sys.argv[1]))
