"""Trees of checkpoints whose ancestry is known."""

from pathlib import Path

import pytest
import torch

from specbasis.core.errors import InputError
from specbasis.lineage.tree import Lineage, lineage, members_of
from tests.pico import State, bert_state, finetuned, write

BASE = bert_state(blocks=2, width=64, seed=1)


def _found(folder: Path, models: dict[str, State]) -> Lineage:
    for name, state in models.items():
        write(folder / f"{name}.safetensors", state)
    return lineage(members_of(folder))


def _edges(found: Lineage) -> set[tuple[str, str, str]]:
    return {(edge.parent, edge.child, edge.direction) for tree in found.trees for edge in tree.edges}


def test_a_star_has_its_centre_and_independent_trainings_their_own_roots(tmp_path: Path) -> None:
    tuned = {f"t{i}": finetuned(BASE, 0.05 * (i + 1), seed=i + 1) for i in range(4)}
    further = finetuned(tuned["t2"], 0.1, seed=20)
    own = bert_state(blocks=2, width=64, seed=9)
    merge = {n: 0.4 * tuned["t0"][n] + 0.6 * tuned["t1"][n] for n in BASE}
    models = {"base": BASE, **tuned, "t2-more": further, "own": own, "merge": merge}
    models["t3-bf16"] = {n: v.bfloat16() for n, v in tuned["t3"].items()}
    found = _found(tmp_path, models)
    main, alone = found.trees
    assert (main.root, main.identified, alone.root, alone.members) == ("base", True, "own", ("own",))
    assert _edges(found) == {
        *(("base", f"t{i}", "star") for i in range(4)),
        ("t2", "t2-more", "star"),
        ("t3", "t3-bf16", "form"),
        ("t0", "merge", "merge"),
        ("t1", "merge", "merge"),
    }
    assert abs(main.angles["base"]) < 0.1
    unrelated = [k for k in found.kinships if "own" in (k.first, k.second)]
    assert not any(k.related for k in unrelated)
    assert all(abs(k.cosine) < 0.05 and k.alignment < 3 * k.chance for k in unrelated)
    assert "independent" not in found.as_text()
    assert "t2-more" in found.as_text()


def test_two_checkpoints_have_no_direction_but_by_form(tmp_path: Path) -> None:
    (found,) = _found(tmp_path / "a", {"one": BASE, "two": finetuned(BASE, 0.1)}).trees
    assert not found.identified
    assert "not identifiable" in found.reason
    assert found.edges[0].direction == "unknown"
    coarse = {n: v.bfloat16() for n, v in BASE.items()}
    (copied,) = _found(tmp_path / "b", {"a-coarse": coarse, "fine": BASE}).trees
    assert (copied.root, copied.edges[0].direction) == ("fine", "form")


def test_a_vocabulary_that_grew_is_a_hint_only(tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    grown = finetuned(BASE, 0.1)
    grown[name] = torch.cat([grown[name], torch.zeros(3, 64)])
    (found,) = _found(tmp_path, {"a-grown": grown, "base": BASE}).trees
    assert (found.root, found.identified, found.edges[0].direction) == ("base", False, "vocabulary")


def test_updates_that_say_the_same_are_no_star(tmp_path: Path) -> None:
    """Siblings whose updates correlate above the right angle's limit may be chained: none is called the centre."""
    common = finetuned(BASE, 0.2, seed=5)
    models = {f"t{i}": finetuned(common, 0.02, seed=i) for i in range(2)}
    found = _found(tmp_path, {"base": BASE, **models})
    assert len(found.trees) == 1
    assert not found.trees[0].identified


def test_what_is_no_family_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="want at least two"):
        lineage([write(tmp_path / "a.safetensors", BASE)])
    with pytest.raises(InputError, match="holds 1 checkpoints"):
        members_of(tmp_path)
    other = write(tmp_path / "b.safetensors", {"x.weight": torch.randn(4, 4)})
    with pytest.raises(InputError, match="no matrix in common"):
        lineage([tmp_path / "a.safetensors", other])
