"""The GitHub Action and the pre-commit hook do what they say: their steps run as a runner would run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specbasis import cli
from tests.helpers.patience import PATIENCE
from tests.pico import bert_state, finetuned, write

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")


def names(expression: str) -> list[str]:
    """The names of contexts in an expression, without its words and its texts."""
    return re.findall(r"\b(?:inputs|steps|github)\.[\w.-]+", expression)


def test_every_value_reaches_the_shell_as_a_variable() -> None:
    """Nothing that a user gives is part of a script; every name exists; every step of others has a version."""
    known = {f"inputs.{name}" for name in ACTION["inputs"]} | {"github.action_path"}
    known |= {f"steps.compare.outputs.{name}" for name in ("code", "sarif")}
    used = set()
    for step in STEPS:
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"]
            read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", step["run"]))
            assert read <= set(step["env"]) | {"GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"}
        else:
            assert re.fullmatch(r"[\w./-]+@v\d+", step["uses"])
        used |= {name for found in EXPRESSION.findall(json.dumps(step)) for name in names(found)}
    assert used <= known
    assert {f"inputs.{name}" for name in ACTION["inputs"]} <= used
    assert all(about["description"] for about in ACTION["inputs"].values())


def test_the_guide_names_inputs_and_hooks_that_exist() -> None:
    page = (ROOT / "docs" / "how-to" / "gate.md").read_text(encoding="utf-8")
    action, hooks = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S))
    assert set(action[0]["with"]) <= set(ACTION["inputs"])
    assert action[0]["with"]["fail-on"] == ACTION["inputs"]["fail-on"]["default"]
    assert action[0]["with"]["fail-on"] in HOOKS[0]["entry"]
    assert [hook["id"] for hook in hooks[0]["hooks"]] == [hook["id"] for hook in HOOKS]
    assert all(f"`{name}`" in page for name in ACTION["inputs"])


class Runner:
    """Runs the action's own steps in a folder, in order, as GitHub does with `shell: bash`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = folder / ".tools"
        tools.mkdir()
        python = tools / "python"
        python.write_text(
            f'#!/bin/bash\nif [ "$2" = pip ]; then printf "%s\\n" "$@" > {shlex.quote(str(tools))}/pip; exit; fi\n'
            f'exec {shlex.quote(sys.executable)} "$@"\n'
        )
        python.chmod(python.stat().st_mode | stat.S_IEXEC)
        self.summary, self.output = tools / "summary.md", tools / "output"
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.output),
        }

    def run(self, **inputs: str) -> tuple[int, str]:
        """The exit code of the last step, and what was printed on stderr."""
        values = {f"inputs.{name}": about.get("default", "") for name, about in ACTION["inputs"].items()}
        values |= {f"inputs.{name.replace('_', '-')}": value for name, value in inputs.items()}
        values["github.action_path"] = str(ROOT)
        self.summary.write_text("")
        self.output.write_text("")
        code, said = 0, ""
        for step in STEPS:
            if "run" not in step:
                continue
            variables = {
                name: EXPRESSION.sub(lambda found: values[found[1].strip()], value)
                for name, value in step["env"].items()
            }
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=self.folder,
                env=self.environment | variables, capture_output=True, text=True, timeout=PATIENCE,
            )  # fmt: skip
            code, said = done.returncode, said + done.stderr
            if code:
                break
            for line in self.output.read_text().splitlines():
                name, _, value = line.partition("=")
                values[f"steps.compare.outputs.{name}"] = value
        return code, said


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    write(tmp_path / "base.safetensors", bert_state())
    return Runner(tmp_path)


HOSTILE = "a b $(touch ran) `touch ran` \"; touch ran; ' && touch ran #|*.safetensors"


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_the_action_passes_a_finetune_whatever_its_name_is(runner: Runner) -> None:
    write(runner.folder / HOSTILE, finetuned(bert_state()))
    write(runner.folder / "-x.safetensors", finetuned(bert_state(), 0.04))
    arguments = "--quick\n--roles\nattention\n--no-report\n"
    code, said = runner.run(base="base.safetensors", tuned=f"{HOSTILE}\n-x.safetensors\n", arguments=arguments)
    assert code == 0, said
    assert (runner.folder / ".tools" / "pip").read_text().splitlines()[-1] == f"{ROOT}[hub,report]"
    summary = runner.summary.read_text()
    assert "Passes: none of `failed`, `wrong-base`, `zeros`, `rank-collapse` was found." in summary
    assert summary.count("finetune of this base.") == 2
    assert len(json.loads((runner.folder / "specbasis" / "specbasis.sarif").read_text())["runs"]) == 1
    assert not (runner.folder / "ran").exists()
    assert not (runner.folder / "specbasis" / "report.html").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_the_action_stops_at_a_finding_and_at_what_it_cannot_use(runner: Runner) -> None:
    write(runner.folder / "other.safetensors", bert_state(width=12, seed=9))
    wanted = {"base": "base.safetensors", "tuned": "other.safetensors", "out": "my results"}
    code, said = runner.run(**wanted, install="specbasis[hub]\n--extra-index-url\nhttps://example.org/$(touch ran)")
    assert code == 1, said
    assert "failed on other: wrong-base: " in said
    assert "**Stops** at `wrong-base` in other." in runner.summary.read_text()
    assert (runner.folder / "my results" / "specbasis.sarif").exists()
    assert (runner.folder / ".tools" / "pip").read_text().splitlines()[-1] == "https://example.org/$(touch ran)"
    assert not (runner.folder / "ran").exists()
    assert runner.run(**wanted, fail_on="")[0] == 0
    code, said = runner.run(**wanted | {"base": "nothing.safetensors", "out": "none"})
    assert code == 2
    assert said.splitlines()[-1].startswith("error: nothing.safetensors: no such file")


def test_the_hook_calls_a_command_that_exists_and_exits_as_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (hook,) = HOOKS
    words = shlex.split(hook["entry"])
    assert words[:2] == ["specbasis", "compare"]
    assert not hook["pass_filenames"]
    assert re.search(hook["files"], "out/model.safetensors")
    assert not re.search(hook["files"], "README.md")
    base, tuned = write(tmp_path / "base.safetensors", bert_state()), tmp_path / "tuned.safetensors"
    for state, code in (finetuned(bert_state()), 0), (bert_state(seed=9), 1), (finetuned(bert_state()), 0):
        write(tuned, state)
        monkeypatch.setattr(sys, "argv", [*words, "--quick", str(base), str(tuned)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]
