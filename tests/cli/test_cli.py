"""The command line as a stranger uses it: a subprocess, its output, its exit code."""

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from specbasis import cli
from specbasis.cli.compare import FORMATS
from tests.cli.conftest import Run
from tests.helpers.patience import PATIENCE
from tests.pico import bert_state, finetuned, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    base = bert_state()
    write(folder / "base.safetensors", base)
    write(folder / "tuned.safetensors", finetuned(base))
    write(folder / "nan.safetensors", finetuned(base) | {"pooler.dense.weight": torch.full((12, 12), torch.nan)})
    write(folder / "names.safetensors", {"a.weight": torch.randn(5, 5)})
    write(folder / "shapes.safetensors", {n: torch.randn(3, *v.shape) for n, v in base.items()})
    (folder / "empty.safetensors").touch()
    whole = (folder / "base.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupted.safetensors").write_bytes(b"\xff" * 64 + whole[64:])
    (folder / "text.bin").write_text("not weights")
    torch.save({"a": torch.randn(4, 4)}, folder / "good.pt")
    (folder / "truncated.pt").write_bytes((folder / "good.pt").read_bytes()[:300])
    (folder / "code.pt").write_bytes(pickle.dumps(_Runs(), protocol=2))
    torch.save({"a": torch.zeros(9, 9)}, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as plain, zipfile.ZipFile(folder / "bomb.pt", "w", 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    escape = folder / "escape"
    escape.mkdir()
    (escape / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../base.safetensors"}}))
    linked = folder / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(folder / "base.safetensors")
    (folder / "a_file").touch()
    return folder


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran-code",)


def test_compare_prints_a_table_and_a_verdict(specbasis: Run, folder: Path, tmp_path: Path) -> None:
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    done = specbasis("compare", base, tuned, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "attention.query" in done.stdout
    assert "finetuned from this base: 14 of 14 matrices" in done.stdout
    headline, *lines = done.stdout.split("not compared")[0].splitlines()
    assert headline.startswith("Moderate finetune of this base. 14 of 14 matrices moved by 4.9%; ")
    assert any(line.startswith("ffn.up            ▅▅▅▅") for line in lines)
    assert max(map(len, lines)) <= 80
    assert not (tmp_path / "out" / "figures").exists()
    again = specbasis("report", tmp_path / "out")
    figures = tmp_path / "out" / "figures"
    told = done.stdout.replace(f"{base} {tuned}", "BASE TUNED")  # results hold no path of ours
    assert again.stdout == f"{told}figures: {figures}\n"
    assert {path.suffix for path in figures.iterdir()} == {".png", ".svg"}


def test_without_a_verb_help_is_all_that_is_said(specbasis: Run) -> None:
    done = specbasis()
    assert (done.returncode, done.stderr) == (2, "")
    assert "compare" in done.stdout


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ("nothing.pt", "tuned.safetensors", "nothing.pt: no such file or folder"),
        ("base.safetensors", "empty.safetensors", "empty"),
        ("base.safetensors", "truncated.safetensors", "truncated or corrupted"),
        ("base.safetensors", "corrupted.safetensors", "truncated or corrupted"),
        ("base.safetensors", "truncated.pt", "truncated or corrupted"),
        ("base.safetensors", "text.bin", "neither a safetensors nor a torch file"),
        ("base.safetensors", "code.pt", "needs code"),
        ("base.safetensors", "bomb.pt", "compressed entries"),
        ("escape", "base.safetensors", "'../base.safetensors' leads out of its folder"),
        ("linked", "base.safetensors", "link out of its folder"),
        ("base.safetensors", "names.safetensors", "no parameter in common"),
        (
            "base.safetensors",
            "shapes.safetensors",
            "the same shape (e.g. embeddings.LayerNorm.weight: (12,) and (3, 12))",
        ),
        ("pkg:no_such_package/x.pt", "base.safetensors", "no installed package 'no_such_package'"),
        ("good.pt#x.y", "base.safetensors", "no key 'x.y'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    specbasis: Run, folder: Path, tmp_path: Path, base: str, tuned: str, said: str
) -> None:
    out = tmp_path / "out"
    done = specbasis("compare", base, tuned, "--out", out, cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert not (folder / "ran-code").exists()


def test_nan_in_one_matrix(specbasis: Run, folder: Path, tmp_path: Path) -> None:
    done = specbasis("compare", folder / "base.safetensors", folder / "nan.safetensors", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "finetuned from this base: 13 of 13 matrices" in done.stdout
    assert done.stderr.count("pooler.dense.weight") == 1
    assert "144 entries are NaN or Inf" in done.stderr


@pytest.mark.parametrize("out", ["a_file", "/proc/specbasis", "a_file/deeper"])
def test_output_folders_that_cannot_be_used(specbasis: Run, folder: Path, out: str) -> None:
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", "--out", out, cwd=folder)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert out.rsplit("/", maxsplit=1)[-1] in done.stderr


def test_a_folder_with_something_else_is_left_alone(specbasis: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", "--out", tmp_path, cwd=folder)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_report_of_a_folder_without_results(specbasis: Run, tmp_path: Path) -> None:
    done = specbasis("report", tmp_path)
    assert done.returncode == 2
    assert "no comparison here" in done.stderr


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0,,a", "2-1", "0-99999999999"])
def test_blocks_that_are_no_numbers(specbasis: Run, folder: Path, tmp_path: Path, text: str) -> None:
    out = ("--out", tmp_path / "out", f"--blocks={text}")
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", *out, cwd=folder)
    assert done.returncode == 2
    assert "want numbers and ascending ranges" in done.stderr


def test_measures_without_alignment_still_give_a_verdict(specbasis: Run, folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--measures", "rsd", "--no-report")
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", *out, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "finetuned from this base" in done.stdout
    assert "nan" not in done.stdout.splitlines()[-2]
    assert "\nmeans over matrices; L left, R right; RSD: change of values; ?: unresolved\n" in done.stdout


def test_an_interrupt_says_what_is_kept(specbasis: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.specbasis, "load", interrupted)
    done = specbasis("report", tmp_path)
    assert done.returncode == 130
    assert done.stderr == "interrupted: what is in the output folder is kept, and the same command continues it\n"


def test_version_and_help(specbasis: Run) -> None:
    assert specbasis("--version").stdout.strip() == "0.1.0"
    listed = specbasis("--help").stdout
    assert "compare" in listed
    assert "report" in listed


def test_a_real_process_exits_with_2_and_without_a_traceback(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specbasis", "compare", "nothing", "base.safetensors", "--out", "out"],
        capture_output=True, text=True, cwd=folder, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2
    hint = "; for a model on the Hub write hub:nothing"
    assert done.stderr == f"error: nothing: no such file or folder{hint}\n"


def test_json_is_all_there_is_on_stdout_and_findings_decide_the_exit_code(
    specbasis: Run, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("base.safetensors", "tuned.safetensors", "--out", out, "--no-report")
    done = specbasis("compare", *arguments, "--json", cwd=folder)
    assert done.returncode == 0
    pair = json.loads(done.stdout)["pairs"]["tuned"]
    assert pair["verdict"]["kind"] == "finetuned"
    assert {"findings", "summaries"} <= set(pair)
    wrong = specbasis("compare", "base.safetensors", "base.safetensors", "--out", tmp_path / "same", "--no-report",
                      "--fail-on", "wrong-base,frozen", cwd=folder)  # fmt: skip
    assert wrong.returncode == 1
    assert "failed on base: frozen: 14 matrices" in wrong.stderr
    assert specbasis("report", out, "--json", "--fail-on", "frozen").returncode == 0
    unknown = specbasis("compare", *arguments, "--fail-on", "nonsense", cwd=folder)
    assert unknown.returncode == 2
    assert "no finding 'nonsense'; did you mean" in unknown.stderr


@pytest.mark.parametrize("name", FORMATS[1:])
def test_a_document_is_all_there_is_on_stdout(specbasis: Run, folder: Path, tmp_path: Path, name: str) -> None:
    arguments = ("compare", "base.safetensors", "base.safetensors", "--out", tmp_path / "out")
    for kind, code in {"zeros": 0, "frozen": 1}.items():
        page = ("--report",) if (name, code) == ("markdown", 0) else ("--no-report",)
        done = specbasis(*arguments, "--format", name, "--fail-on", kind, *page, cwd=folder)
        assert done.returncode == code, done.stderr
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == (
            ["failed on base"] if code else ["page"] * (page == ("--report",))
        )
        if name in ("json", "sarif"):
            assert {"json": "pairs", "sarif": "runs"}[name] in json.loads(done.stdout)
        elif name == "junit":
            assert ElementTree.fromstring(done.stdout).get("failures") == str(code)
        else:
            assert done.stdout.startswith("## specbasis")
            assert ("**Stops** at `frozen` in base." in done.stdout) is bool(code)
        assert specbasis("report", tmp_path / "out", "--format", name, "--fail-on", kind).returncode == code
    assert (tmp_path / "out" / "report.html").exists() is (name == "markdown")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "sarrif"), "did you mean sarif?"),
        (("--format", "xml"), "want one of text, json, markdown, sarif, junit"),
        (("--format", "json", "--dry-run"), "a plan is printed as text"),
        (("--format", "junit", "--json"), "want one of the two"),
    ],
)
def test_formats_that_cannot_be_meant(specbasis: Run, folder: Path, options: tuple[str, ...], said: str) -> None:
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", "--out", "never", *options, cwd=folder)
    assert (done.returncode, said in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr
    assert done.stdout == ""
    assert not (folder / "never").exists()


def test_a_gate_that_could_not_find_what_it_names_does_not_pass(
    specbasis: Run, folder: Path, tmp_path: Path
) -> None:
    pair = ("compare", "base.safetensors", "tuned.safetensors")
    for options in (("--quick",), ("--measures", "relative_update")):
        done = specbasis(*pair, *options, "--out", "never", "--fail-on", "intruders,zeros", cwd=folder)
        assert done.returncode == 2
        assert "--fail-on intruders: cannot be looked for without" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (folder / "never").exists(), "it is known before anything is read"
    out = str(tmp_path / "quick")
    assert specbasis(*pair, "--quick", "--out", out, "--no-report", cwd=folder).returncode == 0
    done = specbasis("report", out, "--fail-on", "intruders,zeros", "--format", "junit")
    assert (done.returncode, "cannot be looked for" in done.stderr) == (2, True)
    assert ElementTree.fromstring(done.stdout).find(".//testcase[@name='intruders']/skipped") is not None
    same = specbasis("compare", "base.safetensors", "base.safetensors", "--fail-on", "noise,intruders", cwd=folder)
    assert (same.returncode, same.stderr) == (0, "")


def test_without_a_folder_nothing_is_kept(
    specbasis: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = sorted(folder.iterdir())
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Moderate finetune of this base. ")
    assert sorted(folder.iterdir()) == before
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--memory", "0"), "want more than nothing"),
        (("--subspace", "20", "--ranks", "5"), "got subspace = 20 and ranks = 5"),
    ],
)
def test_options_that_cannot_be_meant(specbasis: Run, folder: Path, option: tuple[str, ...], said: str) -> None:
    done = specbasis("compare", "base.safetensors", "tuned.safetensors", "--out", "never", *option, cwd=folder)
    assert (done.returncode, said in done.stderr) == (2, True)
    assert not (folder / "never").exists()


@pytest.mark.parametrize("verb", ["edit", "compare", "track"])
def test_single_roles_and_blocks_that_nothing_has_are_said(
    specbasis: Run, folder: Path, tmp_path: Path, verb: str
) -> None:
    models = [folder / "base.safetensors", folder / "tuned.safetensors"]
    kind = {"edit": ("--kind", "zero", "--ranks", "1"), "compare": ("--no-report",), "track": ()}[verb]
    out = ("--out", tmp_path / "out")
    done = specbasis(verb, *models, *kind, *out, "--roles", "attention,ffn.gate", "--blocks", "0,77")
    assert done.returncode == 0, done.stderr
    assert "no matrix here has role ffn.gate, block 77" in " ".join(done.stdout.split())
    done = specbasis(verb, *models, *kind, "--out", tmp_path / "all", "--roles", "attention", "--blocks", "0")
    assert done.returncode == 0, done.stderr
    assert "no matrix here" not in done.stdout
