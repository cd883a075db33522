"""`card`: the section that a comparison or an adapter comes to, and what cannot be one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import specbasis as library
from specbasis.comparison.comparison import Comparison
from specbasis.figures.documents import section
from tests.cli.conftest import Run
from tests.pico import bert_state, finetuned, write

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    state = bert_state()
    write(folder / "base.safetensors", state)
    write(folder / "tuned.safetensors", finetuned(state))
    write(folder / "other.safetensors", bert_state(seed=1))
    library.compare(
        folder / "base.safetensors",
        [folder / "tuned.safetensors", folder / "other.safetensors"],
        folder / "results",
        quick=True,
    )
    return folder


def test_the_section_says_what_the_comparison_does(specbasis: Run, place: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    words = ["card", place / "results", "--pair", "tuned", "--readme", card, "--base-model", "org/base"]
    assert specbasis(*words).returncode == 0
    text, comparison = card.read_text(encoding="utf-8"), library.load(place / "results")
    assert "license: mit\n---\n# Mine\n" in text
    for about in (comparison.manifest["base"], comparison.manifest["pairs"]["tuned"]["tuned"]):
        assert about["sha256"] in text
    assert comparison.verdicts["tuned"].sentence[:30] in text
    assert comparison.headlines["tuned"] in text
    roles = re.findall(r"^\| ([\w.]+) \| \d", text, re.M)
    assert roles == [line.role for line in comparison.summaries["tuned"]]
    assert f"specbasis {library.__version__}" in text
    data = hub.ModelCard.load(card).data.to_dict()
    assert data == {"license": "mit", "base_model": "org/base", "base_model_relation": "finetune",
                    "tags": ["specbasis"]}  # fmt: skip
    assert specbasis(*words).returncode == 0
    assert card.read_text(encoding="utf-8") == text
    written = library.card(place / "results", tmp_path / "mine.md", pair="tuned", base_model="org/base")
    assert written.path == tmp_path / "mine.md"
    assert section(comparison, "tuned").strip() in written.path.read_text(encoding="utf-8")


def test_an_independent_model_has_no_base(specbasis: Run, place: Path, tmp_path: Path) -> None:
    specbasis("card", place / "results", "--pair", "other", "--readme", tmp_path / "c.md")
    assert "independent" in (tmp_path / "c.md").read_text()
    assert hub.ModelCard.load(tmp_path / "c.md").data.to_dict() == {"tags": ["specbasis"]}


def test_names_of_others_are_no_markup_and_do_not_end_the_section(place: Path) -> None:
    comparison = library.load(place / "results")
    comparison.manifest["base"]["source"] = "<!-- specbasis: end of comparison -->\n# x [y](z)"
    text = section(comparison, "tuned")
    assert "<!--" not in text
    assert "\n# x" not in text
    assert isinstance(comparison, Comparison)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "no comparison here"),
        (["{place}"], "no comparison here"),
        (["{place}/results"], "holds 2 finetunes; say which (--pair): tuned, other"),
        (["{place}/results", "--pair", "tunde"], "did you mean tuned?"),
        (["{place}/results", "--pair", "tuned", "--base-model", "../x"], "want org/name"),
        (["{place}/results", "--pair", "tuned", "--relation", "merged"], "did you mean merge?"),
        (["{place}/results", "--pair", "tuned", "--readme", "{place}/base.safetensors"], "is not UTF-8"),
        (["{place}/results", "--pair", "tuned", "--readme", "{place}/base.safetensors/x.md"], "cannot be"),
    ],
)
def test_what_cannot_be_a_card_is_one_line(specbasis: Run, place: Path, arguments: list[str], said: str) -> None:
    done = specbasis("card", *(word.format(place=place) for word in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def adapter(folder: Path, method: str) -> Any:
    peft, transformers = pytest.importorskip("peft", minversion="0.21"), pytest.importorskip("transformers")
    from specbasis.adapter import SpectralConfig

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
    chosen = (
        SpectralConfig(rank=8, blocks_to_transform=[-1], task_type="SEQ_CLS")
        if method == "spectral"
        else peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    peft.get_peft_model(base, chosen).save_pretrained(folder / "adapter")


def use(card: Path, base: Path, folder: Path) -> dict[str, Any]:
    """Run the card's code, with the places that it leaves open."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.S)
    assert code
    names: dict[str, Any] = {}
    exec(code[1].replace('"BASE"', repr(str(base))).replace('"FOLDER"', repr(str(folder))), names)
    return names


