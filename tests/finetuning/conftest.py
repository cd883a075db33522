"""A pico base and a small task, for whoever trains."""

import pytest

from tests.finetuning import lab


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lab")
    lab.pico_bert(place / "base", sentence_encoder=True)
    lab.glue(place / "glue", train=64, dev=21)
    return place
