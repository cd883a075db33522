"""`report` and `card` of what a treatment wrote."""

import json
from pathlib import Path

import pytest

from specbasis import extract, merge
from specbasis.checkpoint import open_checkpoint, weights_sha256
from tests.cli.conftest import Run
from tests.pico import bert_state, finetuned, write

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, state = tmp_path_factory.mktemp("treated"), bert_state()
    write(folder / "base.safetensors", state)
    for seed in (1, 2):
        write(folder / f"tuned{seed}.safetensors", finetuned(state, seed=seed))
    base, one, two = (folder / f"{name}.safetensors" for name in ("base", "tuned1", "tuned2"))
    merge(base, {"one": one, "two": two}, folder / "merged", scale=0.7)
    extract(base, one, folder / "delta", form="delta", size=20_000)
    return folder


@pytest.mark.parametrize(("name", "verb"), [("merged", "merge"), ("delta", "extract")])
def test_its_page_and_tables_are_made_again_from_the_record_alone(
    specbasis: Run, place: Path, name: str, verb: str
) -> None:
    folder = place / name
    first = specbasis("report", folder)
    assert first.returncode == 0, first.stderr
    assert f"page: {folder / 'report.html'}" in first.stdout.replace("\n", "")
    assert f"specbasis {verb}" in (folder / "report.html").read_text(encoding="utf-8")
    record = json.loads(specbasis("report", folder, "--json").stdout)
    kept = json.loads((folder / f"specbasis_{verb}.json").read_text(encoding="utf-8"))
    assert record == {"folder": str(folder), **kept}


@pytest.mark.parametrize("words", [["--format", "sarif"], ["--fail-on", "wrong-base"]])
def test_what_is_of_comparisons_is_refused(specbasis: Run, place: Path, words: list[str]) -> None:
    done = specbasis("report", place / "merged", *words)
    assert done.returncode == 2
    assert f"{' '.join(words)} is of comparisons" in " ".join(done.stderr.split())


def test_a_record_that_was_changed_is_refused(specbasis: Run, place: Path, tmp_path: Path) -> None:
    record = tmp_path / "specbasis_merge.json"
    record.write_text((place / "merged" / record.name).read_text().replace('"scale": 0.7', '"scale": 0.8'))
    for verb in ("report", "card"):
        done = specbasis(verb, tmp_path)
        assert done.returncode == 2
        assert "no record of merging" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [record.name]


@pytest.mark.parametrize(
    ("name", "verb", "relation"), [("merged", "merge", "merge"), ("delta", "extract", "finetune")]
)
def test_its_card_says_how_it_was_made_and_of_what(
    specbasis: Run, place: Path, name: str, verb: str, relation: str
) -> None:
    words = ["card", place / name, "--base-model", "org/base"]
    assert specbasis(*words).returncode == 0
    card = place / name / "README.md"
    text = card.read_text(encoding="utf-8")
    sources = ["base", "tuned1", "tuned2"] if name == "merged" else ["base", "tuned1"]
    for source in sources:
        assert weights_sha256(open_checkpoint(place / f"{source}.safetensors")) in text
    assert ("scale 0.7" in text) is (name == "merged")
    heading = "n" if name == "merged" else "matrices"
    assert f"| {heading} |" in text
    assert f"\n{heading}, number of" in text
    data = hub.ModelCard.load(card).data.to_dict()
    assert data == {"base_model": "org/base", "base_model_relation": relation, "tags": ["specbasis", verb]}
    assert specbasis(*words).returncode == 0
    assert card.read_text(encoding="utf-8") == text


def test_a_place_that_is_not_on_the_hub_is_no_base_model(specbasis: Run, place: Path, tmp_path: Path) -> None:
    assert specbasis("card", place / "merged", "--readme", tmp_path / "c.md").returncode == 0
    assert hub.ModelCard.load(tmp_path / "c.md").data.to_dict() == {"tags": ["specbasis", "merge"]}
