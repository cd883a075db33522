"""The plan of the house, enforced on its import statements: a room imports from the rooms above it in the table and
from itself, no two files import each other in a circle, and each door is in one module. Late imports and those for
type checkers count as well.

The table is `ROOMS`; CONTRIBUTING.md prints it, and a test compares the two with the folders.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/specbasis"
HERE = "tests/test_rooms.py"

ROOMS = (
    "core",
    "checkpoint",
    "architecture",
    "measures",
    "jobs",
    "comparison",
    "lineage",
    "adapter",
    "finetuning",
    "interventions",
    "treatment",
    "tracking",
    "figures",
    "paper",
    "cli",
)
TOP = ("__init__", "__main__")  # the public names, re-exported once

# A value knows no view. The exceptions: `report()`, and the way that a result shows itself in a notebook.
ALLOWED = {
    ("comparison.comparison", "figures"),
    ("treatment.treated", "figures"),
}

# Optional or heavy libraries. Above finetuning/ none is imported when a module is, except where the name begins so.
EXTRAS = {"transformers", "peft", "ray", "jinja2", "matplotlib"}
EXTRAS_FROM = ROOMS.index("finetuning")
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
SOLVERS = ("core.gram", "core.krylov", "core.low_rank")
DOORS = {
    "a decomposition": (
        DECOMPOSITIONS,
        {**dict.fromkeys(SOLVERS, DECOMPOSITIONS), "core.subspace": {"linalg.svdvals"}},
    ),
    # subspace.py takes the singular values of a product of two orthonormal bases and of its remainder: cosines and
    # sines, of k columns, not of a weight.
    "opening a weights file": (OPENINGS, {"checkpoint": OPENINGS}),
}

MODULES = sorted(SOURCE.rglob("*.py"))


def dotted(path):
    """Module name in the package: `report.figures`; `adapter` for adapter/__init__.py; `__init__` for the top."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room(module):
    """Place of a module's room in the order; the public names and the entry point stand beside cli."""
    first = module.split(".")[0]
    if first in TOP:
        return ROOMS.index("cli")
    if first not in ROOMS:
        pytest.fail(f"{module} is in no room of the plan: put it into one of {', '.join(ROOMS)} (ROOMS in {HERE})")
    return ROOMS.index(first)


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
            inside = [f"{base}.{alias.name}" for alias in node.names]
            whole = all(is_module(name.removeprefix("specbasis.")) for name in inside)
            names = inside if whole and base != "specbasis" else [base, *inside]
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
        allowed = set().union(*(names for keeper, names in keepers.items() if within(module, keeper)))
        for name, line in uses(tree):
            hit = next((call for call in calls if name == call or name.endswith(f".{call}")), None)
            if hit and hit not in allowed:
                yield f"line {line}: {name} is {what}, which belongs in {' or '.join(keepers)}"


def within(module, keeper):
    return module == keeper or module.startswith((keeper + ".", keeper + "_"))


def broken_order(tree, module):
    for name, line in imported(tree, module):
        mine, other = room(module), room(name)
        if other > mine and (module, name.split(".")[0]) not in ALLOWED:
            yield f"line {line}: {module} imports {name}; imports go to a room above in {', '.join(ROOMS)}"


def broken_extras(tree, module):
    if room(module) >= EXTRAS_FROM:
        return
    excepted = next((libs for start, libs in EXTRAS_EXCEPT.items() if module.startswith(start)), set())
    for node in at_import(tree):
        for library in (libraries(node) & EXTRAS) - excepted:
            yield (
                f"line {node.lineno}: {library} is optional above finetuning; "
                "import it inside of the function that needs it, or, where the module is nothing without it, "
                f"add it to EXTRAS_EXCEPT in {HERE}"
            )


RULES = (broken_order, broken_doors, broken_extras)


