"""The guide to adding a family shows a real file and names every key of the format."""

import re
from pathlib import Path

from specbasis.architecture.family import FAMILY_KEYS, MATRIX_KEYS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


def test_the_example_is_the_file() -> None:
    shown = re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    file = ROOT / "src" / "specbasis" / "architecture" / "families" / "deberta.toml"
    assert shown is not None
    assert shown[1].strip() == file.read_text(encoding="utf-8").strip()


def test_every_key_is_explained() -> None:
    rows = [line.split("|")[1] for line in GUIDE.splitlines() if line.startswith("|")]
    explained = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert explained | {"name", "matrix"} == MATRIX_KEYS | FAMILY_KEYS
