"""Names of two models are aligned where one of them adds a prefix, and never by dropping a block's number."""

import pytest

from specbasis.checkpoint.names import alignments, bare_name, namesakes, spelled

BODY = {f"encoder.layer.{n}.{part}.weight": (4 + i, 8) for n in range(3) for i, part in enumerate(("query", "key"))}


def prefixed(prefix: str, names: dict[str, tuple[int, int]] = BODY) -> dict[str, tuple[int, int]]:
    return {prefix + name: shape for name, shape in names.items()}


@pytest.mark.parametrize(("mine", "other"), [("", ""), ("bert.", ""), ("", "bert."), ("model.", "net.bert.")])
def test_the_prefixes_that_make_all_names_agree_are_found(mine: str, other: str) -> None:
    agreeing, ways = alignments(prefixed(mine), prefixed(other))
    assert agreeing == len(BODY)
    assert ways[0] == (mine, other)


def test_ways_that_give_the_same_partners_are_one() -> None:
    assert alignments(prefixed("bert."), prefixed("bert.")) == (len(BODY), [("", "")])


def test_two_towers_of_one_shape_are_two_ways_and_sizes_tell_towers_apart() -> None:
    towers = prefixed("text.") | prefixed("image.")
    assert alignments(towers, BODY)[1] == [("text.", ""), ("image.", "")]
    smaller = {name: (rows, 6) for name, (rows, _) in BODY.items()}
    assert alignments(prefixed("text.") | prefixed("image.", smaller), BODY)[1] == [("text.", "")]


def test_blocks_are_never_aligned_with_other_blocks() -> None:
    ours = {f"layers.3.{part}": (4, 4) for part in ("q", "k")}
    theirs = {f"layers.5.{part}": (4, 4) for part in ("q", "k")}
    assert alignments(ours, theirs) == (0, [])


def test_nothing_in_common_is_no_way() -> None:
    assert alignments({"a.b": (1,)}, {"c.d": (1,)}) == (0, [])
    assert alignments({}, {}) == (0, [])


def test_one_shape_in_common_aligns_nothing() -> None:
    """Two prefixes that leave one word, or few names of many, are no alignment; one that leaves most names is."""
    assert alignments({"embed.weight": (8, 4)}, {"head.weight": (8, 4)}) == (0, [])
    assert alignments({"a.b.embed.weight": (8, 4)}, {"c.head.weight": (8, 4)}) == (0, [])
    ours = {"a.proj.weight": (8, 4), "a.in.weight": (3, 4), "a.out.weight": (5, 4)}
    theirs = {"b.proj.weight": (8, 4), "b.up.weight": (3, 4), "b.down.weight": (5, 4)}
    assert alignments(ours, theirs) == (0, [])
    theirs |= {"b.in.weight": (3, 4)}
    assert alignments(ours, theirs) == (2, [("a.", "b.")])
    assert alignments({"weight": (8, 4)}, {"head.weight": (8, 4)})[0] == 1  # a module of the other, by itself


def test_what_wrappers_insert_is_left_out() -> None:
    assert bare_name("module._orig_mod.encoder._fsdp_wrapped_module.layer.weight") == "encoder.layer.weight"


def test_namesakes_differ_in_leading_components_alone() -> None:
    names = ["bert.h.0.query", "h.0.query", "other.0.query", "h.10.query"]
    assert namesakes("h.0.query", names) == ["h.0.query"]
    assert namesakes("model.bert.h.0.query", names) == ["bert.h.0.query", "h.0.query"]
    assert namesakes("0.query", names) == ["bert.h.0.query", "h.0.query", "other.0.query"]


def test_names_that_agree_need_no_alignment_and_a_module_is_no_prefix() -> None:
    ours = {f"net.{i}.weight": 1 for i in range(6)} | {"head.weight": 2, "encoder.head.weight": 2}
    assert alignments(ours, dict(ours)) == (8, [("", "")])
    # "weight" alone is no name: fc.weight is not proj.weight without their modules.
    assert alignments({"fc.weight": 1, "a.b.weight": 2}, {"weight": 1, "x.y.weight": 3})[0] == 0
    # Many agree as they are; more would without one of two prefixes, which are in doubt.
    stacks = {f"{stack}.layers.{i}.w.weight": 1 for stack in ("a", "b") for i in range(9)}
    theirs = {f"layers.{i}.w.weight": 1 for i in range(9)} | {"embed.w.weight": 3, "out.w.weight": 4}
    ours = stacks | {"embed.w.weight": 3, "out.w.weight": 4}
    assert alignments(ours, theirs)[1] == [("", "")]


def test_separators_are_one() -> None:
    assert {spelled(name) for name in ("layer_0/weight", "layer.0.weight", "layer 0 weight")} == {"layer.0.weight"}
