"""README and documentation do what they say: code runs, commands print what is shown, links lead somewhere.

On the pages of `RUN`, every block of Python or shell runs, in order, in one folder: shell commands in this process.
A block that cannot run here has a comment with the reason in front of it, `<!-- not run: REASON -->`; then its
flags exist at least. What a ``text`` block shows under a block that ran, it printed; `…` stands for anything.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import typer

from specbasis import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = [DOCS / "quick-start.md", DOCS / "concepts.md", DOCS / "faq.md", *sorted((DOCS / "how-to").glob("*.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SHELL, PYTHON = ("sh", "bash"), ("python", "py")
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["code"], match["reason"]) for match in found]


def commands(code: str) -> Iterator[tuple[list[str], int]]:
    """The words of each command of a shell block, and the exit code that its comment states, by default 0."""
    for line in code.replace("\\\n", " ").splitlines():
        stated = re.search(r"#.*exit code (\d+)", line)
        words = shlex.split(line, comments=True)
        if words:
            yield words, int(stated[1]) if stated else 0


def known_flags(words: list[str]) -> set[str]:
    """The flags of the command that these words call."""
    command: Any = typer.main.get_command(cli.app)
    context = typer.Context(command)
    for word in words[1:]:
        below = command.get_command(context, word) if hasattr(command, "get_command") else None
        if below is None:
            break
        command = below
    assert command.name != "specbasis", words
    return {spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)}


class Session:
    """What runs the blocks of one page: shell variables, Python names, and what was printed last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.variables: dict[str, str] = {}
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> str:
        """Everything that the block prints."""
        self.capsys.readouterr()
        if block.language in PYTHON:
            exec(compile(block.code, "page", "exec"), self.names)
            return "".join(self.capsys.readouterr())
        return "".join(self.command(words, code) for words, code in commands(block.code))

    def command(self, words: list[str], stated: int) -> str:
        words = [Template(word).substitute(self.variables) for word in words]
        if all(re.match(r"[A-Z_]+=", word) for word in words):
            self.variables |= dict(word.split("=", 1) for word in words)
            return ""
        assert words[0] == "specbasis", f"{words}: run it here, or say why not"
        arguments, target = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        self.monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed, errors = self.capsys.readouterr()
        assert (stop.value.code or 0) == stated, (words, printed, errors)
        if target:
            Path(target).write_text(printed, encoding="utf-8")
        return printed + errors


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("anarcii")
    if page.stem in ("adapt", "lora", "serve", "share-adapter"):
        pytest.importorskip("peft", minversion="0.21")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    session, printed = Session(monkeypatch, capsys), ""
    for block in blocks(page):
        if block.language in (*SHELL, *PYTHON):
            printed = "" if block.reason else session.run(block)
        elif block.language == "text" and printed:
            for line in block.code.splitlines():
                pattern = ".*".join(map(re.escape, map(squeezed, line.split("…"))))
                assert re.search(pattern, squeezed(printed)), (line, printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_flags_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        for words, _ in commands(block.code):
            if words[0] != "specbasis":
                continue
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            assert flags <= known_flags(words) | {"--help", "--version", "--quiet"}, words


def test_verbs_in_the_text_exist() -> None:
    verbs = set(typer.main.get_command(cli.app).list_commands(None))
    used = {
        verb for page in PAGES for verb in re.findall(r"`specbasis ([a-z][\w-]*)", page.read_text(encoding="utf-8"))
    }
    assert used
    assert used <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    made = DOCS / "reference" / "command-line.md"  # when the site is built
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        path = (page.parent / target).resolve()
        assert path.exists() or path == made or path.is_relative_to(DOCS / "notebooks"), target


README = [ROOT / "README.md", DOCS / "guide.md"]


@pytest.mark.parametrize("code", [b.code for page in README for b in blocks(page) if b.language == "python"])
def test_readme_and_guide_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anarcii")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "page.html" not in code or (tmp_path / "page.html").stat().st_size > 0
