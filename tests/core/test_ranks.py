"""Which ranks are meant by what a person writes."""

import pytest

from specbasis.core.errors import InputError
from specbasis.core.ranks import rank_set


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (3, [0, 1, 2]),
        (-2, [6, 7]),
        ("3", [0, 1, 2]),
        ("-2", [6, 7]),
        ("all", list(range(8))),
        ("2:4", [2, 3]),
        ("6:30", [6, 7]),
        ("0:2,5,-1:", [0, 1, 5, 7]),
        ("0:2,-1", [0, 1, 7]),
        (":3", [0, 1, 2]),
        (range(2, 5), [2, 3, 4]),
        ([5, 1, 5, 20], [1, 5]),
        ([], []),
    ],
)
def test_ranks_of_a_matrix_that_has_eight(ranks, expected):
    assert rank_set(ranks, 8).tolist() == expected


@pytest.mark.parametrize("ranks", ["8:9", [8], "20:30,9"])
def test_no_rank_is_left(ranks):
    with pytest.raises(InputError, match="the ranks 0 … 7"):
        rank_set(ranks, 8)


@pytest.mark.parametrize("text", ["many", "5:5", "", "1.5"])
def test_text_that_is_no_ranks(text):
    with pytest.raises(InputError, match=r"got ranks .* want n"):
        rank_set(text, 8)
