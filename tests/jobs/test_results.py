import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbasis.core.errors import InputError
from specbasis.jobs import results


def table(n: int = 1) -> pa.Table:
    row = {"pair": "p", "matrix": "m", "stack": "", "block": 0, "role": "other", "out_features": 1}
    row |= {"in_features": 1, "measure": "rsd", "index": None, "value": 0.5, "bound": None, "resolved": None}
    return pa.Table.from_pylist([row] * n, schema=results.SCHEMA)


def fresh(folder: Path) -> results.Results:
    with results.create(folder, {"ranks": 1}) as made:
        made.manifest["pairs"] = {"p": {"matrices": ["m"]}}
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


def test_damage_inside_a_part_names_the_file_to_delete(tmp_path: Path) -> None:
    made = fresh(tmp_path / "out")
    made.write("p", "m", table(1000))
    part = made.part("p", "m")
    whole = bytearray(part.read_bytes())
    whole[4:40] = bytes(36)  # the footer, by which a part counts as done, stays
    part.write_bytes(whole)
    assert made.is_done("p", "m")
    with pytest.raises(InputError, match=rf"{part.name}: is damaged .*delete this file"):
        made.rows()


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
        (["pkg:anarcii/models/tcr/tcr_4.pt"], ["tcr_4"]),
    ],
)
def test_labels(names: list[str], labels: list[str]) -> None:
    assert [label.lstrip("/") for label in results.unique_labels(names)] == [label.lstrip("/") for label in labels]


@given(st.lists(st.sampled_from(["/a/x.pt", "/b/x.pt", "/a/x", "x", "/a/y.bin"]), min_size=1, max_size=6))
def test_labels_differ(names: list[str]) -> None:
    assert len(set(results.unique_labels(names))) == len(names)
