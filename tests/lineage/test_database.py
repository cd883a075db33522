"""A database is one file that people pass on."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from specbasis.core.errors import InputError
from specbasis.lineage.database import chosen, is_database, read, write
from specbasis.lineage.fingerprint import Fingerprint, fingerprint
from tests.pico import bert_state


def _model(name: str, seed: int = 0) -> Fingerprint:
    return fingerprint(bert_state(seed=seed)).named(name, base=True)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    models = [_model("one"), _model("two", 1)]
    assert write(file, models) == 2
    assert is_database(file)
    for kept, given in zip(read(file), models, strict=True):
        assert kept.header == json.loads(json.dumps(given.header))
        assert np.array_equal(kept.values, given.values, equal_nan=True)
    assert [m.name for m in chosen(file, ["two"])] == ["two"]
    assert write(file, [*read(file), _model("one")]) == 2


def test_two_models_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'one'.*--name"):
        write(tmp_path / "a.parquet", [_model("one"), _model("one", 1)])
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize(
    "what", ["values", "name", "no seal", "other columns", "cut off", "no file", "text", "newer"]
)
def test_what_is_not_what_was_written_is_one_line(tmp_path: Path, what: str) -> None:
    file = tmp_path / "a.parquet"
    model = _model("one")
    header, values = dict(model.header), model.values.copy()
    if what == "values":
        values[0, 0] += 1
    elif what == "name":
        header["name"] = "two"
    elif what == "no seal":
        del header["sha256"]
    elif what == "newer":
        header["version"] = 2
    write(file, [Fingerprint(header, values)])
    if what == "other columns":
        pq.write_table(pa.table({"a": [1]}), file)
    elif what == "cut off":
        file.write_bytes(file.read_bytes()[:-20])
    elif what == "text":
        file.write_text("PAR1 hello")
    elif what == "no file":
        file.unlink()
    with pytest.raises(InputError) as error:
        list(read(file))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_guessed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [_model("minilm")])
    with pytest.raises(InputError, match="did you mean minilm"):
        chosen(tmp_path / "a.parquet", ["minilmm"])


def test_a_model_is_no_database(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    assert not is_database(tmp_path / "a.pt")
    assert not is_database("hub:org/name")
