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


def test_what_lies_between_two_of_its_branches_is_no_centre(tmp_path: Path) -> None:
    """A way back to an absent base, beside a gentle finetune of that: the median of its cosines is near 0."""
    strong, gentle = finetuned(BASE, 0.3, seed=1), finetuned(BASE, 0.1, seed=2)
    merge = {n: 0.7 * strong[n] + 0.3 * BASE[n] for n in BASE}
    others = {f"m{i}": finetuned(merge, 0.1, seed=10 + i) for i in range(2)}
    found = _found(tmp_path, {"strong": strong, "gentle": gentle, "merge": merge, **others})
    assert not any(tree.identified and tree.root == "merge" for tree in found.trees)
    assert not any(parent == "merge" and child in ("strong", "gentle") for parent, child, way in _edges(found)
                   if way == "star")  # fmt: skip


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


def test_a_vocabulary_grows_from_any_checkpoint_and_not_from_the_first_alone(tmp_path: Path) -> None:
    name, other = "embeddings.word_embeddings.weight", bert_state(blocks=2, width=64, seed=4)
    grown = finetuned(other, 0.1)
    grown[name] = torch.cat([grown[name], torch.zeros(3, 64)])
    found = _found(tmp_path, {"a": BASE, "b": other, "c-grown": grown})
    assert _edges(found) == {("b", "c-grown", "vocabulary")}


def test_updates_that_say_the_same_are_no_star(tmp_path: Path) -> None:
    """Siblings whose updates correlate above the right angle's limit may be chained: none is called the centre."""
    common = finetuned(BASE, 0.2, seed=5)
    models = {f"t{i}": finetuned(common, 0.02, seed=i) for i in range(2)}
    found = _found(tmp_path, {"base": BASE, **models})
    assert len(found.trees) == 1
    assert not found.trees[0].identified


def _like(seed: int, size: float, common: State | None = None, share: float = 0.0) -> State:
    """A finetune of `BASE`, part of whose update is a common one."""
    own = finetuned(BASE, size, seed=seed)
    return own if common is None else {n: own[n] + share * (common[n] - BASE[n]) for n in BASE}


def test_no_edge_is_wrong_and_not_marked(tmp_path: Path) -> None:
    """Stars of unequal, correlated finetunes, with and without their base: what is drawn as sure is true."""
    common = finetuned(BASE, 0.03, seed=99)
    tuned = {f"t{i:02}": _like(i + 1, 0.02 * 1.35**i, common, 0.5 * (i % 3)) for i in range(8)}
    for present in (True, False):
        models = tuned | ({"base": BASE} if present else {})
        found = _found(tmp_path / str(present), models)
        sure = [edge for edge in _edges(found) if edge[2] not in ("unresolved", "unknown")]
        assert all(parent == "base" for parent, _, _ in sure)


def test_siblings_of_an_absent_base_are_unresolved_and_said_to_be_that(tmp_path: Path) -> None:
    (tree,) = _found(tmp_path, {f"t{i}": finetuned(BASE, 0.1, seed=i + 1) for i in range(5)}).trees
    assert {edge.direction for edge in tree.edges} == {"unresolved"}
    assert all(edge.rivals for edge in tree.edges)
    assert not tree.identified
    assert "a common base that is not here" in tree.reason


def test_a_merge_has_its_shares_and_their_intervals(tmp_path: Path) -> None:
    tuned = [finetuned(BASE, 0.2, seed=seed) for seed in (1, 2)]

    def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
        angle = torch.acos((a * b).sum() / a.norm() / b.norm())
        return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)

    merged = {n: slerp(tuned[0][n], tuned[1][n], 0.7) if BASE[n].ndim == 2 else BASE[n] for n in BASE}
    found = _found(tmp_path, {"a": tuned[0], "b": tuned[1], "merge": merged})
    shares = {e.parent: e.share for tree in found.trees for e in tree.edges if e.direction == "merge"}
    for parent, wanted in {"a": 0.3, "b": 0.7}.items():
        share, low, high = shares[parent] or (0.0, 0.0, 0.0)
        assert share == pytest.approx(wanted, abs=0.011)
        assert low <= share <= high
    assert "% of it (" in found.as_text()


def test_names_that_agree_with_other_shapes_are_two_families(tmp_path: Path) -> None:
    small, large = bert_state(blocks=2, width=32), bert_state(blocks=2, width=48)
    models = {"a": small, "b": finetuned(small), "c": large, "d": finetuned(large), "e": bert_state(width=16)}
    found = _found(tmp_path, models)
    assert sorted(sorted(tree.members) for tree in found.trees) == [["a", "b"], ["c", "d"], ["e"]]


def _renamed(state: State) -> State:
    """Of another architecture: no name, role or shape of it is one of the other's."""
    return {f"net.{i}.w": tensor[:48].clone() for i, tensor in enumerate(state.values()) if tensor.ndim == 2}


