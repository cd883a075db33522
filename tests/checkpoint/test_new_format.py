"""A file format is one module in checkpoint/formats, and a source is one function in checkpoint/places.py."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specbasis.checkpoint import formats, open_checkpoint, places
from specbasis.core.errors import InputError

MODULE = """
import struct
import torch
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.formats.kit import FileFormat


def entries(path, source, key=""):
    def load():
        raw = path.read_bytes()
        rows, columns = struct.unpack("<II", raw[4:12])
        return torch.frombuffer(bytearray(raw[12:]), dtype=torch.float32).reshape(rows, columns)

    return {"weight": Entry(struct.unpack("<II", path.read_bytes()[4:12]), "float32", load)}


FORMAT = FileFormat((".tiny",), lambda path, head: head.startswith(b"TINY"), entries, rank=9)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one file of a format that a module in another folder adds."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tiny_for_a_test.py").write_text(MODULE)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "modules")])
    formats.formats.cache_clear()
    folder = tmp_path / "model"
    folder.mkdir()
    W = torch.arange(6.0)
    (folder / "weights.tiny").write_bytes(b"TINY" + struct.pack("<II", 2, 3) + W.numpy().tobytes())
    yield folder
    formats.formats.cache_clear()


def test_a_format_in_a_new_module_is_found_in_folders_and_by_name(tiny: Path) -> None:
    assert ".tiny" in formats.endings()
    for source in (tiny, tiny / "weights.tiny"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.entries["weight"].shape == (2, 3)
        assert checkpoint["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_without_the_module_the_file_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "__path__", formats.__path__[:1])
    formats.formats.cache_clear()
    with pytest.raises(InputError, match="neither a safetensors nor a torch file"):
        open_checkpoint(tiny / "weights.tiny")


def test_a_source_is_one_function(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SOURCES", dict(places.SOURCES))

    @places.address_of("shelf")
    def on_shelf(name: str, source: str, stream: bool) -> places.Place:
        return places.locate(tiny.parent / name.removeprefix("shelf:"))[0]

    assert open_checkpoint("shelf:model")["weight"].shape == (2, 3)
    with pytest.raises(InputError, match="want a path, hub:…, timm:…, pkg:…, shelf:…, or a mapping"):
        open_checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint("rack:model")
