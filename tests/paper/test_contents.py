"""The list of figures and tables: whole, true about what is there, and its commands are verbs."""

import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.cli.common import STDOUT
from specbasis.core.errors import InputError
from specbasis.paper import contents
from specbasis.paper.claims import claims
from specbasis.paper.contents import entries, tab2, tab3, tab5

RESULTS = Path(__file__).parents[2] / "results"


def ran(*words):
    """What a verb prints on a wide terminal; a worker of the tests gives its console a width of its own."""
    with patch.object(STDOUT, "_width", 200):
        return CliRunner().invoke(app, ["reproduce", *map(str, words)], env={"COLUMNS": "200"})


def test_every_figure_and_table_of_the_paper_is_listed():
    sources = " ".join(entry.source for entry in entries())
    for number in range(1, 22):
        assert re.search(rf"Fig\. {number}(?!\d)", sources), number
    for number in range(1, 6):
        assert f"Tab. {number}" in sources
    assert len({entry.name for entry in entries()}) == len(entries())


def test_every_entry_but_a_drawing_is_a_verb_and_every_verb_is_an_entry():
    listed = ran("--help").output
    verbs = set(re.findall(r"^│ (\w[\w-]*) ", listed, re.MULTILINE)) - {"list", "all"}
    assert {entry.name for entry in entries() if entry.command} == verbs


def test_a_state_follows_the_rows_and_what_is_not_published(tmp_path):
    of = {entry.name: entry for entry in entries()}
    assert of["fig2"].state(RESULTS) == "done, rows committed"
    assert of["fig2"].state(tmp_path) == "can be run"
    assert of["fig7"].state(RESULTS).startswith("needs EEG or fMRI models")
    assert of["fig1"].state(RESULTS) == "shows no data"
    assert of["tab5"].state(tmp_path) == "prints"
    for entry in entries():
        assert not entry.rows or (RESULTS / entry.rows).is_file(), entry.name
        assert entry.cost or not entry.command


def test_list_and_dry_run_name_everything_and_write_nothing(tmp_path):
    shutil.copytree(RESULTS / "interventions" / "minilm", tmp_path / "interventions" / "minilm")
    before = sorted(path for path in tmp_path.rglob("*"))
    shown, planned = ran("list", "--results", tmp_path), ran("all", "--dry-run", "--results", tmp_path)
    assert shown.exit_code == planned.exit_code == 0
    for entry in entries():
        assert entry.source in planned.output
        assert entry.name in shown.output
    assert f"specbasis reproduce fig12 {tmp_path}/interventions/minilm" in planned.output
    assert "specbasis zoo run" in planned.output
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_all_writes_again_what_has_rows(tmp_path, monkeypatch):
    shutil.copytree(RESULTS / "interventions" / "minilm", tmp_path / "interventions" / "minilm")
    picture = tmp_path / "interventions" / "minilm" / "figures" / "fig17.svg"
    picture.unlink(missing_ok=True)
    some = [entry for entry in entries() if entry.name in ("fig2", "fig17", "tab5")]
    monkeypatch.setattr(contents, "entries", lambda: some)
    written = ran("all", "--results", tmp_path)
    assert written.exit_code == 0, written.output
    assert picture.is_file()
    assert "specbasis compare BASE TUNED" in written.output
    assert "CoLA" in written.output
    with pytest.raises(InputError, match="none: no such folder"):
        CliRunner().invoke(app, ["reproduce", "all", "--results", str(tmp_path / "none")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("table", "rows", "some"),
    [
        (tab2, 14, ("timm:convnext_xxlarge.clip_laion2b_soup", "90.67")),
        (tab3, 18, ("howey/electra-base-mnli", "82.20")),
        (tab5, 8, ("CoLA", "30", "0.0003")),
    ],
)
def test_tables_print_what_the_paper_prints(table, rows, some):
    assert len(table().rows) == rows
    output = ran(table.__name__).output
    for text in some:
        assert text in output


def commands():
    """Every command that the list and the page of claims name."""
    for entry in entries():
        yield from entry.command.split(";")
    for claim in claims()["claim"]:
        yield from claim.get("command", "").split(";")
        for quoted in re.findall(r"`([^`]+)`", claim.get("open", "")):
            yield from quoted.split(";")


def test_every_flag_of_a_command_that_is_named_is_one_of_its_verb():
    tried = 0
    for command in commands():
        words = command.split()
        if words[:1] != ["specbasis"]:
            continue
        verb = typer.main.get_command(app)
        for word in words[1:]:
            if not isinstance(verb, TyperGroup) or verb.get_command(None, word) is None:
                break
            verb = verb.get_command(None, word)
        assert verb.name, command
        known = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for flag in re.findall(r"(--[a-z-]+)", command):
            assert flag in known, (command, flag)
            tried += 1
    assert tried > 60