def test_families_of_several_architectures_in_one_folder_are_each_seen(tmp_path: Path) -> None:
    """The larger family decides nothing about the smaller ones, one of which is of two equal checkpoints."""
    large = {"a": BASE, **{f"a{i}": finetuned(BASE, 0.1, seed=i) for i in range(5)}}
    other = bert_state(blocks=2, width=64, seed=3)
    small = {"b": _renamed(other), "b1": _renamed(finetuned(other, 0.1, seed=7))}
    wide = bert_state(blocks=1, width=96, seed=4)
    models = {**large, **small, "c": wide, "c-again": wide, "d": _renamed(bert_state(blocks=2, width=64, seed=8))}
    found = _found(tmp_path, models)
    assert {frozenset(tree.members) for tree in found.trees} == {
        frozenset(large),
        frozenset(small),
        frozenset({"c", "c-again"}),
        frozenset({"d"}),
    }
    assert all(kinship.error <= 1e-3 for kinship in found.kinships if kinship.related)


def test_finetunes_hang_on_the_original_and_not_on_its_rounded_copy(tmp_path: Path) -> None:
    coarse = {n: v.bfloat16() for n, v in BASE.items()}
    tuned = {f"t{i}": finetuned({n: v.float() for n, v in coarse.items()}, 0.1, seed=i) for i in range(3)}
    found = _found(tmp_path, {"a-coarse": coarse, "base": BASE, **tuned})
    assert {frozenset((parent, child)) for parent, child, _ in _edges(found)} == {
        frozenset(("base", other)) for other in ("a-coarse", *tuned)
    }


def test_another_training_of_the_same_start_is_no_child(tmp_path: Path) -> None:
    """It may be as near to base as a strong finetune, and its update is at right angles to those of the others."""
    start = bert_state(blocks=2, width=64, seed=6)
    base, sibling = (finetuned(start, 0.7, seed=seed) for seed in (10, 11))
    tuned = {f"t{i}": finetuned(base, 0.4, seed=20 + i) for i in range(3)}
    found = _found(tmp_path, {"base": base, "sibling": sibling, **tuned})
    (edge,) = (edge for tree in found.trees for edge in tree.edges if "sibling" in (edge.parent, edge.child))
    assert edge.direction == "unresolved"
    assert "trained from the same start" in edge.doubt
    assert {("base", f"t{i}", "star") for i in range(3)} <= _edges(found)


def test_alignment_is_that_of_matrices_that_moved(tmp_path: Path) -> None:
    """All is frozen but one matrix a block."""
    moved = {n for n in BASE if "intermediate" in n}
    tuned = [{n: W if n in moved else BASE[n] for n, W in finetuned(BASE, 1.0, seed=s).items()} for s in (1, 2)]
    found = _found(tmp_path, {"base": BASE, "x": tuned[0], "y": tuned[1]})
    assert all(0.05 < k.alignment < 0.9 for k in found.kinships)


def test_the_error_rate_of_kinship_holds_over_a_folder(tmp_path: Path) -> None:
    """Sixty trainings of their own with steep spectra and common means: none of 1770 pairs is related."""

    def own(seed: int) -> State:
        heavy = torch.logspace(0, -1.5, 24)
        return {n: W * heavy + 0.2 if W.shape[-1] == 24 else W for n, W in bert_state(1, 24, seed=seed).items()}

    found = _found(tmp_path, {f"m{i}": own(100 + i) for i in range(60)} | {"child": finetuned(own(100), 0.3)})
    related = [k for k in found.kinships if k.related]
    assert [{k.first, k.second} for k in related] == [{"child", "m0"}]
    assert related[0].error <= 1e-3
    assert min(k.error for k in found.kinships if not k.related) > 1e-3


def test_checkpoints_are_found_in_the_folders_of_their_owners(tmp_path: Path) -> None:
    members = [tmp_path / "lone.safetensors", tmp_path / "org" / "a", tmp_path / "org" / "b"]
    for path in (*members[1:], tmp_path / "org" / ".cache"):
        path.mkdir(parents=True)
        write(path / "model.safetensors", BASE)
    write(members[0], BASE)
    assert members_of(tmp_path) == members


def test_what_cannot_be_read_in_a_folder_is_left_out_with_a_note(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", BASE)
    write(tmp_path / "b.safetensors", finetuned(BASE, 0.1))
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    found = lineage(tmp_path)
    assert [tree.members for tree in found.trees] == [("a", "b")]
    assert [note.split(":")[0] for note in found.notes] == ["left out"] * 2
    assert all(name in note for name, note in zip(("empty", "junk"), found.notes, strict=True))
    with pytest.raises(InputError, match="empty"):
        lineage([tmp_path / "a.safetensors", tmp_path / "empty.safetensors"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds 1 checkpoint to be read, want two; left out: .*empty"):
        lineage(tmp_path)


def test_what_is_no_family_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="want at least two"):
        lineage([write(tmp_path / "a.safetensors", BASE)])
    with pytest.raises(InputError, match="holds 1 checkpoint;"):
        members_of(tmp_path)
    other = write(tmp_path / "b.safetensors", {"x.weight": torch.randn(4, 4)})
    with pytest.raises(InputError, match="no matrix in common"):
        lineage([tmp_path / "a.safetensors", other])
