import sys
from collections import Counter
from pathlib import Path

import pytest

from specbasis import InputError, cli
from specbasis.paper import zoo as recipe
from specbasis.paper.zoo import Zoo, ZooPair, run_zoo, zoo
from tests.pico import bert_state, finetuned, write


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


def test_a_run_compares_what_it_can_and_reports_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bert_state()
    a, b = write(tmp_path / "a.safetensors", base), write(tmp_path / "b.safetensors", finetuned(base))
    pairs = (
        ZooPair("one", str(a), str(b), "task", 90.0, "Tab. 2", "vision"),
        ZooPair("gone", str(a), str(tmp_path / "nothing.pt"), "task", None, "Tab. 3", "language"),
        ZooPair("unpublished", "", "", "task", None, "App. A.2", "EEG", ("Its authors keep it.",)),
    )
    monkeypatch.setattr(recipe, "zoo", lambda: Zoo(pairs, ()))
    found = {pair.name: outcome for pair, outcome in run_zoo(tmp_path / "out", ranks=3)}
    assert found["one"].verdicts["b"].kind == "finetuned"
    assert "no such file" in str(found["gone"])
    assert "keep it" in str(found["unpublished"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]
    assert [pair.name for pair, _ in run_zoo(tmp_path / "out", ["vis*"], ranks=3)] == ["one"]
    with pytest.raises(InputError, match="no pair of the zoo matches nonsense"):
        list(run_zoo(tmp_path / "out", ["nonsense"]))

    arguments = ["specbasis", "zoo", "run", "--out", str(tmp_path / "out"), "--ranks", "3", "--no-report"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = capsys.readouterr()
    assert "2 pairs could not be compared" in shown.out
    assert shown.err.count("error: ") == 2


def test_the_list_names_every_pair(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["specbasis", "zoo"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert all(pair.name in shown for pair in zoo().pairs)
