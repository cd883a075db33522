"""A model's card, README.md: the front matter that the Hub reads, and a section that can be written again.

What somebody else wrote stays as it is, byte for byte: the section stands between two comments, and the front
matter gets what it lacks. huggingface_hub says where it is; places in it are those of the YAML parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.hub import parse_address
from specbasis.checkpoint.regular import read_bytes
from specbasis.core.errors import InputError
from specbasis.core.extras import require

CARD = "README.md"

RELATIONS = ("finetune", "adapter", "quantized", "merge")
"""How a model can stand to its ``base_model``, in the Hub's words."""

TEMPLATE = "[More Information Needed]"
"""What the card that PEFT saves has in the place of everything; one that holds it was not filled in."""


def front_matter(fields: Mapping[str, Any]) -> str:
    """The head of a card; what JSON writes is YAML, whatever colons and ends of lines are in it."""
    return f"---\n{''.join(_field(name, value) for name, value in _told(fields).items())}---\n"


def digest_line(name: str, sha256: str) -> str:
    """A line of a list that says by which bytes something is known; only what its place is, where nobody says."""
    is_digest = re.fullmatch(r"[0-9a-f]{64}", sha256)  # of a file, which may say anything
    return f"- {name}" + (f", weights with the SHA-256 `{sha256}`" if is_digest else "")


def hub_name(source: str) -> str:
    """``org/name`` of an address on the Hub; empty for any other place, which no card may have as its base."""
    scheme = source.partition(":")[0] if ":" in source else "hub"
    if scheme not in ("hub", "timm") or Path(source).exists():
        return ""
    try:
        name = parse_address(source).repository
    except InputError:
        return ""
    return name if "/" in name else ""


def write_section(readme: Path, kind: str, section: str, fields: Mapping[str, Any], title: str) -> list[str]:
    """Put a section, and what the front matter lacks, into a card, which is made where there is none.

    Doing it again replaces the section alone. A card as PEFT saves it, filled in by nobody, gives way.

    Args:
        readme: the file.
        kind: which section of a card this is: each has its own pair of comments.
        section: Markdown.
        fields: of the front matter; what a card says itself is not changed, but for tags that it lacks.
        title: heading of a new card.

    Returns:
        What the front matter says otherwise, as sentences.

    Raises:
        InputError: the file cannot be read or written, is no UTF-8, leads out of its folder, its front matter is no
            YAML, or its comments do not stand in pairs.
    """
    path = _inside(readme)
    fields = _told(fields)
    try:
        text = read_bytes(path).decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{readme}: is not UTF-8 ({error.reason} at byte {error.start}); save it so") from error
    if TEMPLATE in text:
        text = _without_template(text)
    mark, text = ("\ufeff", text[1:]) if text[:1] == "\ufeff" else ("", text)
    end = "\r\n" if "\r\n" in text else "\n"
    notes: list[str] = []
    match = require("huggingface_hub.repocard", purpose="a model's card needs").REGEX_YAML_BLOCK.search(text)
    if match:
        front, notes = _completed(match[2], fields, end, readme)
        front, body = match[1] + front + match[3], text[match.end() :]
    else:
        front, body = front_matter(fields).replace("\n", end), text or f"{end}# {title}{end}"
    written = mark + front + _with(body, kind, section.strip().replace("\n", end), end, readme)
    write_whole(path, written.encode())
    return notes


def _told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something; a relation to no base does not."""
    lacks_base = not fields.get("base_model")
    return {n: value for n, value in fields.items() if value and not (lacks_base and n == "base_model_relation")}


def _field(name: str, value: Any) -> str:
    return f"{name}: {json.dumps(value, ensure_ascii=False)}\n"


def _inside(readme: Path) -> Path:
    """The file itself where a card is a link.

    Raises:
        InputError: the link leads out of the card's folder.
    """
    target = readme.resolve()
    if readme.is_symlink() and not target.is_relative_to(readme.parent.resolve()):
        raise InputError(f"{readme}: is a link that leads out of its folder; put the file itself there")
    return target


def marked(kind: str, section: str, end: str = "\n") -> str:
    """A section between its comments, by which it is found again."""
    return f"<!-- specbasis: {kind} -->{end}{section.strip()}{end}<!-- specbasis: end of {kind} -->"


def _with(body: str, kind: str, section: str, end: str, readme: Path) -> str:
    """A card's text with the section between its comments: in the place of the former one, or at the end."""
    first, last = f"<!-- specbasis: {kind} -->", f"<!-- specbasis: end of {kind} -->"
    block = marked(kind, section, end)
    counts = body.count(first), body.count(last)
    start, stop = body.find(first), body.find(last)
    if counts == (1, 1) and start < stop:
        return body[:start] + block + body[stop + len(last) :]
    if counts != (0, 0):
        raise InputError(f"{readme}: want {first} once and {last} once behind it; mend that, or remove both")
    gap = "" if body.endswith(end * 2) else end if body.endswith(end) else end * 2
    return f"{body}{gap}{block}{end}"


def _without_template(text: str) -> str:
    """Nothing, where a card is the template as PEFT saves it; else the card as it is."""
    from huggingface_hub import ModelCard, ModelCardData

    card = text.replace("\r\n", "\n").split("---\n", 2)[-1].split("\n")
    saved = {*ModelCard.from_template(ModelCardData()).text.split("\n"), "### Framework versions"}
    return text if any(line not in saved and not re.fullmatch(r"- PEFT [\w.+]+", line) for line in card) else ""


def _completed(front: str, fields: Mapping[str, Any], end: str, readme: Path) -> tuple[str, list[str]]:
    """A front matter with the fields that it lacks, and what it says otherwise.

    Raises:
        InputError: it is no YAML, or nothing can be added to it.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        root, present = yaml.compose(front, yaml.SafeLoader), yaml.safe_load(front) or {}
        if not isinstance(present, dict):
            raise ValueError(f"got a {type(present).__name__}; want lines of NAME: VALUE")
        nodes = {key.value: node for key, node in root.value} if root else {}
        edits, notes, added = [], [], ""
        for name, value in fields.items():
            own, node = present.get(name), nodes.get(name)
            if _says(own, value):
                continue
            if node is None:
                added += _field(name, value).replace("\n", end)
            elif not own:
                space = " " * (front[node.start_mark.index - 1] == ":")
                edits.append((node.start_mark.index, node.end_mark.index, space + json.dumps(value)))
            elif isinstance(own, list) and isinstance(value, list):
                new = [json.dumps(item) for item in value if item not in own]
                indent, at = end + " " * node.start_mark.column, node.start_mark.index + bool(node.flow_style)
                items = (f"{item}, " if node.flow_style else f"- {item}{indent}" for item in new)
                edits.append((at, at, "".join(items)))
            else:
                notes.append(f"{name} stays {own!r}; it would be {value!r}")
        # In front: what stands at the end may be a text, and would go on.
        for start, stop, text in sorted([*edits, (0, 0, added)], reverse=True):
            front = front[:start] + text + front[stop:]
        now = yaml.safe_load(front) or {}
        lost = [name for name in (*present, *fields) if name not in now and fields.get(name, True)]
        if lost or len(notes) != sum(not _says(now.get(name), value) for name, value in fields.items()):
            raise ValueError("nothing can be added to it; write it as lines of NAME: VALUE")
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{readme}: its front matter, between the lines ---, cannot be read: {reason}") from error
    return front, notes


def _says(own: Any, value: Any) -> bool:
    """Whether a field says what it should, or nothing is to be said."""
    if isinstance(own, list) and isinstance(value, list):
        return all(item in own for item in value)
    return not value or own in (value, [value])
