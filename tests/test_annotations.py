"""Shapes in annotations are checked at run time only if they can be evaluated."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/specbasis"
KINDS = {
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Int64",
    "Integer",
    "Bool",
    "Complex",
    "Num",
    "Real",
    "Shaped",
    "UInt8",
}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_shape_is_a_string(path):
    """Float[Tensor, k] names a variable k that does not exist, and its check is silently left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in KINDS):
            continue
        shape = node.slice.elts[1] if isinstance(node.slice, ast.Tuple) else node.slice
        assert isinstance(shape, ast.Constant), (
            f'{path.name}:{node.lineno}: write {node.value.id}[Tensor, " {ast.unparse(shape)}"], '
            "with the space that keeps linters from taking the quotes off"
        )
