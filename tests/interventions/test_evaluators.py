"""Evaluators against what transformers says example by example, and ANARCII's task against its own decoding."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import distance
from torch import nn

from specbasis import InputError
from specbasis.interventions import Classification, Harness, Numbering, Text, evaluators, judge
from specbasis.interventions.evaluators.kit import FORMS
from specbasis.interventions.evaluators.numbering import germline_domains
from tests.interventions.models import bert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>", "the", "a", "cat", "dog", "sat", "ran", "on"]
WORDS += ["mat", "far", "and"]


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def test_a_table_of_texts_is_judged_as_one_text_at_a_time(tmp_path):
    words = tokenizer(tmp_path / "m")
    model = bert()
    model.config.id2label, model.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    model.save_pretrained(tmp_path / "m")
    texts = ["the cat sat on a mat", "dog ran", "the dog and a cat ran far and far", "mat", "a dog sat"]
    labels = ["no", "yes", "no", "no", "yes"]  # classes of the table are sorted: no, yes
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(texts, labels, strict=True)))
    evaluate = judge(f"table:{table}", text=["text"], label="label")
    loaded = evaluate.load(str(tmp_path / "m"))
    found = evaluate(loaded)[evaluate.metric]
    expected = [loaded.config.id2label[int(loaded(**words(t, return_tensors="pt")).logits.argmax())] for t in texts]
    assert found.value == np.mean([a == b for a, b in zip(expected, labels, strict=True)])
    assert found.chance == 3 / 5  # "no" for every text
    assert (found.values[:, 0] == [["no", "yes"].index(e) for e in expected]).all()
    # Batches are made once; another process makes its own.
    assert pickle.loads(pickle.dumps(evaluate))._batches == {}
    limited = Classification(str(table), limit=3, text=("text",), label="label")
    assert len(limited(loaded)["accuracy"].values) == 3


def test_a_model_without_the_head_of_its_task_is_refused(tmp_path):
    """Transformers would draw the head at random, and every score with it."""
    bert().base_model.save_pretrained(tmp_path / "m")
    table = tmp_path / "table.csv"
    table.write_text("text,label\nthe cat,yes\na dog,no\n")
    with pytest.raises(
        InputError, match=r"has no classifier\.bias, classifier\.weight, which Bert\w+ would draw at"
    ):
        judge(f"table:{table}", text=["text"], label="label").load(str(tmp_path / "m"))
    judge(f"sentences:{table}").load(str(tmp_path / "m"))  # reads no head


def test_a_text_longer_than_the_positions_of_a_model_is_cut_where_they_end(tmp_path):
    """RoBERTa's positions count from behind the padding, so it takes fewer tokens than it has positions."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer(tmp_path / "m")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=12, pad_token_id=0, **size)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    table = tmp_path / "table.csv"
    table.write_text(f"text,label\n{'cat ' * 30},LABEL_0\n{'dog ' * 30},LABEL_1\n")
    evaluate = judge(f"table:{table}", text=["text"], label="label")
    model = evaluate.load(str(tmp_path / "m"))
    assert len(evaluate(model)[evaluate.metric].values) == 2
    ((_, batch),) = evaluate.batches(model, 500)
    assert batch["input_ids"].shape[1] == 11


