"""The plan of the package, enforced on its import statements: imports go down only, and each door is in one module.

A new module belongs in `FLOORS`; the message of the failing test says so.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/specbasis"
HERE = "tests/test_floors.py"

FLOORS = {
    # A name covers the module of that name, and the package with all that is in it. The longest match counts.
    "errors": 0,
    "svd": 0,
    "subspace": 0,
    "entries": 1,
    "checkpoint": 1,
    "architecture": 1,
    "architectures": 1,
    "measures": 2,
    "edits": 2,
    "adapter": 2,
    "cache": 2,
    "nulls": 2,
    "groups": 2,
    "heads": 2,
    "certify": 2,
    "spectra": 2,
    "plan": 3,
    "engine": 3,
    "results": 3,
    "cells": 3,
    "summary": 3,
    "findings": 3,
    "compare": 4,
    "population": 4,
    "lineage": 4,
    "intervene": 4,
    "finetune": 4,
    "pretrain": 4,
    "report": 4,
    "recipes": 5,
    "cli": 5,
    "__init__": 5,  # the public names of the floors below, which the command line may use
    "__main__": 5,
}

# Optional or heavy libraries. Below floor 4 none is imported when a module is, except where the name begins so.
EXTRAS = {"transformers", "peft", "ray", "plotly", "matplotlib"}
EXTRAS_FLOOR = 4
EXTRAS_EXCEPT = {
    "adapter.peft": {"peft", "transformers"},  # the bridge, which is nothing without them
    "adapter.callback": {"transformers"},  # a callback of its Trainer
}

# Calls that only one module may make, by the end of their dotted names.
DECOMPOSITIONS = {
    f"{library}.{name}"
    for library in ("linalg", "torch")
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "eig", "eigvals", "svd_lowrank", "pca_lowrank", "lobpcg")
}
OPENINGS = {
    "torch.load",
    "torch.jit.load",
    "safe_open",
    "safetensors.torch.load",
    "safetensors.torch.load_file",
    "safetensors.numpy.load_file",
    "load_file",
    "pickle.load",
    "pickle.loads",
    "numpy.load",
    "np.load",
}
DECOMPOSITIONS |= {"linalg.eigh_tridiagonal", "linalg.eigvalsh_tridiagonal", "lapack.dsytrd", "linalg.eig_banded"}
DOORS = {
    "a decomposition": (DECOMPOSITIONS, {"svd": DECOMPOSITIONS, "subspace": {"linalg.svdvals"}}),
    # subspace.py takes the singular values of a product of two orthonormal bases and of its remainder: cosines and
    # sines, of k columns, not of a weight.
    "opening a weights file": (OPENINGS, {"checkpoint": OPENINGS}),
}

MODULES = sorted(SOURCE.rglob("*.py"))


def dotted(path):
    """Module name in the package: `report.figures`; `adapter` for adapter/__init__.py; `__init__` for the top."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def floor(module):
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in FLOORS:
            return FLOORS[".".join(parts[:n])]
    pytest.fail(f"{module} has no floor: add {parts[0]!r} to FLOORS in {HERE}, with the floor the design gives it")


def imported(tree, module):
    """(module inside the package, line) of each import of the package, at any level, wherever it stands."""
    package = ["specbasis", *module.split(".")]
    is_package = (SOURCE / Path(*module.split(".")) / "__init__.py").exists() or module == "__init__"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = ["specbasis"] if module == "__init__" else package[: len(package) - node.level + is_package]
                base = ".".join([*up, base]).rstrip(".")
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            inside = name.removeprefix("specbasis.")
            if inside != name and is_module(inside):
                yield inside, node.lineno
            elif name == "specbasis" and isinstance(node, ast.Import):
                yield "__init__", node.lineno
        if isinstance(node, ast.ImportFrom) and names[0] == "specbasis":
            for name in names[1:]:
                if not is_module(name.removeprefix("specbasis.")) and not name.endswith(".__version__"):
                    yield "__init__", node.lineno  # a re-exported name, taken from above


