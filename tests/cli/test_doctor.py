"""`doctor`: what it says is so, it survives what is broken, and nothing in it names a person or a secret."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch

from specbasis.cli import doctor
from specbasis.core.extras import EXTRAS, PURPOSES, requirements
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]
constants = pytest.importorskip("huggingface_hub.constants")


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_it_says_what_is_so(specbasis: Run, hub: None) -> None:
    done = specbasis("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["hub"]["reachable"] is True
    assert list(found["extras"]) == list(PURPOSES)
    assert done.returncode == (1 if found["problems"] else 0)


def test_the_text_has_the_same_lines(specbasis: Run, offline: None) -> None:
    done, found = specbasis("doctor"), json.loads(specbasis("doctor", "--json").stdout)
    for name, state in found["extras"].items():
        assert f"  {name}: {state}\n" in done.stdout
    assert "  HF_HUB_OFFLINE: yes\n" in done.stdout
    assert "reachable" not in done.stdout


@pytest.mark.parametrize(
    ("home", "source"),
    [(str(ROOT.parent), f'~/"{ROOT.name}[ray]"'), ("/nowhere", f"/USER/{ROOT.name}[ray]")],
    ids=["below home", "elsewhere"],
)
def test_nothing_names_a_person_or_a_secret(
    specbasis: Run, monkeypatch: pytest.MonkeyPatch, offline: None, home: str, source: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    monkeypatch.setattr(constants, "ENDPOINT", "https://jane:password@hub.example:8080/x?key=1")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("LOGNAME", ROOT.parent.name)
    monkeypatch.setattr(metadata, "version", absent("ray", metadata.version))
    text = specbasis("doctor").stdout
    found = specbasis("doctor", "--json").stdout
    assert source in text
    assert source in json.loads(found)["extras"]["ray"]
    for printed in (text, found):
        assert "hub.example:8080" in printed
        for hidden in ("topsecret", "jane", "password", "key=1", str(ROOT.parent)):
            assert hidden not in printed


def absent(name: str, version: object) -> object:
    def asked(package: str) -> str:
        if package == name:
            raise metadata.PackageNotFoundError(package)
        return str(version(package))  # type: ignore[operator]

    return asked


def test_a_version_that_does_not_fit_is_a_problem(
    specbasis: Run, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "peft" else known(name))
    done = specbasis("doctor")
    assert done.returncode == 1
    assert done.stderr.count("problem: peft 0.1 is installed; want peft>=") == 1


@pytest.mark.parametrize("answers", [True, False], ids=["refused", "silent"])
def test_a_hub_that_does_not_answer_is_a_problem_soon(
    specbasis: Run, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if not answers:
            silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sys.modules[doctor.__module__], "PATIENCE", 0.3)
        done = specbasis("doctor")
    assert done.returncode == 1
    assert "reachable: no" in done.stdout
    assert "problem: the Hub cannot be reached (" in done.stderr
    assert "HF_HUB_OFFLINE=1" in done.stderr


def test_a_torch_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['specbasis', 'doctor']\n"
    code += "from specbasis.cli import main; main()"
    environment = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert "problem: torch cannot be imported, and no verb works without it: OSError: libcudart" in done.stderr
    assert f"torch: {torch.__version__}" in done.stdout
    assert "Traceback" not in done.stderr


def test_every_extra_that_a_message_names_has_a_purpose() -> None:
    assert set(EXTRAS.values()) <= set(PURPOSES)


def test_an_extra_that_stands_on_another_lists_what_that_does() -> None:
    assert {str(r) for r in requirements("peft")} < {str(r) for r in requirements("finetune")}
    assert "torch" in {r.name for r in requirements()}
