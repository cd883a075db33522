"""The app: what visitors of it can see and reach, asked over HTTP by gradio's own client; and its Space."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import specbasis as package
from specbasis.cli.web import Reach, interface, serve
from specbasis.core.errors import InputError
from tests.checkpoint.hub_server import serve as serve_hub
from tests.cli.conftest import Run
from tests.helpers.patience import PATIENCE
from tests.pico import bert_state, finetuned, write

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}


def adapter(base: str) -> dict[str, bytes]:
    """The files of a LoRA that says which base it was trained on."""
    name = "base_model.model.encoder.layer.0.attention.self.query"
    factors = {f"{name}.lora_A.weight": torch.randn(2, 12), f"{name}.lora_B.weight": torch.randn(12, 2)}
    config = json.dumps(LORA | {"base_model_name_or_path": base}).encode()
    return {"adapter_config.json": config, "adapter_model.safetensors": save(factors)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and results inside that of the app, and others beside it."""
    home = tmp_path_factory.mktemp("app")
    state = bert_state()
    for folder in ("inside", "outside"):
        write(home / folder / "base.safetensors", state)
        write(home / folder / "tuned.safetensors", finetuned(state))
        package.compare(
            *(home / folder / f"{name}.safetensors" for name in ("base", "tuned")), home / folder / "out"
        )
    for name, base in {"lora": home / "outside" / "base.safetensors"}.items():
        (home / "inside" / name).mkdir()
        for file, content in adapter(str(base)).items():
            (home / "inside" / name / file).write_bytes(content)
    (home / "inside" / "link.safetensors").symlink_to(home / "outside" / "base.safetensors")
    (home / "inside" / "broken.safetensors").write_bytes(b"<b>no weights</b>")
    (home / "inside" / "<img src=x>.safetensors").write_bytes(b"no weights")
    return home


class App:
    """A running app, as a program and as a browser asks it."""

    def __init__(self, reach: Reach, **given: str) -> None:
        from gradio_client import Client

        self.blocks = interface(reach, **given)
        self.blocks.block_thread = lambda: None
        serve(self.blocks, server_name="127.0.0.1")
        self.client = Client(self.blocks.local_url, verbose=False, analytics_enabled=False)

    def __call__(self, verb: str, *inputs: str) -> tuple[str, str, str]:
        shown, file = self.client.predict(*inputs, api_name=f"/{verb}")
        words, start, page = shown.partition("<iframe")
        return words, start + page, file if isinstance(file, str) else file["value"]

    def refusal(self, verb: str, *inputs: str) -> str:
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError) as refused:
            self(verb, *inputs)
        message = str(refused.value)
        assert "\n" not in message
        assert "Traceback" not in message
        return message


@pytest.fixture(scope="module")
def app(home: Path) -> Iterator[App]:
    pytest.importorskip("gradio")
    running = App(Reach(home / "inside"))
    yield running
    running.blocks.close()


@pytest.fixture
def hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[App, Any]]:
    """The app as a Space has it, and a Hub with a model, its finetune, and adapters."""
    pytest.importorskip("gradio")
    constants = pytest.importorskip("huggingface_hub").constants
    running = App(Reach())
    with serve_hub() as (endpoint, server):
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield running, server
    running.blocks.close()


@pytest.mark.parametrize("size", ["quick", "full"])
def test_two_models_are_compared_and_shown(app: App, size: str) -> None:
    words, frame, file = app("compare", "base.safetensors", "tuned.safetensors", size)
    assert words.startswith("<h3>Moderate finetune of this base.")
    assert "attention.query" in words
    assert 'sandbox="allow-scripts"' in frame
    page = unescape(re.fullmatch(r'<iframe .* srcdoc="([^"]*)"></iframe>', frame, re.S)[1])
    assert page == Path(file).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert ("quick: the leading" in page) == (size == "quick")


def test_a_results_folder_is_shown_with_the_page_that_report_writes(app: App, home: Path, tmp_path: Path) -> None:
    words, _, file = app("show", "out")
    written = package.load(home / "inside" / "out").report(tmp_path / "page.html")
    assert Path(file).read_bytes() == written.read_bytes()
    assert words.count("<h3>") == 1


