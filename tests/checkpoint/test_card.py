"""A card gets a section and what its front matter lacks; what somebody else wrote stays, byte for byte."""

import os
from pathlib import Path
from typing import Any

import pytest

from specbasis.checkpoint.card import front_matter, hub_name, write_section
from specbasis.core.errors import InputError

hub = pytest.importorskip("huggingface_hub")
FIELDS = {"base_model": "org/name", "base_model_relation": "finetune", "tags": ["specbasis"]}


def written(path: Path, section: str = "Said.", **fields: Any) -> list[str]:
    return write_section(path, "test", section, {**FIELDS, **fields}, "Title")


def read(path: Path) -> dict[str, Any]:
    """What the Hub's own client reads."""
    data: dict[str, Any] = hub.ModelCard.load(path).data.to_dict()
    return data


def test_a_new_card(tmp_path: Path) -> None:
    assert written(tmp_path / "README.md") == []
    assert read(tmp_path / "README.md") == FIELDS
    assert (
        "# Title\n\n<!-- specbasis: test -->\nSaid.\n<!-- specbasis: end of test -->\n"
        in (tmp_path / "README.md").read_text()
    )


CARDS = {
    "prose": "# Mine\n\nSome text without an end of line",
    "front": "---\nlicense: mit  # mine\nlanguage: [de, 'en']\n---\n# Mine\n",
    "block tags": "---\ntags:\n  - mine  # a comment\n  - other\nlicense: mit\n---\nText\n",
    "flow tags": "---\ntags: [mine, 'other']\n---\n\nText\n",
    "empty values": "---\nbase_model:\ntags: []\nlicense: mit\n---\nText\n",
    "windows": "---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n# Mine\r\n\r\nText\r\n",
    "mark": "\ufeff---\nlicense: mit\n---\n# Mine\n",
    "block scalar": "---\nlicense: mit\nwidget: |\n  two\n  lines\n---\nText\n",
    "other scripts": "---\ntitle: 模型 🐚\n---\n# Größe\n",
    "says it": "---\nbase_model: org/name\nbase_model_relation: finetune\ntags: [specbasis]\n---\nText\n",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_what_was_there_stays_and_twice_is_once(tmp_path: Path, card: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(card.encode())
    before = read(path)
    assert written(path) == []
    once = path.read_bytes()
    assert written(path) == []
    assert path.read_bytes() == once
    after, own = read(path), before.get("tags") or []
    assert {**before, **FIELDS, "tags": after["tags"]} == after
    assert set(after["tags"]) == {*own, "specbasis"}
    # Without what was put in, the bytes are the user's.
    text = once.decode()
    kept = [line for line in card.splitlines(keepends=True) if "base_model:" not in line and "tags: [" not in line]
    at = 0
    for line in kept:
        at = text.index(line.rstrip("\r\n") if line == kept[-1] else line, at)
    written(path, "Another.\n\n- list")
    assert "Said." not in path.read_text()
    assert path.read_text().count("<!-- specbasis: test -->") == 1


def test_sections_of_two_kinds_stand_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    written(path, "First.")
    write_section(path, "other", "Second.", {}, "")
    written(path, "First again.")
    text = path.read_text()
    assert text.index("First again.") < text.index("Second.")
    assert "First.\n" not in text


def test_what_the_card_says_itself_stays_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nbase_model: other/model\n---\n")
    (note,) = written(path)
    assert "base_model stays 'other/model'" in note
    assert "org/name" in note
    assert read(path)["base_model"] == "other/model"


def test_a_relation_to_nothing_is_not_said(tmp_path: Path) -> None:
    written(tmp_path / "README.md", base_model="")
    assert read(tmp_path / "README.md") == {"tags": ["specbasis"]}


def test_the_template_that_peft_saves_gives_way_unless_it_was_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    card = hub.ModelCard.from_template(hub.ModelCardData())  # as `PeftModel.create_or_update_model_card` does
    card.data.base_model, card.data.library_name = "/somewhere/base", "peft"
    card.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    card.save(path)
    saved = path.read_text()
    written(path)
    assert "More Information Needed" not in path.read_text()
    assert read(path) == FIELDS
    path.write_text(saved.replace("- **License:** [More Information Needed]", "- **License:** mine"))
    written(path)
    assert "- **License:** mine" in path.read_text()
    assert read(path)["base_model"] == "/somewhere/base"


BAD = {
    "not UTF-8": (b"# caf\xe9\n", "is not UTF-8"),
    "a list": (b"---\n- abcdef\n---\n", "got a list; want lines of NAME: VALUE"),
    "broken YAML": (b"---\na: [1\n---\n", "cannot be read"),
    "a word": (b"---\nword\n---\n", "cannot be read"),
    "braces": (b"---\n{license: mit}\n---\n", "cannot be read"),
    "a tag that runs code": (b"---\na: !!python/object/apply:os.getcwd []\n---\n", "cannot be read"),
    "no end": (b"text\n<!-- specbasis: test -->\n", "once behind it"),
    "turned": (b"<!-- specbasis: end of test -->\n<!-- specbasis: test -->\n", "once behind it"),
    "twice": (b"<!-- specbasis: test -->\n<!-- specbasis: end of test -->\n" * 2, "once behind it"),
}


@pytest.mark.parametrize(("card", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_added_to_is_one_line_and_stays(tmp_path: Path, card: bytes, said: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(card)
    with pytest.raises(InputError, match=said) as error:
        written(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == card


def test_a_link_is_followed_inside_of_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/README.md"
    path.symlink_to("../secret.md")
    with pytest.raises(InputError, match="link that leads out"):
        written(path)
    assert (tmp_path / "secret.md").read_text() == "secret"
    path.unlink()
    (tmp_path / "model/CARD.md").write_text("mine\n")
    path.symlink_to("CARD.md")
    written(path)
    assert path.is_symlink()
    assert (tmp_path / "model/CARD.md").read_text().startswith("---\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot be written"):
        written(tmp_path / "model/README.md")


def test_a_folder_in_the_place_of_a_card_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        written(tmp_path / "README.md")


def test_front_matter_holds_any_text() -> None:
    yaml = pytest.importorskip("yaml")
    fields = {"a": 'x: "y"\n--- # z 🐚', "b": ["1", "no", "- c"], "left out": ""}
    assert yaml.safe_load(front_matter(fields).split("---\n", 1)[1].rpartition("---\n")[0]) == {
        name: value for name, value in fields.items() if value
    }


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hub:org/name", "org/name"),
        ("hub:org/name@main/sub", "org/name"),
        ("org/name", "org/name"),
        ("timm:vit_base", "timm/vit_base"),
        ("pkg:anarcii/models/x.pt", ""),
        ("/home/someone/model", ""),
        ("…/models/base", ""),
        ("../base", ""),
        ("base", ""),
        ("C:\\models\\base", ""),
    ],
)
def test_what_is_on_the_hub_has_a_name_there(source: str, name: str) -> None:
    assert hub_name(source) == name


def test_a_folder_of_the_same_name_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/name") == ""
