"""One grammar for ranges, lists and sizes."""

import pytest

from specbasis.core.errors import InputError
from specbasis.core.grammar import intervals, numbers, parse_bytes, ranges


def test_ranges_single_numbers_and_the_older_spelling() -> None:
    assert ranges("0:30,100,-5:") == (slice(0, 30), 100, slice(-5, None))
    assert ranges(" :3 , 4-6 ,-2") == (slice(None, 3), slice(4, 7), -2)
    assert numbers("0,10-11") == numbers("0,10:12") == (0, 10, 11)
    assert numbers("42,43,44") == (42, 43, 44)
    assert numbers("") == ()
    assert intervals("0:10,10:30") == ((0, 10), (10, 30))
    assert intervals("1-10,11-30", origin=1) == ((0, 10), (10, 30))


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0,,a", "2-1", "3:3", "5:", "-5:", "0-99999999999", "1.5", "٣"])
def test_what_is_no_number_of_a_block(text: str) -> None:
    with pytest.raises(InputError, match=r"--blocks got .*want numbers and ascending ranges"):
        numbers(text, "--blocks")


@pytest.mark.parametrize("text", ["0-10", "0", "a"])
def test_ranks_counted_from_1_have_no_rank_0(text: str) -> None:
    with pytest.raises(InputError, match="--ranks got"):
        intervals(text, "--ranks", origin=1)


def test_sizes() -> None:
    assert (parse_bytes("8GB"), parse_bytes("1.5 GiB"), parse_bytes("500M")) == (8 * 10**9, 3 * 2**29, 5 * 10**8)
