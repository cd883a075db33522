"""What a filter excludes by name is never looked up, and what it admits is what the whole comparison finds."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specbasis.architecture.key import ROLES
from specbasis.architecture.pair import Pairing, pair
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, Entry
from specbasis.comparison.options import Options
from specbasis.core.errors import InputError

from .test_recognition import NEOX, bert_layer, neox_layer, stored
from .test_recorded import recorded

Shapes = dict[str, tuple[int, ...]]


class Shelf(Mapping[str, Entry]):
    """Entries of several files, which notes the files that are contacted."""

    def __init__(self, entries: Mapping[str, Entry], files: Mapping[str, str]) -> None:
        self.entries, self.files = entries, files
        self.contacted: set[str] = set()

    def __getitem__(self, name: str) -> Entry:
        self.contacted.add(self.files[name])
        return self.entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def remote(whole: Checkpoint, cuts: tuple[int, ...] | int) -> tuple[Checkpoint, Shelf]:
    """The same model in files that are contacted when a name of theirs is looked up; cut before these names."""
    names = list(whole)
    cuts = tuple(len(names) * i // cuts for i in range(1, cuts)) if isinstance(cuts, int) else cuts
    files = {name: f"file {sum(i >= cut for cut in cuts)}" for i, name in enumerate(names)}
    shelf = Shelf(whole.entries, files)
    return Checkpoint(whole.source, shelf, (), whole.config, shards=files), shelf


def renamed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    entries = {prefix + name: entry for name, entry in checkpoint.entries.items()}
    return Checkpoint("renamed", entries, (), checkpoint.config)


def deberta() -> Checkpoint:
    shapes: Shapes = {"embeddings.word_embeddings.weight": (40, 12)}
    for n in range(6):
        p = f"encoder.layer.{n}."
        shapes |= {
            p + "attention.self.in_proj.weight": (36, 12), p + "attention.self.pos_proj.weight": (12, 12),
            p + "attention.self.q_bias": (12,), p + "attention.output.dense.weight": (12, 12),
            p + "intermediate.dense.weight": (20, 12), p + "output.dense.weight": (12, 20),
        }  # fmt: skip
    return stored(shapes, {"num_attention_heads": 3, "hidden_size": 12})


def llama_with_experts() -> Checkpoint:
    shapes: Shapes = {"model.embed_tokens.weight": (40, 12)}
    for n in range(4):
        p = f"model.layers.{n}."
        shapes |= {f"{p}self_attn.{x}_proj.weight": (12 if x in "qo" else 6, 12) for x in "qkvo"}
        shapes |= {p + "mlp.experts.gate_up_proj": (3, 12, 20), p + "mlp.experts.down_proj": (3, 10, 12)}
        shapes |= {p + "input_layernorm.weight": (12,), p + "mlp.gate.weight": (3, 12)}
    return stored(shapes | {"lm_head.weight": (40, 12)})


def towers() -> Checkpoint:
    """Two stacks of the same names and of different depth and width."""
    text = {"text_encoder." + name: shape for n in range(2) for name, shape in bert_layer(f"layer.{n}.").items()}
    image = {
        "image_encoder." + name: shape for n in range(4) for name, shape in bert_layer(f"layer.{n}.", 6).items()
    }
    return stored(text | image)


def berts(blocks: int = 6) -> Checkpoint:
    shapes: Shapes = {"bert.embeddings.word_embeddings.weight": (30, 8)}
    for n in range(blocks):
        shapes |= bert_layer(f"bert.encoder.layer.{n}.") | {f"bert.encoder.layer.{n}.output.dense.bias": (8,)}
    return stored(shapes | {"bert.pooler.dense.weight": (8, 8), "extra.table": (5, 8)})


def neox() -> Checkpoint:
    shapes = {name: shape for n in range(8) for name, shape in neox_layer(n).items()}
    return stored(shapes | {"gpt_neox.embed_in.weight": (40, 12), "embed_out.weight": (40, 12)}, NEOX)


def gpt2(transposed: bool) -> Checkpoint:
    shapes: Shapes = {"wte.weight": (40, 12), "wpe.weight": (8, 12)}
    for n in range(4):
        block = {"attn.c_attn": (36, 12), "attn.c_proj": (12, 12), "mlp.c_fc": (48, 12), "mlp.c_proj": (12, 48)}
        shapes |= {f"h.{n}.{k}.weight": s[::-1] if transposed else s for k, s in block.items()}
    return stored(shapes)


def swin() -> Checkpoint:
    return recorded("timm", "swin_base_patch4_window7_224")


MODELS = {
    "bert": berts, "deberta": deberta, "experts": llama_with_experts, "towers": towers, "neox": neox,
    "gpt2": lambda: gpt2(True), "gpt2 linear": lambda: gpt2(False), "swin": swin,
    "labram": lambda: recorded("published", "LaBraM finetuned"),
    "unknown": lambda: stored({f"net.{n}.w{i}.weight": (4 + i, 5) for n in range(4) for i in range(3)}),
}  # fmt: skip


@cache
def model(name: str) -> Checkpoint:
    """A model whose embedding and head are tied where their shapes agree, as every entry reads the same."""
    return MODELS[name]()


@cache
def whole(name: str, prefix: str) -> Pairing:
    return pair(model(name), renamed(model(name), prefix))


def names(pairing: Pairing) -> list[tuple[object, ...]]:
    return [(m.key, m.base, m.tuned) for m in pairing.matched]


PATTERNS = [
    "",
    "*.1.*",
    "*.2.attn*",
    "*query*",
    "*[[]key]",
    "*experts*[[]1]*",
    "*dense.weight",
    "net.?.w1*",
    "*head*",
]
FILTERS = st.fixed_dictionaries(
    {
        "roles": st.lists(st.sampled_from([*ROLES, "attention", "ffn"]), max_size=2).map(tuple),
        "blocks": st.lists(st.integers(0, 11), max_size=2).map(tuple),
        "name": st.sampled_from(PATTERNS),
    }
)


@given(st.sampled_from(sorted(MODELS)), FILTERS, st.sampled_from(["", "wrapped.net."]), st.integers(2, 9))
def test_a_filter_gives_what_the_whole_comparison_gives_there(
    name: str, wanted: dict[str, Any], prefix: str, files: int
) -> None:
    options = Options(**wanted)
    base, tuned = model(name), renamed(model(name), prefix)
    full = whole(name, prefix)
    want = [(m.key, m.base, m.tuned) for m in full.matched if options.admits(m.key)]
    here = pair(base, tuned, admits=options.filter)
    assert names(here) == want
    assert here.family == full.family
    assert set(here.skipped) <= set(full.skipped)
    for item in full.skipped:
        if "tied weights" in item.reason and item not in here.skipped:
            (ref,) = (r for r in model_map(base).shared if r.key.name == item.name)
            assert not options.admits(ref.key)
    # On the Hub the same, except that ties with what is not read stay unknown.
    far, shelf = remote(base, files)
    far_tuned, tuned_shelf = remote(tuned, files)
    found = pair(far, far_tuned, admits=options.filter)
    untold = any("may hold the same values" in note for note in found.notes)
    assert [m for m in names(found) if not untold or m in want] == want
    if found.matched and not {"other", "conv"} & set(options.roles or ("other",)):
        admitted = {m.base.parameter for m in found.matched} | {i.name for i in found.skipped}
        blocks = {m.key.block for m in found.matched} - {None}
        beside = {r.parameter for r in model_map(base).matrices if r.key.block in blocks}
        expected = {shelf.files[n] for n in {*admitted, *beside} if n in shelf.files}
        # GPT-2 is recognised by the shapes of two matrices, whose files may be others.
        assert len(shelf.contacted - expected) <= 2 * name.startswith("gpt2")
        assert tuned_shelf.contacted <= {tuned_shelf.files[m.tuned.parameter] for m in found.matched}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", Options(roles=("attention",), blocks=(4,))),
        ("bert", Options(roles=("ffn.up",), blocks=(1,))),
        ("bert", Options(roles=("embedding",))),
        ("bert", Options(roles=("head",))),
        ("bert", Options(name="*layer.5.attention.self.key*")),
        ("deberta", Options(blocks=(1,), name="*[[]value]")),
        ("experts", Options(blocks=(2,), roles=("ffn",))),
        ("experts", Options(name="*layers.3.*[[]2][[]gate]")),
        ("neox", Options(blocks=(3,), roles=("attention.query",))),
        ("gpt2", Options(blocks=(3,), roles=("attention.query",))),
        ("gpt2 linear", Options(blocks=(3,), roles=("ffn",))),
        ("swin", Options(blocks=(7,))),
        ("swin", Options(blocks=(0,), roles=("attention.output",))),
        ("towers", Options(blocks=(3,))),
        ("unknown", Options(blocks=(2,))),
    ],
)
@pytest.mark.parametrize("prefix", ["", "wrapped."])
def test_only_files_with_wanted_matrices_are_contacted(name: str, options: Options, prefix: str) -> None:
    for files in (3, 4):
        base, shelf = remote(model(name), files)
        tuned, tuned_shelf = remote(renamed(model(name), prefix), files)
        found = pair(base, tuned, admits=options.filter)
        assert names(found) == [m for m in names(whole(name, prefix)) if options.admits(m[0])]  # type: ignore[arg-type]
        assert found.matched
        assert shelf.contacted == {shelf.files[m.base.parameter] for m in found.matched}
        assert tuned_shelf.contacted == {tuned_shelf.files[m.tuned.parameter] for m in found.matched}


def straddling(last_down: tuple[int, int]) -> Checkpoint:
    """Three blocks in file 0, but the reader of the third block's ffn.up in file 1."""
    shapes = {name: shape for n in range(3) for name, shape in bert_layer(f"encoder.layer.{n}.").items()}
    return stored(shapes | {"encoder.layer.2.output.dense.weight": last_down})


