"""The verbs of fingerprints, from the command line."""

import json
import sys
from pathlib import Path

import pytest

from specbasis.cli import main
from tests.pico import bert_state, finetuned, write

BASE = bert_state(blocks=3, width=64, seed=1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    for name, state in {
        "base": BASE,
        "other": bert_state(blocks=3, width=64, seed=2),
        "tuned": finetuned(BASE, 0.1),
    }.items():
        write(tmp_path / name / "model.safetensors", state)

    def called(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["specbasis", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out + err

    return called


def test_from_models_to_an_answer(run) -> None:
    assert run("db", "add", "--is-base", "--name", "org/base", "bases", "base")[0] == 0
    assert run("fingerprint", "other", "--out", "other.fp")[0] == 0
    code, said = run("db", "add", "bases", "other.fp")
    assert (code, "2 models" in said) == (0, True)
    code, said = run("which-base", "tuned", "--db", "bases")
    assert (code, said.splitlines()[0].startswith("finetuned from org/base")) == (0, True)
    code, said = run("which-base", "tuned", "--db", "bases", "--json")
    assert json.loads(said)["kind"] == "finetuned"
    run("fingerprint", "tuned", "--out", "tuned.fp")
    assert run("which-base", "tuned.fp", "--db", "bases")[1].startswith("finetuned from org/base")


def test_a_false_card_is_exit_code_1(run) -> None:
    run("db", "add", "--is-base", "--name", "org/base", "bases", "base")
    run("db", "add", "--is-base", "--name", "org/other", "bases", "other")
    for name, code, word in (("org/base", 0, "agrees"), ("org/other", 1, "contradicted"), ("x/y", 0, "cannot")):
        Path("tuned/README.md").write_text(f"---\nbase_model: {name}\n---\n")
        found, said = run("which-base", "tuned", "--db", "bases", "--card")
        assert (found, word in said) == (code, True)


def test_databases_are_listed_cut_and_merged(run) -> None:
    run("db", "add", "--is-base", "--name", "org/base", "a", "base")
    run("db", "add", "b", "other", "tuned")
    assert run("db", "merge", "a", "b", "--out", "all")[1].startswith("all: 3 models")
    run("db", "export", "all", "org/base", "tuned", "--out", "two")
    rows = json.loads(run("db", "list", "two", "--json")[1])
    assert [(row["name"], row["base"]) for row in rows] == [("org/base", True), ("tuned", False)]
    assert "org/base  base, " in run("db", "list", "two")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("which-base", "tuned"), "no such file"),
        (("which-base", "nothing", "--db", "a"), "no such file or folder"),
        (("db", "list", "tuned/model.safetensors"), "not a whole database"),
        (("db", "add", "--name", "x", "a", "base", "other"), "want one model"),
        (("db", "export", "a", "nobody", "--out", "b"), "no model 'nobody'"),
        (("fingerprint", "base"), "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, words: tuple[str, ...], said: str) -> None:
    run("db", "add", "a", "base")
    code, line = run(*words)
    assert (code, line.count("\n"), "Traceback" in line) == (2, 1, False)
    assert said in line