def is_module(inside):
    path = SOURCE / Path(*inside.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def at_import(tree):
    """Statements that run when the module is imported: all but the bodies of functions and of TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from at_import(node)


def libraries(node):
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {(node.module or "").split(".")[0]}
    return set()


def uses(tree):
    """(dotted name, line) of every call target and attribute, with imported names written out."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            head, _, rest = ast.unparse(node).partition(".")
            if head.isidentifier():
                yield ".".join(filter(None, (aliases.get(head, head), rest))), node.lineno


def broken_doors(tree, module):
    for what, (calls, keepers) in DOORS.items():
        allowed = keepers.get(module.split(".")[0], set())
        for name, line in uses(tree):
            hit = next((call for call in calls if name == call or name.endswith(f".{call}")), None)
            if hit and hit not in allowed:
                yield f"line {line}: {name} is {what}, which belongs in {' or '.join(f'{k}.py' for k in keepers)}"


def broken_floors(tree, module):
    mine = floor(module)
    for name, line in imported(tree, module):
        if floor(name) > mine:
            yield f"line {line}: floor {mine} imports {name} from floor {floor(name)}; imports go down only"


def broken_extras(tree, module):
    if floor(module) >= EXTRAS_FLOOR:
        return
    excepted = next((libs for start, libs in EXTRAS_EXCEPT.items() if module.startswith(start)), set())
    for node in at_import(tree):
        for library in (libraries(node) & EXTRAS) - excepted:
            yield (
                f"line {node.lineno}: {library} is optional below floor {EXTRAS_FLOOR}; "
                "import it inside of the function that needs it, or, where the module is nothing without it, "
                f"add it to EXTRAS_EXCEPT in {HERE}"
            )


RULES = (broken_floors, broken_doors, broken_extras)


@pytest.mark.parametrize("path", MODULES, ids=[dotted(path) for path in MODULES])
def test_a_module_keeps_to_its_floor_and_to_the_doors(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    broken = [f"{dotted(path)}, {problem}" for rule in RULES for problem in rule(tree, dotted(path))]
    assert not broken, "\n".join(broken)


# --- the rules themselves see what they are for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("svd", "from specbasis.measures import alignment", "imports measures from floor 2"),
        ("svd", "from specbasis import measures", "imports measures from floor 2"),
        ("svd", "import specbasis.checkpoint", "imports checkpoint from floor 1"),
        ("svd", "from .checkpoint import Checkpoint", "imports checkpoint from floor 1"),
        ("svd", "from . import checkpoint", "imports checkpoint from floor 1"),
        ("measures", "from specbasis import decompose", "imports __init__ from floor 5"),
        ("measures", "def f():\n    from specbasis import SVD", "imports __init__ from floor 5"),
        ("measures", "torch.linalg.svd(W)", "belongs in svd.py"),
        ("measures", "from torch.linalg import eigh\neigh(W)", "belongs in svd.py"),
        ("measures", "from torch import linalg as la\nla.svdvals(W)", "belongs in svd.py"),
        ("measures", "import numpy as np\nnp.linalg.eigvalsh(W)", "belongs in svd.py"),
        ("measures", "torch.svd_lowrank(W)", "belongs in svd.py"),
        ("subspace", "torch.linalg.svd(W)", "belongs in svd.py"),
        ("architecture", "import torch\ntorch.load(path)", "belongs in checkpoint.py"),
        ("architecture", "from torch import load as read\nread(path)", "belongs in checkpoint.py"),
        ("cli", "from safetensors import safe_open\nsafe_open(path)", "belongs in checkpoint.py"),
        ("cli", "from safetensors.torch import load_file\nload_file(path)", "belongs in checkpoint.py"),
        ("measures", "import matplotlib.pyplot as plt", "matplotlib is optional"),
        ("checkpoint", "from transformers import AutoConfig", "transformers is optional"),
        ("results", "try:\n    import plotly\nexcept ImportError:\n    pass", "plotly is optional"),
        ("adapter.layer", "import peft", "peft is optional"),
        ("adapter.peft_bridge", "import ray", "ray is optional"),
    ],
)
def test_a_broken_rule_is_seen(module, source, problem):
    broken = [found for rule in RULES for found in rule(ast.parse(source), module)]
    assert any(problem in found for found in broken), broken


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("measures", "from specbasis.svd import SVD\nfrom specbasis.subspace import principal_angles"),
        ("svd", "from specbasis.errors import InputError\ntorch.linalg.eigh(G)"),
        ("subspace", "torch.linalg.svdvals(C)\ntorch.linalg.qr(C)"),
        ("checkpoint", "import torch\nfrom safetensors import safe_open\ntorch.load(p)\nsafe_open(p)"),
        ("checkpoint.readers", "from safetensors import safe_open\nsafe_open(path)"),
        ("compare", "import plotly\nfrom specbasis.checkpoint import Checkpoint\njson.load(file)"),
        ("results", "def page():\n    import plotly"),
        ("results", "if TYPE_CHECKING:\n    import plotly"),
        ("adapter.peft_bridge", "from peft import PeftModel"),
        ("measures", "s.svd\ndelta.svdvals"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert [found for rule in RULES for found in rule(ast.parse(source), module)] == []


def test_a_module_without_a_floor_is_told_where_to_stand():
    with pytest.raises(
        pytest.fail.Exception, match=r"attic has no floor: add 'attic' to FLOORS in tests/test_floors"
    ):
        floor("attic")
    assert floor("report.figures") == 4
