"""What a finetune forgot: the base's loss, or a task of it, with the finetune's numbers under the base's head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import specbasis
from specbasis import forgetting, open_checkpoint
from specbasis.checkpoint import Checkpoint
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.figures.treatment import opened
from specbasis.interventions.evaluators import judge
from specbasis.interventions.samples import Sample
from specbasis.treatment.forgetting import Forgetting, in_base, named
from specbasis.treatment.judged import judge_pair, refuse_chance
from specbasis.treatment.updates import differing
from tests.interventions.test_evaluators import WORDS, tokenizer
from tests.pico import bert_state, finetuned, write

BASE = bert_state()
TUNED = finetuned(BASE, 0.3)
NAME = "encoder.layer.1.output.dense.weight"
TABLE = "embeddings.word_embeddings.weight"


@dataclass
class Reading:
    """Scores that a function of the checkpoint gives, for each of 40 examples with noise of its own."""

    of: Callable[[Checkpoint], float]
    higher_is_better: bool = False
    noise: float = 0.01
    metric: str = "read"
    seen: list[Checkpoint] = field(default_factory=list)

    def load(self, source: str) -> nn.Module:
        model = nn.Linear(1, 1)
        tensors = {name: tensor.clone() for name, tensor in open_checkpoint(source).items()}
        model.checkpoint = open_checkpoint(tensors)  # type: ignore[assignment]
        self.seen.append(model.checkpoint)  # type: ignore[arg-type]
        return model

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        noise = self.noise * np.random.default_rng(len(self.seen)).normal(size=(40, 1))
        value = self.of(model.checkpoint)  # type: ignore[arg-type]
        return {"read": Sample(value + noise, higher_is_better=self.higher_is_better)}


def norm(checkpoint: Checkpoint) -> float:
    return float(checkpoint[NAME].norm())


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("transformers")
    head = {"cls.own.weight": torch.ones(3, 12)}
    return (
        write(tmp_path / "base.safetensors", {**BASE, **head}),
        write(tmp_path / "tuned.safetensors", {**TUNED, "classifier.weight": torch.ones(2, 12)}),
    )


def test_the_finetunes_numbers_are_judged_under_the_bases_own_head(models) -> None:
    evaluator = Reading(norm)
    told = forgetting(*models, evaluator)
    base, tuned = evaluator.seen
    assert set(base) == set(tuned) == {*BASE, "cls.own.weight"}
    assert all(torch.equal(tuned[name], TUNED[name]) for name in BASE)
    assert torch.equal(tuned["cls.own.weight"], base["cls.own.weight"])
    change = told.record["scores"]["read"]["change"]
    assert change == pytest.approx(float(TUNED[NAME].norm() - BASE[NAME].norm()), abs=0.01)
    assert "cls.own" in told.record["notes"][0]


@pytest.mark.parametrize(
    ("sign", "higher", "verdict"),
    [
        (1, False, "Forgotten: "),
        (1, True, "Nothing was forgotten, it became better"),
        (-1, False, "Nothing was forgotten, it became better"),
        (-1, True, "Forgotten: "),
        (0, True, "Nothing was measurably forgotten"),
        (0, False, "Nothing was measurably forgotten"),
    ],
)
def test_the_sentence_follows_from_the_interval_and_the_direction(models, sign, higher, verdict) -> None:
    told = forgetting(*models, Reading(lambda checkpoint: sign * norm(checkpoint), higher))
    assert told.sentence.startswith(verdict)
    assert told.is_forgotten is told.exceeds(0.0) is verdict.startswith("Forgotten")
    low, worse, high = (told.record[name] for name in ("worse_low", "worse", "worse_high"))
    assert low <= worse <= high
    assert told.exceeds(low - 1e-9) is ("measurably" not in verdict)  # which the test has to allow as well
    assert not told.exceeds(low)
    assert told.within(high).startswith("passes: worse by more than ")
    assert told.within(low) == "passes, undecided: " + (f"it may be worse by {high:.4f}; more examples would tell")
    if "measurably" in verdict:
        assert f"worse by more than {high:.4f} is excluded" in told.sentence


def test_false_alarms_are_as_rare_as_the_interval_says(models) -> None:
    """Two models that differ by the noise of examples alone: worse beyond a 95 % interval in 2.5 % of all draws."""
    alarms, draws = 0, 120
    for seed in range(draws):
        evaluator = Reading(lambda _: 0.0, noise=1.0)
        evaluator.seen = [None] * (3 * seed)  # type: ignore[list-item] # other noise
        alarms += forgetting(*models, evaluator, resamples=200).is_forgotten
    assert alarms <= 10  # of 120 with 2.5 %: more than 10 in less than 1 of 2000 trials


def test_where_no_example_changed_the_sentence_says_how_many_may(models) -> None:
    told = forgetting(*models, Reading(lambda _: 1.0, noise=0.0))
    assert (told.record["worse_low"], told.record["worse_high"]) == (0, 0)
    assert (
        f"no example's read changed; with 95 % confidence that of at most {1 - 0.05 ** (1 / 40):.1%} of all would"
        in told.sentence
    )  # (1 − p)^40 = .05


@pytest.mark.parametrize(("examples", "noise"), [(1, 0.01), (3, 0.01), (5, 0.01), (5, 9.0), (6, 0.01)])
def test_fewer_than_six_examples_decide_nothing_however_short_their_interval(models, examples, noise) -> None:
    class Few(Reading):
        def __call__(self, model: nn.Module) -> dict[str, Sample]:
            sample = super().__call__(model)["read"]
            return {"read": Sample(sample.values[:examples], higher_is_better=False)}

    told = forgetting(*models, Few(norm, noise=noise))
    # Of 2ⁿ ways to exchange n pairs two are as far out: p is at least 1/16 for five, and can be 1/32 for six.
    assert told.is_forgotten is (examples == 6)
    assert told.sentence.startswith("Forgotten" if examples == 6 else "Too few examples to tell: ")


@pytest.mark.parametrize("name", ["none.txt", "far/none.txt", "folder", "https://example.org/texts.txt", ""])
def test_what_is_neither_file_nor_task_is_said_to_be_no_file(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"got {name!r}, and there is no such file"):
        named(name, "base")


@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".jsonl", ".parquet"])
def test_a_table_is_not_judged_as_a_text(tmp_path, suffix) -> None:
    table = tmp_path / f"t{suffix}"
    table.write_text("text,label\n" * 40)
    with pytest.raises(InputError, match=r"a table is no text; .* task table:"):
        named(table, "base")


def test_one_number_without_examples_decides_nothing(models) -> None:
    class Single(Reading):
        def __call__(self, model: nn.Module) -> dict[str, float]:  # type: ignore[override]
            return {"read": self.of(model.checkpoint)}  # type: ignore[arg-type]

    told = forgetting(*models, Single(norm))
    assert "chance may have done it" in told.sentence
    assert not told.is_forgotten
    assert "p" not in told.record["scores"]["read"]


@pytest.mark.parametrize("rows", [-3, 4])
def test_of_a_vocabulary_of_another_size_the_shared_rows_are_the_finetunes(tmp_path, rows) -> None:
    old = len(BASE[TABLE])
    table = torch.cat([TUNED[TABLE], torch.full((4, 12), 7.0)])[: old + rows]
    base, tuned = open_checkpoint(BASE), open_checkpoint({**TUNED, TABLE: table})
    model = in_base(base, tuned, differing(base, tuned))
    shared = min(old, old + rows)
    assert torch.equal(model[TABLE][:shared], TUNED[TABLE][:shared])
    assert torch.equal(model[TABLE][shared:], BASE[TABLE][shared:])
    evaluator = Reading(norm)
    pair = judge_pair(base, tuned, evaluator)
    assert set(pair) == {"base", "tuned"}
    under = evaluator.seen[0]
    assert torch.equal(under[TABLE][:shared], BASE[TABLE][:shared])
    assert torch.equal(under[TABLE][shared:], table[shared:])


def test_what_is_no_finetune_of_the_base_is_refused(tmp_path) -> None:
    base = write(tmp_path / "base.safetensors", BASE)
    other = write(tmp_path / "other.safetensors", bert_state(seed=9))
    with pytest.raises(InputError, match="further from"):
        forgetting(base, other, Reading(norm))
    with pytest.raises(InputError, match="nothing differs"):
        forgetting(base, base, Reading(norm))


# --- the whole: language models and encoders on a text file -------------------------------------------------------


def language_models(folder: Path, cls: str) -> tuple[Path, Path, Path]:
    """A base whose loss on a text is low by training on it, a finetune by a random step, and the text."""
    transformers = pytest.importorskip("transformers")
    words = tokenizer(folder / "base")
    torch.manual_seed(0)
    if cls == "GPT2LMHeadModel":
        size = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=5, eos_token_id=5))
    else:
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = getattr(transformers, cls)(transformers.BertConfig(vocab_size=len(WORDS), **size))
    text = folder / "text.txt"
    passages = ["the cat sat on the mat and ran far", "a dog ran far and the cat sat on a mat"] * 8
    text.write_text("\n\n".join(passages))
    if cls.startswith("GPT2"):
        rate = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batch = words(passages, return_tensors="pt", padding=True)
        for _ in range(30):
            loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
            rate.zero_grad()
            loss.backward()
            rate.step()
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.base_model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", text


def test_a_text_is_judged_by_the_language_models_own_loss(tmp_path) -> None:
    base, tuned, text = language_models(tmp_path, "GPT2LMHeadModel")
    told = forgetting(base, tuned, text)
    assert told.record["metric"] == "loss"
    assert told.is_forgotten
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    model.transformer.load_state_dict(transformers.GPT2Model.from_pretrained(tuned).state_dict())
    sums = np.zeros(2)
    for passage in text.read_text().split("\n\n"):
        ids = words(passage, return_tensors="pt").input_ids
        n = ids.shape[1] - 1
        sums += [n * model.eval()(ids, labels=ids).loss.item(), n]
    assert told.record["scores"]["loss"]["tuned"] == pytest.approx(sums[0] / sums[1], rel=1e-4)
    assert math.exp(told.record["scores"]["loss"]["tuned"]) == pytest.approx(
        told.record["scores"]["perplexity"]["tuned"], rel=1e-6
    )
    assert told.table.columns[0].name == "metric"


def test_texts_of_which_the_base_knows_nothing_are_refused(tmp_path) -> None:
    base, tuned, text = language_models(tmp_path, "BertModel")
    with pytest.raises(InputError, match="no better than chance"):
        forgetting(base, tuned, text)


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "GPT2LMHeadModel", "BertModel"])
def test_a_base_without_a_tokenizer_of_its_own_is_refused(tmp_path, cls) -> None:
    """transformers makes one that knows no word, to which every text is alike."""
    base, tuned, text = language_models(tmp_path, cls)
    for file in base.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"base: (has no tokenizer|transformers cannot load it)"):
        forgetting(base, tuned, text)


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertModel"])
def test_a_tokenizer_of_more_words_than_the_model_has_is_refused(tmp_path, cls) -> None:
    base, tuned, text = language_models(tmp_path, cls)
    transformers = pytest.importorskip("transformers")
    for folder in (base, tuned):
        model = getattr(transformers, cls).from_pretrained(folder)
        model.resize_token_embeddings(len(WORDS) - 4)
        model.save_pretrained(folder)
    with pytest.raises(InputError, match=f"the model embeddings of {len(WORDS) - 4}"):
        forgetting(base, tuned, text)


def test_a_language_model_that_knows_nothing_is_refused(tmp_path) -> None:
    base, tuned, text = language_models(tmp_path, "BertForMaskedLM")  # untrained: a loss of log(vocabulary)
    with pytest.raises(InputError, match="no better than chance"):
        forgetting(base, tuned, text)


def test_a_base_that_does_a_task_no_better_than_one_answer_for_all_is_refused(tmp_path) -> None:
    base, tuned, _ = language_models(tmp_path, "BertForSequenceClassification")
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "the cat sat,yes\nthe cat sat,no\na dog ran,yes\na dog ran,no\n" * 20)
    with pytest.raises(
        InputError, match=r"^\S*table.csv: .* accuracy on 80 examples of it.* chance \(0.50\)"
    ) as refused:
        forgetting(base, tuned, judge(f"table:{table}", text=["text"], label="label"))
    assert "--limit" not in str(refused.value)  # all of it was used
    with pytest.raises(InputError, match=r"on 40 examples .* or more examples \(--limit\)$"):
        forgetting(base, tuned, judge(f"table:{table}", text=["text"], label="label", limit=40))


def test_a_base_that_may_be_at_chance_by_its_interval_is_refused() -> None:
    values, asked = np.random.default_rng(0).normal(size=(40, 1)), Reading(norm)
    for higher_is_better, sign in ((True, 1), (False, -1)):
        sure, unsure = (
            Sample(values - values.mean() + sign * by, higher_is_better=higher_is_better, chance=0.0)
            for by in (1, 0.1)
        )
        refuse_chance(sure, asked)
        with pytest.raises(InputError, match="no better than chance"):
            refuse_chance(unsure, asked)
    refuse_chance(Sample(values), "m")


def test_texts_without_a_token_to_predict_are_refused(tmp_path) -> None:
    base, tuned, _ = language_models(tmp_path, "BertForMaskedLM")
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("zyx\n" * 40)
    with pytest.raises(InputError, match="no passage has a token to predict"):
        forgetting(base, tuned, unknown)


def test_a_configuration_that_transformers_does_not_know_is_one_line(tmp_path) -> None:
    base, tuned, text = language_models(tmp_path, "BertForMaskedLM")
    config = base / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "none"'))
    with pytest.raises(InputError, match="base: transformers cannot load it"):
        forgetting(base, tuned, text)


def test_the_model_whose_scores_are_not_finite_is_named(models) -> None:
    with pytest.raises(NonFiniteError, match=r"tuned\.safetensors: metric 'read'"):
        forgetting(*models, Reading(lambda own: math.nan if torch.equal(own[NAME], TUNED[NAME]) else 0.0))


def test_a_change_that_four_decimals_would_hide_is_printed_with_its_size(models) -> None:
    told = forgetting(*models, Reading(lambda own: 3e-6 * torch.equal(own[NAME], TUNED[NAME]), noise=0.0))
    assert "+3e-06 [+3e-06, +3e-06]" in told.sentence


def test_a_record_that_is_kept_says_of_which_weights_it_is_and_opens_again(models, tmp_path) -> None:
    kept = forgetting(*models, Reading(norm), tmp_path / "kept")
    again = Forgetting.load(tmp_path / "kept")
    assert (again.sentence, again.record) == (kept.sentence, kept.record)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in models]
    assert [about["sha256"] for about in again.record["weights"]] == hashes
    assert {"versions", "commit"} <= set(again.record)
    assert opened(tmp_path / "kept").sentence == kept.sentence
    with pytest.raises(InputError, match="kept"):
        forgetting(*models, Reading(norm), tmp_path / "kept")
    assert Forgetting.load(tmp_path / "kept").record == again.record
    with pytest.raises(InputError, match="holds no model, so there is no card of it"):
        specbasis.card(tmp_path / "kept")