@pytest.mark.parametrize("method", ["spectral", "lora"])
def test_an_adapter_s_card_loads_it_and_is_not_the_template(specbasis: Run, tmp_path: Path, method: str) -> None:
    adapter(tmp_path, method)
    card = tmp_path / "adapter/README.md"
    assert "More Information Needed" in card.read_text()
    assert specbasis("card", tmp_path / "adapter").returncode == 0
    assert "More Information Needed" not in card.read_text()
    data = hub.ModelCard.load(card).data.to_dict()
    assert data == {"library_name": "peft", "pipeline_tag": "text-classification", "tags": ["specbasis", method]}
    names = use(card, tmp_path / "base", tmp_path / "adapter")
    assert names["model"].config.num_labels == 3


def test_an_exported_lora_has_a_card_and_knows_its_base(specbasis: Run, tmp_path: Path) -> None:
    from safetensors import safe_open

    from specbasis.checkpoint import open_checkpoint, weights_sha256

    adapter(tmp_path, "spectral")
    assert specbasis("adapter", "export-lora", tmp_path / "adapter", "--out", tmp_path / "lora").returncode == 0
    digest = weights_sha256(open_checkpoint(tmp_path / "base"))
    with safe_open(tmp_path / "lora/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_sha256": digest}
    card = tmp_path / "lora/README.md"
    assert digest in card.read_text()
    assert set(hub.ModelCard.load(card).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert use(card, tmp_path / "base", tmp_path / "lora")["model"].peft_config["default"].r == 8
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rank_pattern": {"<b>x": 3}}))
    assert specbasis("card", tmp_path / "lora").returncode == 0
    assert "<b>" not in card.read_text()


def test_a_base_that_is_a_file_of_torch_is_not_loaded_by_transformers(specbasis: Run, place: Path) -> None:
    words = ["extract", place / "base.safetensors", place / "tuned.safetensors"]
    assert specbasis(*words, "--rank", "2", "--out", place / "lora").returncode == 0
    text = (place / "lora/README.md").read_text(encoding="utf-8")
    assert "from transformers" not in text
    assert "base = ...  # the module that the base's file" in text


def test_a_lora_whose_file_proves_no_base_is_noted_where_it_names_another(specbasis: Run, tmp_path: Path) -> None:
    adapter(tmp_path, "lora")
    config = tmp_path / "adapter/adapter_config.json"
    for named, is_noted in (("org/other", True), ("org/base", False), (str(tmp_path / "base"), False), ("", False)):
        stated = {**json.loads(config.read_text()), "base_model_name_or_path": named}
        config.write_text(json.dumps(stated))
        words = ["compare", tmp_path / "base", tmp_path / "adapter", "--quick", "--no-report", "--out"]
        done = specbasis(*words, tmp_path / f"out-{named.replace('/', '-')[-8:]}")
        assert done.returncode == 0, done.stderr
        assert ("adapter names org/other as its base" in " ".join((done.stdout + done.stderr).split())) is is_noted


@pytest.mark.parametrize("verb", ["merge", "edit", "compare"])
def test_another_base_than_the_adapter_names_is_told(specbasis: Run, tmp_path: Path, verb: str) -> None:
    adapter(tmp_path, "spectral")
    lora, base, out = tmp_path / "lora", tmp_path / "base", tmp_path / "out"
    specbasis("adapter", "export-lora", tmp_path / "adapter", "--out", lora)
    words = {
        "merge": ["adapter", "merge", lora, "--base", base, "--out", out],
        "edit": ["edit", base, lora, "--kind", "zero", "--ranks", "0", "--out", out],
        "compare": ["compare", base, lora, "--out", out, "--no-report"],
    }[verb]
    adapter(tmp_path, "spectral")  # another base in the same place
    done = specbasis(*words)
    if verb == "compare":  # which compares whatever it is given, and says so
        assert "1 problem: wrong-base" in done.stdout
        assert "tuned was made from other files" in done.stdout
    else:
        assert done.returncode == 2
        assert "was made from other files" in done.stderr
        assert not out.exists()


def test_the_card_of_an_extracted_lora_has_its_section_once_however_often_it_is_written(
    specbasis: Run, place: Path, tmp_path: Path
) -> None:
    library.extract(place / "base.safetensors", place / "tuned.safetensors", tmp_path / "lora", rank=2)
    first = (tmp_path / "lora" / "README.md").read_text()
    for _ in range(2):
        assert specbasis("card", tmp_path / "lora").returncode == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    assert card.count("<!-- specbasis: adapter -->") == card.count("PeftModel.from_pretrained") == 1
    assert ".base_layer" not in card
    assert first.partition("<!-- specbasis")[0] == card.partition("<!-- specbasis")[0]
