"""How pairs are called, how a comparison grows, and that what is asked for in vain is said."""

import re
from pathlib import Path

import pytest
import torch

from specbasis import compare, load
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.lineage.tree import lineage
from tests.pico import bert_state, finetuned, write


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str, str]:
    state = bert_state()
    base = write(tmp_path / "base.safetensors", state)
    first, second = (write(tmp_path / f"m{n}.safetensors", finetuned(state, seed=n)) for n in (1, 2))
    return str(base), str(first), str(second)


def test_a_pair_is_called_what_the_user_calls_it(models: tuple[str, str, str], tmp_path: Path) -> None:
    base, first, second = models
    assert compare(base, [f"sst2={first}", second], ranks=2).pairs == ["sst2", "m2"]
    with pytest.raises(InputError, match="two models are called 'x'"):
        compare(base, [f"x={first}", f"x={second}"], ranks=2)
    odd = write(tmp_path / "a=b.safetensors", bert_state(seed=5))
    assert compare(base, str(odd), ranks=2).pairs == ["a=b"]  # a path that is there is a path
    assert {tree.root for tree in lineage([f"root={base}", first]).trees} <= {"root", "m1"}


def test_a_comparison_grows_on_request_and_its_rows_are_as_if_made_at_once(
    models: tuple[str, str, str], tmp_path: Path
) -> None:
    base, first, second = models
    out = tmp_path / "out"
    compare(base, first, out, ranks=2)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    with pytest.raises(InputError, match=r"made with tuned m1 \(not asked for now\), without tuned m2; .*--add"):
        compare(base, second, out, ranks=2)
    grown = compare(base, second, out, ranks=2, add=True)
    assert grown.pairs == ["m1", "m2"] == load(out).pairs
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}.items()
    assert grown.rows.equals(compare(base, [first, second], ranks=2).rows)
    assert compare(base, [first, second], out, ranks=2).pairs == ["m1", "m2"]
    with pytest.raises(InputError, match=r"made with ranks 2 \(now 3\).*; ask for the same"):
        compare(base, second, out, ranks=3, add=True)
    with pytest.raises(InputError, match="from another tuned m1"):
        compare(base, f"m1={second}", out, ranks=2, add=True)
    with pytest.raises(InputError, match="from another base"):
        compare(second, first, out, ranks=2, add=True)


def test_what_matches_nothing_is_said(models: tuple[str, str, str]) -> None:
    base, first, _ = models
    comparison = compare(base, first, ranks=2, blocks=(0, 9), roles=("ffn", "cross_attention"))
    assert "no matrix here has role cross_attention, block 9" in comparison.manifest["pairs"]["m1"]["notes"]
    with pytest.raises(InputError, match=r"heads = 7, into which no attention matrix can be cut"):
        compare(base, first, ranks=2, heads=7)
    assert compare(base, first, ranks=2, heads=3).pairs == ["m1"]


@pytest.mark.parametrize("inner", [False, True])
def test_a_number_and_a_text_that_are_one_name_are_refused(tmp_path: Path, inner: bool) -> None:
    W = torch.eye(3)
    content = {0: {"w": W}, "0": {"w": 2 * W}} if inner else {0: W, "0": 2 * W}
    torch.save(content, tmp_path / "w.pt")
    for source in (tmp_path / "w.pt", *([f"{tmp_path / 'w.pt'}#0"] if inner else [content])):
        where = "state_dict" if isinstance(source, dict) else str(source)
        with pytest.raises(InputError, match=re.escape(f"{where}: has two keys 0, a number and a text")):
            open_checkpoint(source)
