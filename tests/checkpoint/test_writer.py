"""A model that is written keeps what stands beside its weights, and nothing of other places."""

import json
from pathlib import Path

import pytest

from specbasis.checkpoint import open_checkpoint
from specbasis.checkpoint.writer import write_model
from tests.pico import bert_state, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    write(folder / "model.safetensors", bert_state())
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "1_Pooling/code.py").write_text("raise SystemExit")
    return folder


def listed(folder: Path, *paths: str) -> None:
    modules = [{"idx": i, "path": path} for i, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_the_modules_of_sentence_transformers_come_along(model: Path, tmp_path: Path) -> None:
    listed(model, "", "1_Pooling", "2_Normalize")
    out = write_model(open_checkpoint(model), tmp_path / "out", lambda _, tensor: tensor * 2)
    assert (out / "1_Pooling/config.json").read_text() == '{"pooling_mode": "cls"}'
    assert (out / "modules.json").read_text() == (model / "modules.json").read_text()
    assert not (out / "1_Pooling/code.py").exists()
    assert (out / "model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()


def test_what_is_called_as_other_weights_in_the_folder_is_not_of_this_model(model: Path, tmp_path: Path) -> None:
    write(model / "other.safetensors", bert_state(seed=1))
    for name in ("model", "other", "vocab"):
        (model / f"{name}.json").write_text("{}")
    out = write_model(open_checkpoint(model / "model.safetensors"), tmp_path / "out")
    assert {path.name for path in out.glob("*.json")} == {"model.json", "vocab.json"}


@pytest.mark.parametrize("path", ["..", "../secret", ".", "a/b", "/etc", "link", 3, None])
def test_modules_of_other_places_are_left_alone(model: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/secret.json").write_text("{}")
    (model / "link").symlink_to(tmp_path / "secret")
    listed(model, path)
    out = write_model(open_checkpoint(model), tmp_path / "out")
    assert not list(tmp_path.glob("out/**/secret.json"))
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "modules.json"}


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[{}]", '"x"', "null"])
def test_a_list_of_modules_that_is_none_stops_nothing(model: Path, tmp_path: Path, content: str) -> None:
    (model / "modules.json").write_text(content)
    assert (write_model(open_checkpoint(model), tmp_path / "out") / "model.safetensors").exists()