def test_a_neighbour_in_another_file_is_checked_on_the_blocks_at_hand() -> None:
    base, shelf = remote(straddling((8, 24)), (17,))
    (up,) = model_map(base, admits=Options(roles=("ffn.up",), blocks=(2,)).filter).matrices
    assert (up.key.role, up.shape, shelf.contacted) == ("ffn.up", (24, 8), {"file 0"})


def test_a_role_that_nothing_at_hand_confirms_costs_a_header() -> None:
    # Each block in its own file but for the reader of ffn.up: a gated feed-forward layer must not pass as ffn.up.
    shapes = bert_layer("encoder.layer.0.") | {"encoder.layer.0.output.dense.weight": (8, 12)}
    base, shelf = remote(stored(shapes), (5,))
    mapped = model_map(base, admits=Options(roles=("ffn.up",)).filter)
    assert not mapped.matrices
    assert shelf.contacted == {"file 0", "file 1"}
    assert mapped.unnamed == ("encoder.layer.0.intermediate.dense.weight",)
    assert any("have the role other" in note for note in mapped.notes)


def test_what_is_not_asked_for_is_not_listed() -> None:
    base = berts(3)
    tuned = renamed(base, "")
    tuned = Checkpoint("tuned", {**tuned.entries, "classifier.weight": Entry((3, 8), "float32", torch.empty)})
    everything = pair(base, tuned)
    assert {"extra.table", "classifier.weight"} <= {m.key.name for m in everything.matched} | {
        s.name for s in everything.skipped
    }
    assert [s.name for s in pair(base, tuned, admits=Options(roles=("head",)).filter).skipped] == [
        "classifier.weight"
    ]
    assert not pair(base, tuned, admits=Options(roles=("ffn",)).filter).skipped
    assert not any("hold no matrix" in n for n in pair(base, tuned, admits=Options(blocks=(2,)).filter).notes)