OUTSIDE = [
    *("../outside/{}", "{home}/outside/{}", "inside/../../outside/{}", "~/{}", "pkg:torch/{}"),
    *("", "  ", "\0", "a" * 5000),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_the_root_can_be_read(app: App, home: Path, path: str) -> None:
    for name in ("base.safetensors", "missing.safetensors"):  # alike, whether it is there or not
        given = path.format(name, home=home)
        assert ": nothing of this name here; a model" in app.refusal("compare", given, "tuned.safetensors", "full")
        assert ": nothing of this name here; a model" in app.refusal("compare", "base.safetensors", given, "full")
    assert ": nothing of this name here; a model" in app.refusal("show", path.format("out", home=home))


def test_a_link_leads_nowhere_either(app: App) -> None:
    assert "nothing of this name" in app.refusal("compare", "link.safetensors", "tuned.safetensors", "full")


def test_an_adapter_cannot_bring_a_base_from_outside(app: App) -> None:
    assert "is an adapter; want a whole model" in app.refusal("compare", "lora", "tuned.safetensors", "full")
    assert "<h3>" in app("compare", "base.safetensors", "lora", "full")[0]


def test_what_cannot_be_used_is_one_line_without_markup(app: App) -> None:
    for verb, *inputs in [
        ("compare", "broken.safetensors", "tuned.safetensors", "quick"),
        ("compare", "<img src=x>.safetensors", "tuned.safetensors", "quick"),
        ("compare", "<img src=y>", "tuned.safetensors", "quick"),
        ("show", "."),
        ("show", "base.safetensors"),
    ]:
        message = app.refusal(verb, *inputs)
        assert "<" not in message
    assert "not in the list of choices" in app.refusal("compare", "base.safetensors", "tuned.safetensors", "huge")


def test_a_comparison_beyond_the_limit_is_refused_before_it_begins(home: Path) -> None:
    with pytest.raises(InputError, match=r"would take about .* s and .*; want at most 1e-06 s"):
        Reach(home / "inside", 1e-6).compare("base.safetensors", "tuned.safetensors", "full", lambda *_, **__: None)


def test_no_file_is_served_and_none_is_taken(app: App, home: Path) -> None:
    import httpx

    url = app.blocks.local_url
    assert url.startswith("http://127.0.0.1:")
    assert app.blocks.share_url is None
    for path in (home / "inside" / "base.safetensors", ROOT / "pyproject.toml", Path("/etc/hostname")):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    taken = httpx.post(f"{url}gradio_api/upload", files={"files": ("x.txt", b"more than a byte")})
    assert taken.status_code >= 400


def test_forms_hold_what_the_command_names(home: Path) -> None:
    pytest.importorskip("gradio")

    def values(**given: str) -> list[str]:
        components = interface(Reach(home / "inside"), **given).config["components"]
        return [part["props"]["value"] for part in components if part["type"] == "textbox"]

    assert values() == ["", "", ""]
    assert values(base="a", tuned="b") == ["a", "b", ""]
    assert values(folder="out") == ["", "", "out"]


def test_a_space_reads_models_of_the_hub_alone(hub_only: tuple[App, Any], home: Path) -> None:
    app, server = hub_only
    state = bert_state()
    server.repositories |= {
        "org/base": {"model.safetensors": save(state), "config.json": b"{}"},
        "org/tuned": {"model.safetensors": save(finetuned(state)), "config.json": b"{}"},
        "org/lora": adapter(str(home / "inside" / "base.safetensors")),
        "org/pickled": {"pytorch_model.bin": b"x" * 100, "config.json": b"{}"},
    }
    words, _, file = app("compare", "org/base", "hub:org/tuned", "full")
    assert "<b>tuned</b>" in words
    assert re.search("hub:org/<wbr>tuned@[0-9a-f]{40}", Path(file).read_text(encoding="utf-8"))
    assert "<h3>" in app("compare", "org/base", "org/lora", "full")[0]
    assert "is an adapter; want a whole model" in app.refusal("compare", "org/lora", "org/tuned", "full")
    assert "cannot be streamed" in app.refusal("compare", "org/base", "org/pickled", "full")
    assert "org/nothing" in app.refusal("compare", "org/base", "org/nothing", "full")
    for path in (str(home / "inside" / "base.safetensors"), "../base.safetensors", "pkg:torch/x"):
        app.refusal("compare", path, "org/tuned", "full")
    assert "nothing of this name here" in app.refusal("show", str(home / "inside" / "out"))


def test_help_needs_no_gradio_and_the_app_says_how_to_install_it(
    specbasis: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "--root" in specbasis("app", "--help").stdout
    done = specbasis("app")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the app needs gradio, which is not installed: pip install .*\[app\]\"?\n", done.stderr
    )


def test_what_the_command_cannot_show_is_one_line(specbasis: Run, home: Path) -> None:
    pytest.importorskip("gradio")
    for words in (["base.safetensors"], ["../outside/out"], ["a", "b", "c"], ["."]):
        done = specbasis("app", *words, "--root", home / "inside")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_port_that_is_taken_is_one_line(specbasis: Run, app: App) -> None:
    done = specbasis("app", "--port", app.blocks.server_port)
    assert done.returncode == 2
    assert done.stderr == "error: the app cannot be served: the port is taken; give another one with --port\n"


def test_the_space_installs_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hub"], *extras["report"]]  # gradio comes with the Space's SDK
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == wanted


def test_the_space_says_which_gradio_it_wants_and_what_it_runs() -> None:
    yaml = pytest.importorskip("yaml")
    about = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert about["sdk"] == "gradio"
    assert (SPACE / about["app_file"]).is_file()
    assert re.fullmatch(r"6\.\d+\.\d+", about["sdk_version"])


def test_the_space_runs_with_the_package_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    import httpx

    (tmp_path / "app.py").write_bytes((SPACE / "app.py").read_bytes())
    (tmp_path / "specbasis").symlink_to(ROOT / "src" / "specbasis")
    environment = {**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
    with subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        try:
            said = process.stdout.readline()
            url = said.removeprefix("app: ").strip()
            assert httpx.get(url, timeout=PATIENCE).status_code == 200
        finally:
            process.terminate()