def test_perplexity_is_what_transformers_says(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    words = tokenizer(tmp_path / "gpt")
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=5, eos_token_id=5)).save_pretrained(tmp_path / "gpt")
    passages = ["the cat sat on the mat", "a dog ran far", "the dog and\nthe cat ran and sat on a mat"]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(passages))
    evaluate = Text(str(file))
    model = evaluate.load(str(tmp_path / "gpt"))
    found = evaluate(model)
    losses, counts = [], []
    for passage in passages:
        ids = words(passage, return_tensors="pt").input_ids
        losses.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    np.testing.assert_allclose(found["loss"].values, np.stack([losses, counts], 1), rtol=1e-5)
    assert found["perplexity"].value == pytest.approx(np.exp(sum(losses) / sum(counts)), rel=1e-5)

    tokenizer(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    masked = evaluate.load(str(tmp_path / "bert"))
    first = evaluate(masked)["loss"].values
    # At least one token of each passage, 15 % at most rounded up, and the same ones every time.
    assert first[:, 1].tolist() == [1, 1, 2]
    assert np.array_equal(first, evaluate(masked)["loss"].values)
    assert np.array_equal(first, Text(str(file))(masked)["loss"].values)


def test_a_folder_of_images(tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 255, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "vit")
    evaluate = judge(f"images:{tmp_path / 'images'}")
    model = evaluate.load(str(tmp_path / "vit"))
    found = evaluate(model)["accuracy"]
    right = []
    for label in ("cat", "dog"):
        for i in range(4):
            pixels = processor(Image.open(tmp_path / "images" / label / f"{i}.png"), return_tensors="pt")
            right.append(config.id2label[int(model(**pixels).logits.argmax())] == label)
    assert found.value == np.mean(right)


CATS = """task: cats
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow  # the harness takes ten seconds to import and to index its tasks
def test_a_task_of_the_harness_is_scored_example_by_example(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    words = tokenizer(tmp_path / "gpt")  # names no first token, which the harness itself does not take
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=5, eos_token_id=5)).save_pretrained(tmp_path / "gpt")
    asked = [("the cat sat", ("on", "far"), 0), ("a dog", ("ran", "mat"), 1), ("the mat", ("sat", "and"), 1)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/cats.jsonl").write_text(
        "".join(json.dumps({"q": q, "choices": c, "gold": g}) + "\n" for q, c, g in asked)
    )
    (tmp_path / "tasks/cats.yaml").write_text(CATS.replace("FILE", str(tmp_path / "tasks/cats.jsonl")))
    evaluate = Harness("cats", include=str(tmp_path / "tasks"))
    model = evaluate.load(str(tmp_path / "gpt"))
    found = evaluate(model)
    right = []
    for question, choices, gold in asked:
        ids = [words(f"{question} {choice}", return_tensors="pt").input_ids for choice in choices]
        logs = [model(each).logits.log_softmax(-1)[0, -2, each[0, -1]].item() for each in ids]
        right.append(int(np.argmax(logs)) == gold)
    assert list(found) == ["cats.acc"]
    assert found["cats.acc"].values[:, 0].tolist() == right
    assert "_manager" not in vars(pickle.loads(pickle.dumps(evaluate)))


def greedy(model: nn.Module, source, length):
    """Decoding as ANARCII runs it: each label from those before it, one step after the other."""
    hidden = source == 0
    memory = model.encoder(source, hidden)
    tokens = torch.ones(len(source), 1, dtype=torch.long)
    for _ in range(length - 1):
        later = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        logits, _ = model.decoder(tokens, memory, tokens == 0, later, hidden)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_a_model_of_another_kind_is_no_model_of_anarcii(tmp_path):
    pytest.importorskip("anarcii")
    bert().save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="is no model of ANARCII"):
        Numbering("tcr", 4).load(str(tmp_path / "m"))


def test_exact_is_what_greedy_decoding_numbers_without_an_error():
    evaluate = Numbering("tcr", 10)
    model = evaluate.load("pkg:anarcii/models/tcr/tcr_4_2_128_512.pt")
    found = evaluate(model)
    with torch.inference_mode():
        decoded = [
            ((greedy(model, source, target.shape[1]) == target) | (target == 0)).all(1)
            for source, target in evaluate._batches
        ]
    assert torch.equal(torch.cat(decoded).double(), torch.tensor(found["exact"].values[:, 0]))
    assert 0.3 < found["exact"].value < 1
    assert found["labels"].value > 0.98  # the model was trained for this: the labels are IMGT's


def test_germline_domains_follow_imgt():
    for receptor, chains in (("antibody", "HKL"), ("tcr", "ABGD"), ("shark", "H")):
        domains = germline_domains(receptor, 24)
        assert len({sequence for _, sequence, _ in domains}) == 24
        assert {chain for chain, _, _ in domains} == set(chains)
        for _, sequence, numbers in domains:
            assert len(sequence) == len(numbers)
            assert numbers == sorted(set(numbers))
            at = dict(zip(numbers, sequence, strict=True))
            assert at[23] == at[104] == "C"
            assert at[118] in "WF"
            loop = [n for n in numbers if 105 <= n <= 117]
            left = [n for n in loop if n <= 111]
            assert len(left) == -(-len(loop) // 2)  # an odd residue stands on the left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("glue", "want one of glue:…"),
        ("anarcii:cow", "want one of antibody, tcr, shark"),
        ("glue:sports", "got task 'sports'"),
    ],
)
def test_unknown_tasks_are_told(text, message):
    with pytest.raises(InputError, match=message):
        judge(text)


def test_a_text_that_is_none_and_outputs_that_are_not_finite(tmp_path):
    from transformers import AutoModelForMaskedLM

    (tmp_path / "empty.txt").write_text("\n \n")
    tokenizer(tmp_path / "m")
    model = bert()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="holds no text"):
        Text(str(tmp_path / "empty.txt"))(AutoModelForMaskedLM.from_pretrained(tmp_path / "m"))
    broken = Numbering("shark", 4)
    anarcii = broken.load("pkg:anarcii/models/shark/shark_4_2_128_512.pt")
    anarcii.decoder.fc_out.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="the model's outputs hold NaN"):
        broken(anarcii)


def test_an_evaluator_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "length_of_file.py").write_text(
        "from dataclasses import dataclass\n"
        "from specbasis.interventions.evaluators.kit import FORMS\n"
        "@dataclass\n"
        "class Length:\n"
        "    file: str\n"
        "    metric: str = 'length'\n"
        "    def load(self, source):\n        return source\n"
        "    def __call__(self, model):\n        return {'length': float(len(self.file))}\n"
        "FORMS['length'] = lambda file, options: Length(file)\n"
    )
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(tmp_path)])
    try:
        assert judge("length:four")(None) == {"length": 4.0}
        assert evaluators.describe(judge("length:four")) == 'Length {"file": "four", "metric": "length"}'
        with pytest.raises(InputError, match="length:"):
            judge("width:four")
    finally:
        FORMS.pop("length", None)
        sys.modules.pop("specbasis.interventions.evaluators.length_of_file", None)


@pytest.mark.parametrize("name", ["sst2", "SST-2", "stsb"])
def test_a_task_of_glue_needs_no_more_than_its_name(name: str) -> None:
    alone, spelt = (judge(text, data_dir="glue") for text in (name, f"glue:{name}"))
    assert evaluators.describe(alone) == evaluators.describe(spelt)


def test_an_encoder_without_a_head_is_judged_by_the_cosines_of_its_means(tmp_path):
    words = tokenizer(tmp_path / "m")
    torch.manual_seed(0)
    bert().base_model.save_pretrained(tmp_path / "m")
    pairs = [("the cat sat on a mat", "a dog ran"), ("dog ran", "the dog ran far"), ("mat", "the mat"),
             ("a cat", "a dog sat on the cat"), ("far", "mat")]  # fmt: skip
    labels = [0.5, 4.0, 4.5, 2.0, 0.0]
    table = tmp_path / "table.csv"
    table.write_text("a,b,score\n" + "".join(f"{a},{b},{y}\n" for (a, b), y in zip(pairs, labels, strict=True)))
    evaluate = judge(f"similarity:{table}", text=["a", "b"], label="score")
    evaluate.prepare()
    loaded = evaluate.load(str(tmp_path / "m"))
    found = evaluate(loaded)

    def mean(text):
        with torch.no_grad():
            return loaded(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0).double().numpy()

    cosines = [1 - distance.cosine(mean(a), mean(b)) for a, b in pairs]
    assert found["pearson"].value == pytest.approx(stats.pearsonr(cosines, labels)[0], abs=1e-5)
    assert found[evaluate.metric].value == pytest.approx(stats.spearmanr(cosines, labels)[0])
    np.testing.assert_allclose(found["pearson"].values[:, 0], cosines, atol=1e-6)
    assert found["spearman"].chance == 0
    with pytest.raises(InputError, match="got task 'likeness'; want one of"):
        judge("similarity:likeness")
    single = judge(f"similarity:{table}", text=["a"], label="score")
    with pytest.raises(InputError, match="table: is no task of two texts; want one, such as similarity:stsb"):
        single.prepare()
