"""Populations against scipy and statsmodels' definitions, on comparisons made by the real path."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.correlations import correlate, read_scores, units
from specbasis.comparison.population import cells, gather, population as run
from specbasis.core.errors import InputError
from tests.pico import bert_state, finetuned, write


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("family")
    base = bert_state(blocks=3, width=16)
    paths = [write(folder / f"t{i}.safetensors", finetuned(base, 0.02 * (i + 1), seed=i + 1)) for i in range(6)]
    return specbasis.compare(write(folder / "base.safetensors", base), paths, folder / "out", workers=1)


def test_cells_are_means_over_matrices_of_resolved_ranks(family: Comparison) -> None:
    member = gather([family], {})[0]
    found = {(c["depth"], c["ranks"]): c for c in cells(member, [(1, 4), (5, 16)], ["ffn"])}
    frame = family.to_pandas()
    for (depth, ranks), cell in found.items():
        low, high = map(int, ranks.split("-"))
        block = ("shallow", "middle", "deep").index(depth)
        here = frame[
            (frame.pair == member.pair)
            & (frame.block == block)
            & frame.role.astype(str).str.startswith("ffn")
            & frame["index"].between(low - 1, high - 1)
            & frame.resolved.astype("boolean").fillna(False)
        ]
        for side in ("left", "right"):
            part = here[here.measure == f"alignment_{side}"]
            wanted = part.groupby("matrix", observed=True).value.mean().mean()
            assert cell[f"alignment_{side}"] == pytest.approx(wanted, rel=1e-12)


def test_correlations_are_those_of_scipy_and_a_strong_one_is_seen(family: Comparison, tmp_path: Path) -> None:
    scores = {f"t{i}": -float(i) for i in range(6)}
    found = run([family], scores=scores, modality={"out": "language"}, ranks=[(1, 12)])
    first = found.correlations[0]
    assert (first.modality, first.method, first.models, first.unit) == ("language", "spearman", 6, "finetune")
    assert first.r > 0.9  # larger updates have lower alignment and lower scores
    x = [c["alignment"] for c in found.cells if (c["depth"], c["ranks"]) == (first.depth, first.ranks)]
    exact = scipy.stats.permutation_test(
        (x,), lambda a: scipy.stats.spearmanr(a, list(scores.values())).statistic, permutation_type="pairings"
    )
    assert first.p == pytest.approx(exact.pvalue, abs=0.01)
    of_method = [c for c in found.correlations if c.method == "spearman"]
    for kind in ("bh", "by"):
        wanted = scipy.stats.false_discovery_control([c.p for c in of_method], method=kind)
        np.testing.assert_allclose([getattr(c, f"q_{kind}") for c in of_method], wanted)
    assert all(c.family == len(of_method) for c in of_method)
    assert found.power[0]["clusters"] == 6
    out = found.write(tmp_path / "tables")
    with (out / "models.csv").open() as file:
        assert [line["pair"] for line in csv.DictReader(file)] == list(scores)
    assert json.loads((out / "population.json").read_text())["score"] == "score"


def test_without_a_relation_few_tests_survive() -> None:
    rng = np.random.default_rng(1)
    lines = [
        {"pair": f"m{i}", "modality": "", "depth": d, "ranks": r, "alignment": float(rng.random())}
        for d in ("shallow", "deep")
        for r in ("1-10", "11-30")
        for i in range(12)
    ]
    found = correlate(lines, {f"m{i}": float(rng.random()) for i in range(12)}, {})
    assert all(c.q_by >= c.q_bh >= c.p > 0 for c in found)
    assert sum(c.q_by < 0.05 for c in found) == 0
    assert all(c.low <= c.r <= c.high for c in found)


def test_finetunes_of_one_base_count_as_one_where_bases_are_many() -> None:
    names = [f"m{i}" for i in range(20)]
    assert units(names, {name: f"base {i % 5}" for i, name in enumerate(names)})[1].max() == 4
    assert units(names, dict.fromkeys(names, "one base"))[0] == "finetune"


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("name,acc\na,1\n", "", "want one called pair or model"),
        ("pair,acc,f1\na,1,2\n", "", "which column holds the scores"),
        ("pair,acc\na,high\n", "", "line 2: got 'high'"),
        ("pair,acc\na,nan\n", "", "want a finite number"),
    ],
)
def test_scores_that_cannot_be_read(tmp_path: Path, text: str, column: str, said: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_scores(path, column)


def test_scores_of_nobody_and_folders_of_nothing(family: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pair has a score"):
        run([family], scores={"other": 1.0})
    with pytest.raises(InputError, match="no comparison here"):
        run([tmp_path])
    (tmp_path / "s.csv").write_text("model,acc\nt0,0.5\nt1,\n")
    assert read_scores(tmp_path / "s.csv") == ({"t0": 0.5}, "acc")
    assert torch.isfinite(torch.tensor(run([family]).models[0]["top10_left"]))
