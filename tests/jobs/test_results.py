import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from specbasis.core.errors import InputError
from specbasis.jobs import results


def table(n: int = 1) -> pa.Table:
    row = {"pair": "p", "matrix": "m", "stack": "", "block": 0, "role": "other", "out_features": 1}
    row |= {"in_features": 1, "measure": "rsd", "index": None, "value": 0.5, "bound": None, "resolved": None}
    return pa.Table.from_pylist([row] * n, schema=results.SCHEMA)


def fresh(folder: Path, *matrices: str) -> results.Results:
    with results.create(folder, {"ranks": 1}) as made:
        made.manifest["pairs"] = {"p": {"matrices": list(matrices or ["m"])}}
    return made


def test_what_is_written_is_done_and_read_back(tmp_path: Path) -> None:
    made = fresh(tmp_path / "out")
    assert not made.is_done("p", "m")
    made.write("p", "m", table())
    made.write_manifest()
    assert made.is_done("p", "m")
    assert results.load(tmp_path / "out").rows().equals(table())


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(tmp_path / "out")
    made.write("p", "m", table())

    def full(rows: pa.Table, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(InputError, match="No space left on device"):
        made.write("p", "m", table(3))
    assert made.rows().num_rows == 1
    assert [p for p in (tmp_path / "out").rglob("*") if p.name.endswith(".tmp")] == []


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    """Every flip is either found, or leaves every row as it was (a bit of padding, of a statistic, of a name)."""
    made = fresh(tmp_path / "out")
    made.write("p", "m", table(300))
    part = made.part("p", "m")
    whole, found = part.read_bytes(), 0
    for at in range(len(whole)):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            assert made.read("p", "m").equals(table(300)), at
        except InputError:
            found += 1
    assert found > len(whole) / 3


def other_rows(n: int = 3, **changes: object) -> pa.Table:
    return pa.Table.from_pylist([row | changes for row in table(n).to_pylist()], schema=results.SCHEMA)


@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(lambda path: pq.write_table(pq.read_table(path).slice(1), path), id="a row less"),
        pytest.param(lambda path: pq.write_table(other_rows(value=0.25), path), id="other figures"),
        pytest.param(lambda path: pq.write_table(table(3), path), id="the same rows from elsewhere"),
        pytest.param(lambda path: pq.write_table(pa.table({"x": [1]}), path), id="another schema"),
        pytest.param(
            lambda path: path.write_bytes(path.with_name(other_name(path)).read_bytes()), id="another matrix"
        ),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9]), id="cut"),
    ],
)
def test_a_part_that_is_not_what_was_written_is_not_done_and_is_named(
    tmp_path: Path, replaced: Callable[[Path], None]
) -> None:
    made = fresh(tmp_path / "out", "m", "n")
    made.write("p", "m", table(3))
    made.write("p", "n", other_rows(matrix="n"))
    made.write_manifest()
    part = made.part("p", "m")
    replaced(part)
    assert not made.is_done("p", "m")
    assert made.is_done("p", "n")
    with pytest.raises(InputError, match=rf"{part.name}: is damaged .*run the comparison again"):
        results.load(tmp_path / "out").rows()


def other_name(path: Path) -> str:
    return next(other.name for other in path.parent.iterdir() if other != path)


def test_a_part_of_other_settings_or_weights_is_not_done(tmp_path: Path) -> None:
    """The same names, matrix and rows; what was compared differs."""
    configs = [
        {"ranks": ranks, "tuned": {"p": p, "q": q}}
        for ranks, p, q in ((1, "a", "b"), (2, "a", "b"), (1, "c", "b"), (1, "a", "d"))
    ]
    made = []
    for i, config in enumerate(configs):
        with results.create(tmp_path / str(i), config) as folder:
            made.append(folder)
    made[0].write("p", "m", table())
    for other, accepted in zip(made[1:], (False, False, True), strict=True):  # the last differs in another pair
        other.part("p", "m").parent.mkdir(parents=True)
        other.part("p", "m").write_bytes(made[0].part("p", "m").read_bytes())
        assert other.is_done("p", "m") == accepted


def test_parts_of_versions_before_seals_are_taken_in_a_folder_that_they_began(tmp_path: Path) -> None:
    made = fresh(tmp_path / "out")
    del made.manifest["sealed"]
    made.part("p", "m").parent.mkdir(parents=True)
    pq.write_table(table(2), made.part("p", "m"))
    assert made.is_done("p", "m")
    pq.write_table(other_rows(2, matrix="n"), made.part("p", "m"))
    assert not made.is_done("p", "m")


@given(st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True))
def test_file_names_are_portable_and_differ(texts: list[str]) -> None:
    made = results.Results(Path("out"))
    paths = [made.part("p", text) for text in texts]
    assert len({str(path).lower() for path in paths}) == len(texts)
    for path in paths:
        assert path.parent.parent.parent == Path("out")
        assert path.name.isascii()
        assert len(path.name) < 120


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["/a/x.safetensors"], ["x"]),
        (["/a/x.pt", "/b/x.pt"], ["a/x", "b/x"]),
        (["m/checkpoint-10", "m/checkpoint-20"], ["checkpoint-10", "checkpoint-20"]),
        (["/a/x.pt", "/a/x.pt"], ["/a/x", "/a/x (2)"]),
        pytest.param(
            ["/a/q\\x.pt"], ["q\\x"], marks=pytest.mark.skipif(os.name == "nt", reason="divides paths there")
        ),
        (["pkg:anarcii/models/tcr/tcr_4.pt"], ["tcr_4"]),
    ],
)
def test_labels(names: list[str], labels: list[str]) -> None:
    assert [label.lstrip("/") for label in results.unique_labels(names)] == [label.lstrip("/") for label in labels]


@given(st.lists(st.sampled_from(["/a/x.pt", "/b/x.pt", "/a/x", "x", "/a/y.bin"]), min_size=1, max_size=6))
def test_labels_differ(names: list[str]) -> None:
    assert len(set(results.unique_labels(names))) == len(names)
