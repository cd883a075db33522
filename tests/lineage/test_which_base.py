"""Answers for models whose base is known."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import specbasis
from specbasis import InputError
from specbasis.lineage import database
from specbasis.lineage.fingerprint import Fingerprint, fingerprint
from specbasis.lineage.which_base import Answer, contradiction, which_base
from tests.pico import State, bert_state, finetuned, write

BASE = bert_state(blocks=3, width=64, seed=1)
OTHERS = [fingerprint(bert_state(blocks=3, width=64, seed=s)).named(f"other-{s}", base=True) for s in (2, 3)]
DATABASE = [*OTHERS, fingerprint(BASE).named("org/base", base=True)]


def _named(state: State, name: str) -> Fingerprint:
    return fingerprint(state).named(name, base=False)


def _asked(state: State, database: Sequence[Fingerprint] = DATABASE) -> Answer:
    return which_base(fingerprint(state), database)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("identical", BASE),
        ("identical", {f"module.{n}": W for n, W in BASE.items()}),
        ("copy", {n: W.bfloat16() for n, W in BASE.items()}),
        ("finetuned", finetuned(BASE, 0.1)),
        ("finetuned", finetuned(BASE, 0.1, frozen="attention")),
        ("related", finetuned(BASE, 2.0)),
        ("pruned", {n: torch.where(W.abs() < 0.05, 0, W) for n, W in BASE.items()}),
        ("pruned", {n: W for n, W in BASE.items() if "layer.1" not in n}),
        ("none", bert_state(blocks=3, width=64, seed=7)),
        ("none", bert_state(blocks=2, width=48, seed=7)),
    ],
)
def test_kinds(kind: str, state: State) -> None:
    answer = _asked(state)
    assert answer.kind == kind, answer.sentence
    assert answer.bases == (() if kind == "none" else ("org/base",))


def test_one_entry_that_is_in_no_sample_is_seen() -> None:
    name = next(name for name, W in BASE.items() if W.ndim == 2 and W.numel() > 1000)
    state = {n: W.clone() for n, W in BASE.items()}
    plain = fingerprint(BASE)
    for flat in range(state[name].numel()):
        state[name].view(-1)[flat] += 1.0
        found = fingerprint(state)
        if np.array_equal(found.entries, plain.entries, equal_nan=True):
            break
        state[name].view(-1)[flat] -= 1.0
    answer = which_base(found, DATABASE)
    assert (answer.kind, answer.bases) == ("finetuned", ("org/base",))
    assert "1 changed" in answer.ranking[0]["forms"]
    assert "the same" in _asked(BASE).sentence


def test_none_where_the_base_is_absent() -> None:
    assert _asked(finetuned(BASE, 0.1), OTHERS).kind == "none"
    assert _asked(BASE, []).kind == "none"


def test_two_finetunes_of_an_absent_base_are_related_and_no_more() -> None:
    first, second, third = (finetuned(BASE, 0.1, seed=s) for s in (1, 2, 3))
    assert _asked(second, [*OTHERS, _named(first, "first")]).kind == "related"
    answer = _asked(third, [*OTHERS, _named(first, "first"), _named(second, "second")])
    assert (answer.kind, set(answer.bases) <= {"first", "second"}) == ("related", True)


def test_a_base_that_nobody_declared_is_found_by_the_way_to_a_relative() -> None:
    first, second = (finetuned(BASE, 0.1, seed=s) for s in (1, 2))
    answer = _asked(second, [_named(first, "first"), _named(BASE, "base")])
    assert (answer.kind, answer.bases) == ("finetuned", ("base",))
    assert "first" in answer.sentence


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_shares_of_a_merge_lie_in_their_intervals(share: float) -> None:
    first, second = (finetuned(BASE, size, seed=s) for s, size in ((1, 0.1), (2, 0.2)))
    database = [*DATABASE, _named(first, "first"), _named(second, "second")]
    answer = _asked({n: (1 - share) * first[n] + share * second[n] for n in BASE}, database)
    assert (answer.kind, set(answer.bases)) == ("merge", {"first", "second"})
    for name, wanted in (("first", 1 - share), ("second", share)):
        estimate, low, high = answer.shares[name]
        assert abs(estimate - wanted) < 1e-3
        assert low - 1e-4 <= wanted <= high + 1e-4
    vectors = {n: BASE[n] + 0.7 * (first[n] - BASE[n]) + 0.5 * (second[n] - BASE[n]) for n in BASE}
    answer = _asked(vectors, database)
    found = [answer.shares[name][0] for name in ("org/base", "first", "second")]
    assert all(math.isclose(a, b, abs_tol=2e-3) for a, b in zip(found, (-0.2, 0.7, 0.5), strict=True))


def test_a_sibling_is_no_merge() -> None:
    database = [*DATABASE, *(_named(finetuned(BASE, 0.1, seed=s), f"t{s}") for s in range(4))]
    answer = _asked(finetuned(BASE, 0.1, seed=9), database)
    assert (answer.kind, answer.bases) == ("finetuned", ("org/base",))


def test_blocks_and_widths_that_changed_are_told() -> None:
    start = "encoder.layer."
    grown = dict(BASE)
    grown |= {n.replace(f"{start}1.", f"{start}3."): W for n, W in BASE.items() if n.startswith(f"{start}1.")}
    answer = _asked(grown)
    assert (answer.kind, answer.depth) == ("grown", {"0": "0", "1": "1", "2": "2", "3": "1"})
    narrow = {n: W[:192] if "intermediate" in n else W for n, W in BASE.items()}
    narrow = {n: W[:, :192] if W.shape[-1] == 256 else W for n, W in narrow.items()}
    answer = _asked(narrow)
    assert answer.kind == "pruned"
    assert "3 ffn.up" in answer.sentence


def test_what_was_made_anew_is_named() -> None:
    fresh = bert_state(blocks=3, width=64, seed=8)
    name = "encoder.layer.2.intermediate.dense.weight"
    answer = _asked({**finetuned(BASE, 0.1), name: fresh[name]})
    assert answer.kind == "finetuned"
    assert name in answer.sentence


def test_the_rate_of_false_attributions_is_that_of_the_whole_family() -> None:
    """p-values are multiplied by how many models were compared."""
    query = fingerprint(finetuned(BASE, 0.1))
    few, many = (which_base(query, [*OTHERS[:1] * n, DATABASE[2]]).ranking[0]["p"] for n in (1, 9))
    assert math.isclose(many, 5 * few, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("card", "wrong", "said"),
    [
        (["org/base"], False, "agrees"),
        (["hub:Org/Base@main"], False, "agrees"),
        (["other-2"], True, "contradicted"),
        (["org/base", "other-2"], True, "contradicted"),
        (["org/unheard"], False, "cannot be checked"),
        ([], False, "names no base_model"),
    ],
)
def test_cards(card: list[str], wrong: bool, said: str) -> None:
    found = contradiction(_asked(finetuned(BASE, 0.1)), card)
    assert found[0] == wrong
    assert said in found[1]


def test_a_card_of_a_model_that_comes_from_none_is_contradicted() -> None:
    assert contradiction(_asked(bert_state(blocks=3, width=64, seed=7)), ["org/base"])[0]


def test_models_and_files_are_taken_where_fingerprints_are(tmp_path: Path) -> None:
    path = write(tmp_path / "tuned.safetensors", finetuned(BASE, 0.1))
    known, one = tmp_path / "known.parquet", tmp_path / "one.parquet"
    database.write(known, DATABASE)
    database.write(one, [specbasis.fingerprint(path)])
    answers = [specbasis.which_base(query, known) for query in (path, str(path), one, finetuned(BASE, 0.1))]
    assert [(answer.kind, answer.bases[0]) for answer in answers] == [("finetuned", "org/base")] * 4
    assert specbasis.which_base(path, DATABASE).sentence == answers[0].sentence
    with pytest.raises(InputError, match="no such file"):
        specbasis.which_base(path, tmp_path / "absent.parquet")
