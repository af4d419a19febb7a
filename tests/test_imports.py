"""The direction of dependencies, and that optional ones are optional."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("l1ra/**/*.py"), *ROOT.glob("l1ra_kernels/**/*.py")])
# Of l1ra, from top to bottom; "" is the package itself, which collects the public names.
ROOMS = ["__main__", "", "reporting", "model", "training", "processes", "integrations", "files", "layers"]
ROOMS += ["allocation", "config"]
# What users may not have, or what costs seconds to import.
OPTIONAL = {"transformers", "trl", "peft", "accelerate", "datasets", "matplotlib", "sklearn", "pandas", "bitsandbytes"}
OPTIONAL |= {"sentence_transformers", "diffusers", "deepspeed"}


def imports(path):
    """(top-level name, whether it is within a function) of every import statement of a file."""
    tree = ast.parse(path.read_text())
    within = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield node.module.split(".")[0], id(node) in within


def names(path):
    return {name for name, _ in imports(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_imports_only_what_its_package_may(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] == "l1ra_kernels":
        assert names(path) <= {"torch", "triton", "l1ra_kernels"}
        return
    allowed = {"torch", "numpy", "l1ra", "l1ra_kernels"}
    if parts[:2] == ("l1ra", "integrations"):
        allowed |= {"transformers", "accelerate"}
    if path.name in ("checkpoint.py", "peft_export.py", "peft_import.py", "save_pretrained.py"):
        allowed |= {"safetensors"}
    if path.name in ("merged_weight.py", "quantised_state.py"):
        allowed |= {"bitsandbytes"}
    if path.name == "zero.py":
        allowed |= {"deepspeed"}
    if path.name == "self_check.py":
        allowed |= {"transformers", "bitsandbytes"}
    if path.name == "plot.py":
        allowed |= {"matplotlib"}
    assert names(path) <= allowed
    for name, lazily in imports(path):
        assert lazily or name not in OPTIONAL, f"{name} is imported before it is needed"


def modules_imported(path):
    """Full names of the modules of these packages that a file imports, anywhere in it, also for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in submodules}
    return found & MODULES.keys()


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def is_method(module):
    return module.partition(".")[0] == "l1ra"


def room_of(module):
    """The folder of ``l1ra`` in which a module lies, or the name of a file in no folder; "" is the package itself."""
    return module.removeprefix("l1ra").lstrip(".").partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_each_room_to_rooms_below_it(path):
    module = next(name for name, file in MODULES.items() if file == path)
    if is_method(module):
        below = ROOMS[ROOMS.index(room_of(module)) :]
        assert {room_of(name) for name in modules_imported(path) if is_method(name)} <= set(below)


def test_every_room_is_there_and_has_files():
    assert {room_of(name) for name in MODULES if is_method(name)} == set(ROOMS)


def test_no_file_imports_one_that_imports_it():
    TopologicalSorter({name: modules_imported(path) for name, path in MODULES.items()}).prepare()


def test_there_is_something_to_look_at():
    assert len(FILES) > 15 and {"torch", "l1ra_kernels"} <= set().union(*map(names, FILES))


TRAINS = """
import torch, l1ra
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
controller = l1ra.patch(model, 6, total_steps=10)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for _ in range(10):
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert controller.steps == 10
print(l1ra.report(model))
l1ra.unpatch(model)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("blocked", [["triton"], sorted(OPTIONAL), ["numpy"]], ids=["triton", "optional", "numpy"])
def test_training_works_without(blocked):
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    assert "2 adapters" in run(block + TRAINS)


def test_nothing_heavy_is_imported_before_it_is_needed():
    loaded = run(TRAINS + "\nimport sys\nprint(*sorted(sys.modules))").split()
    assert "torch" in loaded and not OPTIONAL & set(loaded)


def test_without_matplotlib_the_picture_says_what_to_install():
    code = """
import sys, torch
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import l1ra
model = torch.nn.Sequential(torch.nn.Linear(6, 8))
l1ra.patch(model, 2)
try:
    l1ra.plot_ranks(model, "never.png")
except ImportError as error:
    print(error)
"""
    assert "pip install 'l1ra[plot]'" in run(code)


def test_the_public_names_are_there():
    import l1ra
    import l1ra_kernels

    for package in (l1ra, l1ra_kernels):
        assert all(hasattr(package, name) for name in package.__all__)
    assert {
        "patch",
        "unpatch",
        "merge",
        "unmerge",
        "report",
        "doctor",
        "plot_ranks",
        "L1RAConfig",
        "L1RALinear",
        "RankController",
    } <= set(l1ra.__all__)
