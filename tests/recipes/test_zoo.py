from collections import Counter

from specbasis.recipes.zoo import zoo


def test_the_tables_are_whole() -> None:
    pairs = zoo().pairs
    assert Counter(pair.table for pair in pairs) == {"Tab. 2": 14, "Tab. 3": 18, "App. A.2": 3}
    assert len({pair.name for pair in pairs}) == len(pairs)
    assert [pair.name for pair in pairs if not pair.obtainable] == [
        "LaBraM-Base",
        "BrainLM-Base",
        "Brain-JEPA-Base",
    ]


def test_rows_are_as_printed() -> None:
    found = {pair.tuned: pair for pair in zoo().pairs}
    # First, last and odd rows of each table, typed from the paper.
    nano = found["timm:convnext_nano.in12k_ft_in1k"]
    assert (nano.base, nano.task, nano.accuracy) == ("timm:convnext_nano.in12k", "ImageNet-1K", 87.86)
    swin = found["timm:swin_large_patch4_window7_224.ms_in22k_ft_in1k"]
    assert (swin.base, swin.accuracy) == ("timm:swin_large_patch4_window7_224.ms_in22k", 86.30)
    assert found["ishan/bert-base-uncased-mnli"].base == "google-bert/bert-base-uncased"
    electra = found["howey/electra-base-mnli"]
    assert (electra.base, electra.task, electra.accuracy) == ("google/electra-base-discriminator", "MNLI", 82.20)
    xlnet = found["vish88/xlnet-base-mnli-finetuned"]
    assert xlnet.base == "xlnet/xlnet-base-cased"
    assert "without an organisation" in xlnet.notes[0]


def test_every_base_is_the_tuned_models_own() -> None:
    """timm's names of a pair share the architecture; a slip between two rows of the table would break this."""
    for pair in zoo().pairs:
        if pair.table == "Tab. 2":
            assert pair.tuned == pair.base + "_ft_in1k"
            assert pair.accuracy is not None
            assert 80 < pair.accuracy < 95


def test_inconsistencies_are_told() -> None:
    assert any("SciBERT" in note for note in zoo().notes)
    assert any("CNX-Large (CLIP)" in note for note in zoo().notes)
