"""What is kept of a model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from specbasis.checkpoint.entry import Checkpoint, Entry
from specbasis.core.errors import InputError
from specbasis.lineage import fingerprint as module
from specbasis.lineage.fingerprint import BAND, base_models, fingerprint, height, places, rows_of
from specbasis.lineage.which_base import which_base
from tests.checkpoint.hub_server import COMMIT
from tests.checkpoint.test_hub import hub, running  # noqa: F401 - fixtures
from tests.pico import bert_state, write


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 64), (300, 5), (5, 300), (30522, 384), (4096, 11008)])
def test_places_lie_inside_and_meet_no_line_of_the_longer_side_twice(shape: tuple[int, int]) -> None:
    start, stop = rows_of(shape)
    rows, columns = places(shape, 512)
    assert 0 <= start < stop <= shape[0]
    assert (stop - start) * shape[1] <= max(BAND, shape[1])
    assert (rows < stop - start).all()
    assert (columns < shape[1]).all()
    longer = rows if stop - start > shape[1] else columns
    assert len(set(longer.tolist())) == len(longer) == min(512, max(stop - start, shape[1]))
    fewer = places(shape, 100)
    assert (fewer[0] == rows[:100]).all()
    assert (fewer[1] == columns[:100]).all()


def test_places_are_those_of_every_year() -> None:
    """They stand in databases that people passed on: no version of numpy, and no edit, may move them."""
    rows, columns = places((384, 384), 512)
    assert rows_of((30522, 384)) == (7389, 8071)
    assert rows[:4].tolist() == [62, 126, 7, 225]
    assert columns[:4].tolist() == [77, 176, 86, 140]


def test_a_vocabulary_that_grows_keeps_its_places() -> None:
    for out in (30522, 30523, 32000):
        assert rows_of((out, 384)) == rows_of((30522, 384))
    assert [height(out) for out in (1, 2, 3, 137, 128)] == [1, 2, 2, 128, 128]


def test_it_holds_the_entries_their_means_and_the_ordered_lists() -> None:
    W = torch.randn(200, 90, generator=torch.Generator().manual_seed(0)).double()
    found = fingerprint({"w.weight": W.float()})
    W = W.float().double().numpy()
    start, stop = rows_of((200, 90))
    band = W[start:stop]
    rows, columns = places((200, 90), 512)
    assert np.allclose(found.entries[0, : len(rows)], band[rows, columns], rtol=1e-6, atol=0)
    means = band.mean(1)[rows] + band.mean(0)[columns] - band.mean()
    roots = found.roots[0, : len(rows)]
    assert np.allclose(roots * np.abs(roots), band[rows, columns] - means, atol=1e-6)
    assert np.isnan(found.entries[0, len(rows) :]).all()
    q = found.header["orders"]
    lists = [
        np.linalg.svd(W, compute_uv=False),
        *(np.linalg.norm(W, axis=axis) for axis in (1, 0)),
        *((W**4).sum(axis) ** 0.25 / np.linalg.norm(W, axis=axis) for axis in (1, 0)),
    ]
    for kept, numbers in zip(found.orders[0], lists, strict=True):
        ordered = np.sort(numbers)[::-1]
        assert np.allclose(kept[: q // 2], ordered[: q // 2], rtol=1e-5)
        assert np.allclose(kept[[q // 2, q - 1]], ordered[[q // 2, -1]], rtol=1e-5)
    assert math.isclose(found.values[0, -1], math.sqrt(np.square(W).mean()), rel_tol=1e-5)


def test_many_matrices_still_fit_into_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.LARGEST < 1_500_000
    monkeypatch.setattr(module, "LARGEST", 145_000)  # a tenth, for a tenth of the matrices
    for blocks in (2, 4, 13, 40):
        found = fingerprint(bert_state(blocks=blocks, width=4))
        assert found.values.nbytes <= 145_000
        assert len(found.layout.labels) == len(found.values)
    assert found.header["entries"] < 512


def test_of_what_is_streamed_only_bands_are_read_once_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND", 2**10)
    g = torch.Generator().manual_seed(1)
    state = {f"layer.{i}.weight": torch.randn(128, 64, generator=g) for i in range(3)}
    state["small.weight"] = torch.randn(16, 64, generator=g)
    read = []

    def entry(name: str, W: torch.Tensor) -> Entry:
        def part(start: int, stop: int) -> torch.Tensor:
            read.append((name, 4 * (stop - start)))
            return W.flatten()[start:stop]

        def whole() -> torch.Tensor:
            read.append((name, 4 * W.numel()))
            return W

        return Entry(tuple(W.shape), "float32", whole, part=part)

    streamed = Checkpoint("model", {name: entry(name, W) for name, W in state.items()}, digests={"a": "sha256:0"})
    found = fingerprint(streamed, budget=3 * 4 * 2**10 + 4 * 2**10 + 100)
    assert sum(size for _, size in read) <= 4 * 4 * 2**10
    assert dict(read)["small.weight"] == 4 * 16 * 64
    local = fingerprint(state)
    assert np.array_equal(found.part(0), local.part(0), equal_nan=True)
    assert np.array_equal(found.part(1), local.part(1), equal_nan=True)
    assert [bool(matrix[6]) for matrix in found.header["matrices"]] == [name == "small.weight" for name in state]
    assert np.isnan(found.orders[0]).all()


def test_what_lies_beside_is_digested_and_the_card_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", bert_state())
    assert fingerprint(tmp_path).header["tokenizer"] == ""
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: org/name\n---\n# Title\nbase_model: no\n")
    found = fingerprint(tmp_path)
    assert len(found.header["tokenizer"]) == 64
    assert found.header["card"] == ["org/name"]


@pytest.mark.parametrize(
    ("front", "bases"),
    [
        ("base_model: org/name-1.5_b", ["org/name-1.5_b"]),
        ('base_model: "org/name"', ["org/name"]),
        ("base_model: [a/b, 'c/d']", ["a/b", "c/d"]),
        ("base_model:\n- a/b\n- c/d\ntags:\n- e", ["a/b", "c/d"]),
        ("base_model:\n  - a/b\nbase_model_relation: merge", ["a/b"]),
        ("tags: [x]", []),
    ],
)
def test_a_card_names_its_bases_in_any_of_yaml_s_ways(front: str, bases: list[str]) -> None:
    assert base_models(f"---\n{front}\nlicense: mit\n---\ntext\n") == bases


def test_bad_models_are_one_line() -> None:
    with pytest.raises(InputError, match="no matrix"):
        fingerprint({"bias": torch.zeros(3)})
    with pytest.raises(InputError, match=r"w\.weight has NaN or Inf"):
        fingerprint({"w.weight": torch.full((8, 8), math.nan)})


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_meets_the_fingerprint_of_its_model_by_roles(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    g = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (64, 64)}
    shapes = {f"self_attn.{n}": s for n, s in shapes.items()}
    shapes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    model, stored = {}, []
    for block in range(2):
        for (name, shape), short in zip(shapes.items(), names, strict=True):
            model[f"model.layers.{block}.{name}.weight"] = W = torch.randn(shape, generator=g)
            stored.append((f"blk.{block}.{short}.weight", W.numpy()))
    model["model.embed_tokens.weight"] = W = torch.randn(100, 64, generator=g)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    code = getattr(gguf.GGMLQuantizationType, kind)
    for name, array in [("token_embd.weight", W.numpy()), *reversed(stored)]:
        writer.add_tensor(name, gguf.quants.quantize(array, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answer = which_base(fingerprint(tmp_path / "m.gguf"), [fingerprint(model).named("model", base=True)])
    assert answer.kind == "copy", answer.sentence
    assert ("quantised" if kind != "F16" else "rounded to float16") in answer.sentence
    assert "100% of it" in answer.sentence


def test_from_the_hub_nothing_but_bands_comes(hub: Any) -> None:  # noqa: F811 - the fixture
    """Over a server: a model whose matrices are larger than their bands, and a budget that allows no more."""
    g = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(8192, 64, generator=g).half() for i in range(3)}
    hub.repositories["org/large"] = {"model.safetensors": save(state), "config.json": b"{}"}
    found = fingerprint("hub:org/large", budget=1)
    ranges = [
        seen.range.removeprefix("bytes=").split("-") for seen in hub.seen if seen.host == "files" and seen.range
    ]
    read = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert read < 3 * 2 * BAND + 2**17
    local = fingerprint(state)
    assert np.array_equal(found.part(0), local.part(0), equal_nan=True)
    assert found.header["revision"] == COMMIT
    assert which_base(found, [local.named("local", base=True)]).kind == "identical"


def test_what_the_hub_has_in_an_old_format_is_downloaded(hub: Any, tmp_path: Path) -> None:  # noqa: F811
    torch.save(bert_state(), tmp_path / "m.bin")
    content = (tmp_path / "m.bin").read_bytes()
    hub.repositories["org/old"] = {"pytorch_model.bin": content, "config.json": b"{}"}
    assert len(fingerprint("hub:org/old").layout.labels) == len(fingerprint(tmp_path / "m.bin").layout.labels)
