"""The table of number formats agrees with torch, with safetensors and with itself."""

import pytest
import torch
from safetensors.torch import save

from specbasis.core.dtypes import BY_PRECISION, FORMATS, UNSCALED, by_code, name_of, roundoff


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_the_one_that_torch_and_safetensors_call_so(name: str) -> None:
    form = FORMATS[name]
    assert name_of(form.torch) == name
    assert form.bytes == form.torch.itemsize
    header = save({"x": torch.zeros(2, dtype=form.torch)})[8:].decode(errors="replace")
    assert f'"dtype":"{form.codes[0]}"' in header
    assert {by_code(code) for code in form.codes} == {name}


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].precision])
def test_precision_and_range_are_those_of_torch(name: str) -> None:
    form, info = FORMATS[name], torch.finfo(FORMATS[name].torch)
    # The next number above 1: torch's eps of float8_e5m2fnuz is half of that.
    one = torch.ones(1, dtype=form.torch)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[form.bytes]
    assert form.step == (one.view(bits) + 1).view(form.torch).double().item() - 1
    assert 2.0**form.exponent == info.smallest_normal


def test_unscaled_formats_go_from_coarse_to_fine_and_know_their_rounding() -> None:
    assert [BY_PRECISION[FORMATS[name].precision] for name in UNSCALED] == list(UNSCALED)
    assert sorted(UNSCALED, key=lambda name: FORMATS[name].precision) == list(UNSCALED)
    assert [roundoff(name) for name in ("bfloat16", "float64", "int8", "Q4_K")] == [2.0**-8, 2.0**-53, 0.0, 0.0]


def test_an_unknown_format_keeps_its_own_name() -> None:
    assert by_code("Q4_K") == "q4_k"
