"""Options: one dataclass gives keywords, flags and the manifest's configuration, and refuses in one line."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from specbasis.cli.flags import flags
from specbasis.comparison.options import Options as CompareOptions
from specbasis.core.errors import InputError
from specbasis.core.options import ADVANCED, PYTHON, Options, option, takes
from specbasis.finetuning.options import FinetuneOptions, Placement, Protocol


@dataclass(frozen=True)
class Cake(Options):
    layers: int = option(2, "how many layers", least=1)
    colours: tuple[str, ...] = option(("red",), "colours of the icing")
    candles: tuple[int, ...] | None = option(None, "where candles stand")
    style: str = option("round", "round or square", choices=("round", "square"), panel=ADVANCED)
    plates: int = option(1, "how many plates", decides=False)
    baker: Any = option(None, "who bakes", panel=PYTHON)


@takes(Cake)
def bake(oven: str, **keywords: Any) -> Cake:
    """Bake."""
    return Cake.of(None, keywords)


def test_a_field_is_a_keyword_a_flag_and_a_line_of_the_manifest() -> None:
    assert bake("hot", layers=3, colours=["blue"]) == Cake(3, ("blue",))
    assert list(inspect.signature(bake).parameters) == [
        "oven", "layers", "colours", "candles", "style", "plates", "baker",
    ]  # fmt: skip
    assert "layers: how many layers" in str(bake.__doc__)
    assert Cake().config() == {
        "layers": 2, "colours": ["red"], "candles": None, "style": "round", "baker": None,
    }  # fmt: skip
    baked: list[Cake] = []

    def verb(options: Cake) -> None:
        baked.append(options)

    app = typer.Typer()
    app.command()(flags(verb))
    done = CliRunner().invoke(app, ["--layers", "3", "--colours", "blue, green", "--candles", "0:2,5"])
    assert done.exit_code == 0, done.output
    assert baked == [Cake(3, ("blue", "green"), (0, 1, 5))]
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--style" in shown
    assert "--baker" not in shown


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"layer": 3}, r"no option 'layer'; did you mean layers\? there is: layers, colours"),
        ({"layers": 0}, "got layers = 0; want a whole number, at least 1"),
        ({"layers": True}, "got layers = True; want a whole number"),
        ({"layers": "two"}, "got layers = 'two'; want a whole number"),
        ({"colours": 3}, r"got colours = 3; want a list, such as \[3\]"),
        ({"style": "squre"}, r"got style = 'squre'; want one of round, square \(did you mean square\?\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        bake("hot", **keywords)
    assert "\n" not in str(error.value)


def test_a_list_can_be_a_text_as_a_flag_has_it() -> None:
    same = Cake(3, colours=["blue", "green"], candles=[0, 1, 5])  # type: ignore[arg-type]
    assert Cake(3, colours="blue, green", candles="0:2,5") == same  # type: ignore[arg-type]


def test_parts_of_options_keep_their_values() -> None:
    whole = FinetuneOptions(epochs=2, rank=4, interval=(0, 4), seed=7)
    assert whole.part(Protocol) == Protocol(epochs=2)
    assert whole.part(Placement) == Placement(rank=4, interval=(0, 4))


def test_a_comparison_is_the_same_with_more_workers_and_another_with_more_ranks() -> None:
    assert CompareOptions(workers=2, engine="threads").config() == CompareOptions().config()
    assert CompareOptions(ranks=5).config() != CompareOptions().config()
    assert CompareOptions(ranks=5).config()["subspace"] == 5
