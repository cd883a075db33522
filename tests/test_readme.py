"""The code of the README and of the guide is run, and their commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs/guide.md")}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", "\n".join(PAGES.values()), flags=re.S))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anarcii")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "page.html" not in code or (tmp_path / "page.html").stat().st_size > 0


def test_commands_exist() -> None:
    from specbasis.cli import app

    verbs = {(command.name or command.callback.__name__).replace("_", "-") for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    used = set(re.findall(r"(?:^|`)specbasis ([\w-]+)", "\n".join(PAGES.values()), flags=re.M))
    assert used
    assert used <= verbs


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / target).exists(), target
