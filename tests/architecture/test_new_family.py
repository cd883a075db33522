"""An architecture is one TOML file: recognition, coverage and pairing find a new one without another edit."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from specbasis.architecture import family as module
from specbasis.architecture.pair import pair
from specbasis.architecture.recognise import coverage, model_map
from specbasis.core.errors import InputError

from .test_recognition import stored

FAMILY = """
title = "an architecture of this test"
recognised_by = ["{block}.quaffle.weight", "{block}.bludger.weight"]
blocks = ["pitch.{layer}"]
matrix = [
  { name = "{block}.quaffle.weight", rows = ["attention.query", "attention.key", "attention.value"] },
  { name = "{block}.bludger.weight", role = "attention.output" },
]
"""
CACHES = (module.families, module.family_named, module._literal_numbers)
SHAPES = {f"pitch.{n}.{name}.weight": shape for n in range(3) for name, shape in
          {"quaffle": (24, 8), "bludger": (8, 8)}.items()}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder of families, which is the one that is read."""
    families = tmp_path / "architecture" / "families"
    shutil.copytree(Path(module.__file__).parent / "families", families)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    for cached in CACHES:
        cached.cache_clear()
    yield families
    for cached in CACHES:
        cached.cache_clear()


def test_a_new_file_names_blocks_and_roles_everywhere(folder: Path) -> None:
    checkpoint = stored(SHAPES)
    assert model_map(checkpoint).family.name == "structural"
    (folder / "quidditch.toml").write_text(FAMILY)
    for cached in CACHES:
        cached.cache_clear()
    mapped = model_map(checkpoint)
    assert mapped.family.name == "quidditch"
    assert coverage(mapped, checkpoint).named == 1
    keys = [match.key for match in pair(checkpoint, checkpoint).matched if match.key.block == 2]
    assert [(key.role, key.name) for key in keys] == [
        ("attention.query", "pitch.2.quaffle.weight[query]"),
        ("attention.key", "pitch.2.quaffle.weight[key]"),
        ("attention.value", "pitch.2.quaffle.weight[value]"),
        ("attention.output", "pitch.2.bludger.weight"),
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('role = "attention.outputs"', "quidditch.toml: role 'attention.outputs' .* is not in ROLES"),
        ('role = "head", shapes = ["d"]', "quidditch.toml: '{block}.bludger.weight' wants one of role, rows"),
    ],
)
def test_a_mistake_in_the_file_is_named(folder: Path, wrong: str, message: str) -> None:
    (folder / "quidditch.toml").write_text(FAMILY.replace('role = "attention.output"', wrong))
    with pytest.raises(InputError, match=message.replace("{", r"\{").replace("}", r"\}")):
        module.families()
