"""Findings: each check sees what it is for, on pico models by the real path, and nothing on a plain finetune."""

import json
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import specbasis
from specbasis.comparison.check import THRESHOLDS, Found, Judged, check, thresholds, unlooked
from specbasis.comparison.facts import Facts
from specbasis.comparison.findings import CHECKS, find, kinds
from specbasis.core.errors import InputError
from tests.pico import State, bert_state, finetuned


def _weights(seed: int) -> State:
    """Weights with spectra that fall, as trained ones do."""
    state = bert_state(blocks=5, width=64, seed=seed)
    return {n: v * torch.logspace(0, -1.5, v.shape[1]) if v.ndim == 2 else v for n, v in state.items()}


BASE = _weights(3)
FFN = "encoder.layer.2.intermediate.dense.weight"


def _trained(size: float = 0.1, frozen: str = "-") -> State:
    """An update that is no noise: half of its energy in a few directions, as training gives."""
    g = torch.Generator().manual_seed(5)
    tuned = finetuned(BASE, size / 2, frozen=frozen)
    for name, W in BASE.items():
        if W.ndim == 2 and frozen not in name:
            low = torch.randn(W.shape[0], 3, generator=g) @ torch.randn(3, W.shape[1], generator=g)
            tuned[name] = tuned[name] + size * W.norm() / low.norm() * low
    return tuned