@pytest.mark.parametrize("path", MODULES, ids=[dotted(path) for path in MODULES])
def test_a_module_keeps_to_its_room_and_to_the_doors(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    broken = [f"{dotted(path)}, {problem}" for rule in RULES for problem in rule(tree, dotted(path))]
    assert not broken, "\n".join(broken)


def test_no_files_import_each_other_in_a_circle():
    graph = {dotted(path): set() for path in MODULES}
    for path in MODULES:
        module = dotted(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[module] = {
            name
            for name, _ in imported(tree, module)
            if name != module and (module, name.split(".")[0]) not in ALLOWED
        }
    assert circle(graph) is None


def circle(graph):
    """A circle of names, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done or name not in graph:
            return None
        path.append(name)
        found = next(filter(None, map(visit, sorted(graph[name]))), None)
        done.add(path.pop())
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_only_the_verb_of_the_paper_imports_the_paper():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        users = {name for name, _ in imported(tree, dotted(path)) if name.split(".")[0] == "paper"}
        assert not users or dotted(path).split(".")[0] == "paper" or dotted(path).startswith("cli.reproduce"), (
            dotted(path)
        )


def test_a_module_and_a_function_can_be_held_in_the_head():
    """At most 400 lines a module, at most 60 of a function beside its docstring."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{dotted(path)} has {text.count(chr(10))} lines; split it by what it knows"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
                assert lines <= 60, f"{dotted(path)}.{node.name} has {lines} lines beside its docstring"


def test_the_map_in_contributing_has_the_rooms_in_order():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert tuple(re.findall(r"^(?:├──|└──) (\w+)/ ", page, re.MULTILINE)) == ROOMS


# --- the rules themselves see what they are for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("core.svd", "from specbasis.measures import alignment", "core.svd imports measures"),
        ("core.svd", "from specbasis import measures", "core.svd imports measures"),
        ("core.svd", "import specbasis.checkpoint", "core.svd imports checkpoint"),
        ("core.svd", "from ..checkpoint import Checkpoint", "core.svd imports checkpoint"),
        ("core.svd", "def f():\n    from specbasis.jobs import cache", "core.svd imports jobs"),
        ("core.svd", "if TYPE_CHECKING:\n    from specbasis.jobs import cache", "core.svd imports jobs"),
        ("measures.alignment", "from specbasis import decompose", "imports __init__"),
        ("measures.alignment", "def f():\n    from specbasis import SVD", "imports __init__"),
        ("comparison.findings", "from specbasis.figures.table import Table", "imports figures"),
        ("measures.alignment", "torch.linalg.svd(W)", "belongs in core.gram"),
        ("measures.alignment", "from torch.linalg import eigh\neigh(W)", "belongs in core.gram"),
        ("measures.alignment", "from torch import linalg as la\nla.svdvals(W)", "belongs in core.gram"),
        ("measures.alignment", "import numpy as np\nnp.linalg.eigvalsh(W)", "belongs in core.gram"),
        ("measures.alignment", "torch.svd_lowrank(W)", "belongs in core.gram"),
        ("core.subspace", "torch.linalg.svd(W)", "belongs in core.gram"),
        ("architecture.pair", "import torch\ntorch.load(path)", "belongs in checkpoint"),
        ("architecture.pair", "from torch import load as read\nread(path)", "belongs in checkpoint"),
        ("cli", "from safetensors import safe_open\nsafe_open(path)", "belongs in checkpoint"),
        ("cli", "from safetensors.torch import load_file\nload_file(path)", "belongs in checkpoint"),
        ("measures.alignment", "import matplotlib.pyplot as plt", "matplotlib is optional"),
        ("checkpoint", "from transformers import AutoConfig", "transformers is optional"),
        ("jobs.results", "try:\n    import jinja2\nexcept ImportError:\n    pass", "jinja2 is optional"),
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
        (
            "measures.alignment",
            "from specbasis.core.svd import SVD\nfrom specbasis.core.subspace import principal_angles",
        ),
        ("core.gram", "from specbasis.core.errors import InputError\ntorch.linalg.eigh(G)"),
        ("core.subspace", "torch.linalg.svdvals(C)\ntorch.linalg.qr(C)"),
        ("checkpoint", "import torch\nfrom safetensors import safe_open\ntorch.load(p)\nsafe_open(p)"),
        ("checkpoint.formats.safetensors", "from safetensors import safe_open\nsafe_open(path)"),
        ("figures.page", "import jinja2\nfrom specbasis.checkpoint import Checkpoint\njson.load(file)"),
        ("jobs.results", "def page():\n    import jinja2"),
        ("jobs.results", "if TYPE_CHECKING:\n    import jinja2"),
        ("adapter.peft_bridge", "from peft import PeftModel"),
        ("measures.alignment", "s.svd\ndelta.svdvals"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert [found for rule in RULES for found in rule(ast.parse(source), module)] == []


def test_a_module_in_no_room_is_told_where_to_stand():
    with pytest.raises(pytest.fail.Exception, match=r"attic is in no room of the plan: put it into one of core, "):
        room("attic")
    assert room("figures.page") == ROOMS.index("figures")
