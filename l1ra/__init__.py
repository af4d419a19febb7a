"""L1RA: LoRA fine-tuning in which ranks move between the adapted layers during training, under a fixed rank budget.

Example::

    controller = l1ra.patch(model, budget=8 * 24, total_steps=1000)  # 24 adapted layers, mean rank 8
    # ... train the model with any torch optimizer ...
    l1ra.export_peft(model, "adapter")
"""

from l1ra.config import L1RAConfig
from l1ra.files.peft_export import export_peft
from l1ra.layers.linear import L1RALinear
from l1ra.model.fsdp import fsdp
from l1ra.model.load import load
from l1ra.model.merge import merge, unmerge
from l1ra.model.patch import patch, unpatch
from l1ra.model.peft_import import from_peft
from l1ra.reporting.doctor import doctor
from l1ra.reporting.plot import plot_ranks
from l1ra.reporting.table import report
from l1ra.training.controller import RankController

__version__ = "0.1.0"

__all__ = [
    "L1RAConfig",
    "L1RALinear",
    "RankController",
    "doctor",
    "export_peft",
    "from_peft",
    "fsdp",
    "load",
    "merge",
    "patch",
    "plot_ranks",
    "report",
    "unmerge",
    "unpatch",
]
