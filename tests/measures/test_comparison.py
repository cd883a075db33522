"""The second table in a real comparison: rows, own measures, refusals."""

import threading

import pytest
import torch

import specbasis
from specbasis.core.errors import InputError
from tests.pico import bert_state, finetuned, write


def gap_ratio(base, tuned):
    """Ratio of the largest singular values"""
    return tuned.S[0] / base.S[0]


def normed(svd):
    return svd.S / svd.S[0]


def broken(base, tuned):
    raise ZeroDivisionError("no")


def square(base, tuned):
    return torch.eye(2)


@pytest.fixture(scope="module")
def states():
    base = {name: value.to(torch.bfloat16) for name, value in bert_state(1, 16).items()}
    tuned = finetuned(base, 0.05, frozen="query")
    return base, {name: value.to(torch.bfloat16) for name, value in tuned.items()}


def values(result, measure, matrix="query"):
    return [r["value"] for r in result.rows.to_pylist() if r["measure"] == measure and matrix in r["matrix"]]


def test_every_null_of_a_small_model(states, tmp_path):
    base, tuned = states
    result = specbasis.compare(base, tuned, nulls=True, null_samples=3, heads=4, cache=tmp_path / "kept")
    found = set(result.rows["measure"].unique().to_pylist())
    for name in (
        "p_independent_left",
        "p_gaussian_right",
        "null_alignment_permuted_left",
        "null_alignment_rounding_right",
        "predicted_alignment_left",
        "rotation_factor_left",
        "size_share_left",
        "alignment_low_left",
        "matched_rank",
        "matched_alignment_right",
        "matched_chance_left",
        "sampled_alignment_rotated_left",
        "p_sampled_rounding_left",
        "intruder_cosine_left",
        "rounding_update_int8",
        "head_rotation",
        "degenerate_group_update",
    ):
        assert name in found
    for side in ("left", "right"):  # frozen: exactly nothing
        assert set(values(result, f"alignment_{side}")) == {1.0}
        assert set(values(result, f"null_alignment_gaussian_{side}")) == {1.0}
        assert set(values(result, f"intruder_cosine_{side}")) == {1.0}
    assert set(values(result, "head_rotation")) == {0.0}
    assert not values(result, "p_gaussian_left")
    low, high, at = (
        values(result, f"{name}_left", "key") for name in ("alignment_low", "alignment_high", "alignment")
    )
    assert all(a <= x <= b + 1e-12 for a, x, b in zip(low, at, high, strict=True))
    again = specbasis.compare(base, tuned, nulls=True, null_samples=3, heads=4, cache=tmp_path / "kept")
    assert values(again, "sampled_alignment_gaussian_left", "key") == values(
        result, "sampled_alignment_gaussian_left", "key"
    )


def test_ranks_that_rounding_mixes_are_unresolved(states):
    S = torch.tensor([3.0, 2.0, 1.0 + 1e-4, 1.0, 0.5])
    W = torch.linalg.qr(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))[0] * S
    W = (W @ torch.linalg.qr(torch.randn(8, 5, generator=torch.Generator().manual_seed(1)))[0].T).to(torch.bfloat16)
    T = (W.float() * (1 + 0.01 * torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))).to(torch.bfloat16)
    rows = specbasis.compare({"w": W}, {"w": T}, measures=["alignment*", "degenerate*"]).rows.to_pylist()
    at = {r["index"]: r["resolved"] for r in rows if r["measure"] == "alignment_left"}
    groups = {r["index"] for r in rows if r["measure"] == "degenerate_group_stored"}
    assert {2, 3} <= groups
    assert not at[2]
    assert not at[3]
    assert at[0]


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_own_measures_are_rows_like_others(tmp_path, engine):
    base, tuned = (
        write(tmp_path / f"{i}.safetensors", s) for i, s in enumerate((bert_state(1), finetuned(bert_state(1))))
    )
    result = specbasis.compare(base, tuned, measures=["rsd", gap_ratio, normed], engine=engine, workers=1)
    assert len(values(result, "gap_ratio", "key")) == 1
    assert values(result, "normed_base", "key")[0] == values(result, "normed_tuned", "key")[0] == 1
    assert len(values(result, "rsd", "key")) == 1
    assert not values(result, "mrc", "key")
    row = next(r for r in result.rows.to_pylist() if r["measure"] == "gap_ratio")
    assert row["index"] is None
    assert [m["name"] for m in result.manifest["measures"]] == ["gap_ratio", "normed_base", "normed_tuned"]
    assert result.manifest["measures"][0]["title"] == "Ratio of the largest singular values"


def test_own_measures_that_cannot_be_are_one_line(tmp_path, states):
    base, tuned = states
    for function, line in (
        (broken, "own measure broken failed: ZeroDivisionError: no"),
        (square, r"own measure square returned shape \(2, 2\)"),
        (lambda s: 1.0, "without a name"),
        (lambda: 1.0, "without a name"),
        (3, "want patterns of names, and functions"),
    ):
        with pytest.raises(InputError, match=line):
            specbasis.compare(base, tuned, measures=[function])

    def rsd(base, tuned):
        return 0.0

    with pytest.raises(InputError, match="own measure rsd: the name is taken"):
        specbasis.compare(base, tuned, measures=[rsd])
    lock = threading.Lock()

    def locked(base, tuned):
        with lock:
            return 1.0

    paths = [write(tmp_path / f"{i}.safetensors", bert_state(1, seed=i)) for i in range(2)]
    with pytest.raises(InputError, match="own measure locked cannot be sent to engine 'processes'"):
        specbasis.compare(*paths, measures=[locked], engine="processes")
    assert len(specbasis.compare(*paths, measures=["rsd", locked]).rows) > 0


def test_nulls_need_the_whole_spectrum(states):
    with pytest.raises(InputError, match="nulls need the whole spectrum"):
        specbasis.compare(*states, nulls=True, quick=True)


def test_own_measures_stand_in_the_terminal_by_role(tmp_path, capsys):
    from specbasis.cli.tables import print_comparison

    base = bert_state(1)
    result = specbasis.compare(base, finetuned(base), measures=[gap_ratio, normed], out=tmp_path / "out")
    *roles, whole = result.own[result.pairs[0]]
    ratios = [r["value"] for r in result.rows.to_pylist() if r["measure"] == "gap_ratio"]
    assert whole["gap_ratio"] == pytest.approx(sum(ratios) / len(ratios))
    query = values(result, "normed_base", "query")[:10]
    line = next(line for line in roles if line["role"] == "attention.query")
    assert line["normed_base"] == pytest.approx(sum(query) / len(query))
    print_comparison(specbasis.load(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "gap_ratio" in told
    assert f"{whole['gap_ratio']:.4g}" in told