def test_ties_with_what_is_not_read_are_said_to_be_unknown() -> None:
    tied = llama_with_experts()
    head = Options(roles=("head",)).filter
    assert not model_map(tied, admits=head).matrices
    assert model_map(tied, admits=head).skipped[0].reason.startswith("holds the values of model.embed_tokens")
    far, shelf = remote(tied, 3)
    mapped = model_map(far, admits=head)
    assert [ref.key.name for ref in mapped.matrices] == ["lm_head.weight"]
    assert any("lm_head.weight may hold the same values as model.embed_tokens.weight" in n for n in mapped.notes)
    assert shelf.contacted == {"file 2"}


def test_shapes_decide_between_towers_that_names_do_not_tell_apart() -> None:
    both = towers()
    for stack in ("text_encoder.", "image_encoder."):
        part = {name.removeprefix(stack): e for name, e in both.entries.items() if name.startswith(stack)}
        # As many blocks as both towers have: names alone fit either.
        part = {name: e for name, e in part.items() if name.startswith(("layer.0.", "layer.1."))}
        far, _ = remote(both, 4)
        for options in (Options(roles=("attention.query",)), Options(roles=("ffn",), blocks=(0,))):
            found = pair(far, Checkpoint("part", part), admits=options.filter)
            assert found.matched
            assert all(m.base.parameter == stack + m.tuned.parameter for m in found.matched)


def test_nothing_in_common_is_told_from_names() -> None:
    base, shelf = remote(berts(), 3)
    with pytest.raises(InputError, match="no parameter in common"):
        pair(base, stored({"a.b": (5, 5)}), admits=Options(roles=("embedding",)).filter)
    assert shelf.contacted == {"file 0"}
    # The last components agree, and the shapes do not.
    with pytest.raises(InputError, match="no parameter in common"):
        pair(base, stored({"a.weight": (5, 5)}), admits=Options(roles=("head",)).filter)
