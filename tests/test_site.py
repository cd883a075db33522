"""What the site makes is whole: every public name, verb and flag, every formula, every picture."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

import specbasis

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def hook(name: str) -> ModuleType:
    return module(DOCS / "hooks" / f"{name}.py")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    named = dict(name.rsplit(".", 1)[::-1] for name in re.findall(r"^::: (\S+)$", page, flags=re.M))
    public = {name: getattr(specbasis, name) for name in specbasis.__all__}
    assert named == {value.__qualname__: value.__module__ for value in public.values()}


def test_every_verb_and_flag_is_in_the_reference() -> None:
    import typer

    from specbasis.cli import app

    command_line = hook("command_line")
    page = command_line.page()
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S))
    group = typer.main.get_command(app)
    context = typer.Context(group)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        for name in command.list_commands(context) if hasattr(command, "list_commands") else [None]:
            one = command.get_command(context, name) if name else command
            text = sections[f"specbasis {verb}" + (f" {name}" if name else "")]
            options = {option for parameter in one.params for option in parameter.opts if option[:1] == "-"}
            assert options <= set(re.findall(r"`(-[\w-]+)", text))


def test_prose_of_help_is_no_markdown() -> None:
    assert hook("command_line")._prose("a *b* `c*` d_e|f") == r"a \*b\* `c*` d\_e\|f"


def prose(page: Path) -> str:
    """A page without its blocks of code and without code in the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def formulas(page: Path) -> list[str]:
    return [
        block or inline for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", prose(page), flags=re.S)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_formula_becomes_mathml(page: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    mathml = hook("formulas").mathml
    assert prose(page).count("$") % 2 == 0
    for formula in formulas(page):
        assert len(ElementTree.fromstring(mathml(formula.strip(), "block"))) > 0, formula


def test_formulas_survive_code_hosts() -> None:
    """In Markdown a backslash before punctuation may vanish before a code host reads the formula."""
    found = {formula for page in PAGES for formula in formulas(page)}
    assert found
    assert not [formula for formula in found if re.search(r"\\[^a-zA-Z\s]", formula)]


def test_a_formula_knows_the_sides_of_its_bars() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    math = ElementTree.fromstring(hook("formulas").mathml(r"\lVert A\rVert_F^2 / \lvert b\rvert", "inline"))
    bars = [bar.get("form") for bar in math.iter() if bar.text in ("‖", "|")]
    assert bars == ["prefix", "postfix", "prefix", "postfix"]


def test_an_unknown_command_is_an_error() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    with pytest.raises(ValueError, match="nosuchcommand"):
        hook("formulas").mathml(r"\nosuchcommand x", "inline")


def test_pictures_are_what_their_script_makes(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("anarcii")
    lock = (DOCS.parent / "requirements" / "dev.txt").read_text(encoding="utf-8")
    if f"matplotlib=={matplotlib.__version__} " not in lock:
        pytest.skip("the pictures were drawn by the matplotlib of the lock")
    module(DOCS / "pictures.py").write(tmp_path)
    kept = {path.name: path for path in (DOCS / "pictures").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    for made in tmp_path.iterdir():
        (ours, numbers), (theirs, theirs_numbers) = (taken_apart(path) for path in (made, kept[made.name]))
        assert ours == theirs, made.name
        np.testing.assert_allclose(numbers, theirs_numbers, atol=0.02, err_msg=made.name)  # a place, in points


def taken_apart(picture: Path) -> tuple[str, list[float]]:
    """A picture without its numbers, and these; names made of digests, and heat maps as pixels, are left out."""
    text = re.sub(r'"data:[^"]+"|\b(?:[mp]|C\d+_\d+_|image)[0-9a-f]{10}\b', "", picture.read_text(encoding="utf-8"))
    number = re.compile(r"(?<![\w#])-?\d+(?:\.\d+)?")
    return number.sub("", text), [float(found) for found in number.findall(text)]


def test_pictures_are_small_and_described() -> None:
    assert all(path.stat().st_size < 60_000 for path in (DOCS / "pictures").iterdir())
    shown = [described for page in PAGES for described in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", prose(page))]
    assert {Path(target).name for _, target in shown} >= {path.name for path in (DOCS / "pictures").iterdir()}
    assert all(len(text) > 20 for text, _ in shown), shown
