"""Every figure of the paper from rows: its files, its table, its nulls; and what is said where rows are missing."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.core.errors import InputError
from specbasis.figures.kit import Figure, free_panels
from specbasis.paper.figures import reproduce
from specbasis.paper.material import RECIPES, Material, Records, recipe
from specbasis.paper.spectra import random_variance
from tests.pico import bert_state, finetuned, write


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("figures")
    base = bert_state(blocks=3, width=16)
    paths = [write(folder / f"t{i}.safetensors", finetuned(base, 0.1 * (i + 1), seed=i)) for i in range(6)]
    return specbasis.compare(write(folder / "base.safetensors", base), paths, folder / "out", nulls=True, workers=1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_figure_has_its_files_and_its_table(compared: Comparison, tmp_path: Path, name: str) -> None:
    scores = {f"t{i}": float(i) for i in range(6)}
    first, *_ = (*RECIPES[name].modality, "vision")
    modality = {f"t{i}": first if i < 3 else "other" for i in range(6)} if name != "fig18" else {}
    drawn = reproduce(name, [compared], tmp_path, modality=modality, scores=scores)
    endings = {"csv", "json", "md"} if RECIPES[name].is_table else {"csv", "json", "png", "svg"}
    assert {path.suffix[1:] for path in drawn.files} == endings
    assert drawn.notes == ()
    with (tmp_path / f"{name}.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines
    about = json.loads((tmp_path / f"{name}.json").read_text())
    if RECIPES[name].modality:
        assert {line["modality"] for line in lines} == {first}
        assert len(about["models"]) == 3
        every = reproduce(name, [compared], tmp_path / "every", modality=dict.fromkeys(modality, "other"))
        assert f"{first}=DIR says it" in every.notes[0], "a figure of a modality says that it shows none of it"
    if name == "nulls":
        rows = compared.to_pandas()
        line = next(x for x in lines if (x["pair"], x["side"], x["ranks"]) == ("t1", "right", "1-10"))
        here = rows[(rows.pair == "t1") & (rows.matrix == line["matrix"]) & (rows["index"] < 10)]
        for column, measure in (("alignment", "alignment"), ("gaussian", "null_alignment_gaussian")):
            wanted = here[here.measure == f"{measure}_right"].value.mean()
            assert float(line[column]) == pytest.approx(wanted, rel=1e-4)
        turned = (here[here.measure == "p_gaussian_right"].value > 0.99).mean()
        assert float(line["turned"]) == pytest.approx(turned, abs=1e-4)
    if name == "fig2":
        rank1 = next(line for line in lines if line["side"] == "left" and line["rank"] == "1")
        assert float(rank1["chance"]) < float(rank1["low"]) <= float(rank1["mean"]) <= float(rank1["high"])
        assert 0 < float(rank1["random_update"]) <= 1
    if name == "tab4":
        rows = compared.to_pandas()
        line = next(x for x in lines if x["layer"] == "ffn.up" and x["model"] == "t1")
        here = rows[(rows.pair == "t1") & (rows.block == 2) & (rows.role == "ffn.up")]
        wanted = here[here.measure == "rsd"].value.item()
        assert float(line["RSD"]) == pytest.approx(wanted, rel=1e-4)


@pytest.fixture(scope="module")
def populations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Comparison, Comparison]:
    """Finetunes and an independent model, the finetunes alone, and that alone."""
    folder, base = tmp_path_factory.mktemp("populations"), bert_state(blocks=3, width=64)
    tuned = [write(folder / f"t{i}.safetensors", finetuned(base, 0.1 * (i + 1), seed=i)) for i in range(4)]
    other = write(folder / "other.safetensors", bert_state(blocks=3, width=64, seed=9))
    several = ([*tuned, other], tuned, [other])
    every, alone, only = (specbasis.compare(base, models, nulls=True, workers=1) for models in several)
    return every, alone, only


@pytest.mark.parametrize("name", ["fig2", "fig3", "tab4", "fig18"])
def test_an_independent_pair_is_left_out_of_the_finetunes_unless_it_is_asked_for(
    tmp_path: Path, populations: tuple[Comparison, Comparison, Comparison], name: str
) -> None:
    every, alone, only = populations
    assert every.verdicts["other"].kind == "independent"
    scores = {label: float(i) for i, label in enumerate(every.pairs)}

    def table(results: Comparison, folder: str, **options: bool) -> tuple[str, tuple[str, ...]]:
        drawn = reproduce(name, [results], tmp_path / folder, scores=scores, **options)
        return (tmp_path / folder / f"{name}.csv").read_text(), drawn.notes

    without, notes = table(every, "without")
    assert without == table(alone, "alone")[0]
    assert any("other: independent of its base" in note and "--independent" in note for note in notes)
    asked, notes = table(every, "asked", independent=True)
    assert asked != without
    assert notes == ()
    with pytest.raises(InputError, match=r"other: independent of its base.*--independent"):
        table(only, "only")


def test_random_entries_explain_what_a_drawn_matrix_does() -> None:
    W = np.random.default_rng(0).standard_normal((300, 700))
    energy = np.linalg.svd(W, compute_uv=False) ** 2
    share = np.cumsum(energy) / energy.sum()
    q, expected = random_variance(300, 700)
    np.testing.assert_allclose(np.interp(np.arange(1, 301) / 300, q, expected), share, atol=0.01)


def test_rows_that_lack_a_measure_name_the_command_that_gives_it(tmp_path: Path) -> None:
    base = bert_state(width=16)
    few = specbasis.compare(base, finetuned(base), measures=["singular_value*"], workers=1)
    with pytest.raises(InputError, match=r"no rows of alignment_left.*specbasis compare BASE TUNED --out DIR"):
        reproduce("fig2", [few], tmp_path)
    with pytest.raises(InputError, match="no figure 'fig1'"):
        reproduce("fig1", [few], tmp_path)
    plain = specbasis.compare(base, finetuned(base), workers=1)
    assert "--nulls" in reproduce("fig2", [plain], tmp_path).notes[0]


def test_a_function_with_the_decorator_is_a_figure_of_the_paper(compared: Comparison, tmp_path: Path) -> None:
    @recipe("App. Z", "spectral distance of every model", "rsd")
    def fig99(material: Material) -> tuple[Figure, Records]:
        figure, axes = free_panels(1, 1, (3.0, 2.0), "Spectral distance")
        distances = [float(m.pair.whole("rsd").mean()) for m in material.models]
        axes[0][0].plot(distances, "o")
        return figure, [{"pair": m.name, "rsd": d} for m, d in zip(material.models, distances, strict=True)]

    try:
        drawn = reproduce("fig99", [compared], tmp_path)
    finally:
        del RECIPES["fig99"]
    assert {path.name for path in drawn.files} == {f"fig99.{form}" for form in ("csv", "json", "png", "svg")}
    assert (tmp_path / "fig99.csv").read_text().splitlines()[0] == "pair,rsd"