def _only(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    tuned = _trained()
    return tuned | {name: change(tuned[name])}


def _low_rank(W: torch.Tensor) -> torch.Tensor:
    if W.ndim == 1:
        return W
    B, A = torch.randn(W.shape[0], 2), torch.randn(2, W.shape[1])
    return W + 0.1 * W.norm() / (B @ A).norm() * (B @ A)


CASES: dict[str, Callable[[], State]] = {
    "wrong-base": lambda: _weights(9),
    "foreign-parts": lambda: _only("pooler.dense.weight", lambda W: torch.randn_like(W)),
    "reordered": lambda: _only(FFN, lambda W: W.flip(0)),
    "rank-collapse": lambda: _only(FFN, lambda W: W + 4 * W.norm() / 64 * torch.ones_like(W)),
    "storage-rounding": lambda: {n: v.bfloat16() for n, v in finetuned(BASE, 1e-3).items()},
    "outlier-layer": lambda: _only(FFN, lambda W: W + 5 * (W - BASE[FFN])),
    "noise": lambda: finetuned(BASE, 0.02),
    "copied": lambda: {n: v.bfloat16() for n, v in BASE.items()},
    "quantised": lambda: {
        n: (v / v.abs().amax() * 127).round() * v.abs().amax() / 127 if v.ndim == 2 else v
        for n, v in _trained().items()
    },
    "pruned": lambda: {n: torch.where(v.abs() < 0.02, 0.0, v) for n, v in _trained().items()},
    "frozen": lambda: _trained(frozen="layer.0"),
    "barely-moved": lambda: _trained(1e-4),
    "low-rank": lambda: {n: _low_rank(v) for n, v in BASE.items()},
}


@pytest.mark.parametrize("kind", CASES)
def test_a_check_sees_what_it_is_for(kind: str) -> None:
    c = specbasis.compare(BASE, CASES[kind](), ranks=12, workers=1)
    found = {finding.kind: finding for finding in c.findings["state_dict"]}
    assert kind in found
    assert found[kind].sentence.startswith(f"{kind}: ")
    assert found[kind].evidence
    known = next(known for known in CHECKS if known.kind == kind)
    assert (found[kind].severity, found[kind].threshold) == (known.severity, known.threshold)
    if kind in ("reordered", "rank-collapse", "outlier-layer"):
        assert found[kind].matrices == (FFN,)
    json.dumps(c.summary(), allow_nan=False)


@pytest.mark.parametrize("kind", [check.kind for check in CHECKS if check.needs and check.kind in CASES])
def test_a_check_says_what_it_reads(kind: str) -> None:
    """All is looked for by default; without the measures that it names a check finds nothing, and that is said."""
    c = specbasis.compare(BASE, CASES[kind](), ranks=12, workers=1)
    assert unlooked(c.facts["state_dict"].measures) == []
    known = next(known for known in CHECKS if known.kind == kind)
    names = c.rows["measure"].cast("string")
    for measure in known.needs:
        assert known in unlooked(Facts(c.rows.filter(pc.not_equal(names, measure))).measures)
    facts = Facts(c.rows.filter(pc.invert(pc.is_in(names, pa.array(known.needs)))))
    assert known.find(Judged(facts, c.verdicts["state_dict"]), known.threshold) is None


def test_nothing_is_found_in_a_plain_finetune() -> None:
    assert specbasis.compare(BASE, _trained(), ranks=12, workers=1).findings["state_dict"] == []


def test_a_matrix_that_failed_is_a_finding() -> None:
    tuned = _trained()
    tuned[FFN] = torch.full_like(tuned[FFN], torch.nan)
    c = specbasis.compare(BASE, tuned, ranks=12, workers=1)
    assert [f.kind for f in c.findings["state_dict"]] == ["failed"]
    assert find(Facts(c.rows), c.verdicts["state_dict"]) == []


def test_unknown_findings_are_refused_by_name() -> None:
    assert kinds(["frozen"]) == ("frozen",)
    with pytest.raises(InputError, match=r"no finding 'nonsense'; .*there is: failed, wrong-base"):
        kinds(["frozen", "nonsense"])


def test_a_changed_threshold_is_another_version() -> None:
    """Whoever changes what decides gives the thresholds another name, and this table with it."""
    limits = {kind: check["threshold"] for kind, check in thresholds()["checks"].items()}
    assert THRESHOLDS == "findings-1"
    origin = {"weight_cosine": 0.05, "kept_cosine": 0.5, "level": 1e-3}
    tail = {"floor": 4.0, "share": 0.25, "side": 32, "fall": 3.0}
    assert {kind: limit for kind, limit in limits.items() if limit} == {
        "wrong-base": origin,
        "foreign-parts": origin,
        "reordered": {"kept": 0.9, "lost": 0.3, "side": 8},
        "intruders": {"count": 1, "cosine": 0.5, "leading": 10},
        "rank-collapse": {"ratio": 0.8},
        "storage-rounding": {"factor": 1.5},
        "outlier-layer": {"robust_z": 5.0, "factor": 3.0, "members": 5},
        "noise": {"ratio": 0.8, "share": 0.5, "side": 32},
        "pruned": {"share": 0.01},
        "barely-moved": {"relative_update": 1e-3},
        "low-rank": tail,
        "below-rounding": tail,
    }


def test_a_check_that_is_added_is_told_wherever_findings_are() -> None:
    try:

        @check("many-matrices", "more matrices than one has patience for", "problem", matrices=2)
        def _many(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
            n = len(pair.facts.matrices)
            return (f"{n} matrices", [], {"matrices": n}) if n > threshold["matrices"] else None

        c = specbasis.compare(BASE, _trained(), ranks=12, workers=1)
        assert [(f.kind, f.threshold) for f in c.findings["state_dict"]] == [("many-matrices", {"matrices": 2})]
        assert "many-matrices" in json.dumps(c.summary())
        assert "many-matrices: " in c._repr_html_()
        assert "many-matrices: " in c.report(figures=False).read_text()
        assert kinds(["many-matrices"]) == ("many-matrices",)
    finally:
        CHECKS[:] = [kind for kind in CHECKS if kind.kind != "many-matrices"]


def test_a_pair_is_judged_once_and_its_rows_are_not_copied() -> None:
    c = specbasis.compare(BASE, [_trained(), _trained(0.2)], ranks=12, workers=1)
    assert sum(len(facts.rows) for facts in c.facts.values()) == len(c.rows)
    assert c.findings.keys() == c.verdicts.keys() == c.facts.keys() == set(c.pairs)
    first = c.facts[c.pairs[0]].rows["value"].chunk(0)
    assert first.buffers()[1].address == c.rows["value"].chunk(0).buffers()[1].address
