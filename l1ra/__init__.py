"""L1RA: low-rank adapters whose ranks find their layers while the model trains."""

from l1ra.config import L1RAConfig
from l1ra.controller import RankController
from l1ra.doctor import doctor
from l1ra.linear import L1RALinear
from l1ra.merge import merge, unmerge
from l1ra.patch import patch, unpatch
from l1ra.peft_export import export_peft
from l1ra.peft_import import from_peft
from l1ra.report import plot_ranks, report
from l1ra.restore import load

__version__ = "0.1.0"

__all__ = [
    "L1RAConfig",
    "L1RALinear",
    "RankController",
    "doctor",
    "export_peft",
    "from_peft",
    "load",
    "merge",
    "patch",
    "plot_ranks",
    "report",
    "unmerge",
    "unpatch",
]
