"""A pico BERT with a tokenizer on disk, and GLUE files in their official layouts."""

from pathlib import Path

import torch

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "good", "fine", "great", "bad", "poor", "dull",
    "film", "song", "book", "is", "was", "very", "not", "man", "woman", "plays", "sings", '"', ".",
]  # fmt: skip


def pico_bert(folder, *, masked_lm=False, sentence_encoder=False, seed=0):
    from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertForMaskedLM(config) if masked_lm else BertModel(config)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    if sentence_encoder:
        (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]', encoding="utf-8")
    return folder


GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")


def sentiment(count, offset=0):
    """Sentences whose label is in one word, in a fixed order."""
    rows = []
    for i in range(offset, offset + count):
        label = i % 2
        word = (GOOD if label else BAD)[(i // 2) % 3]
        rows.append((f'the {("film", "song", "book")[i % 3]} is {"very " * (i % 4)}{word} "', label))
    return rows


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


MNLI_TEXT = [
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
    "sentence2_parse", "sentence1", "sentence2",
]  # fmt: skip


def glue(root, train=24, dev=12):
    """All nine tasks, as the official archive has them, with quotes that do not balance."""
    for file, count, offset in (("train", train, 0), ("dev", dev, 100)):
        one = sentiment(count, offset)
        pairs = [(text, f"a {text}", label) for text, label in one]
        lines(root / f"CoLA/{file}.tsv", [("gj04", label, "" if label else "*", text) for text, label in one])
        lines(root / f"SST-2/{file}.tsv", [("sentence", "label"), *one])
        header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        mrpc = [(label, 7, 8, a, b) for a, b, label in pairs]
        lines(root / f"MRPC/{file}.tsv", [("\ufeffQuality", *header[1:]), *mrpc])
        header = ["index", "genre", "filename", "year", "old_index", "source1", "source2", *MNLI_TEXT[-2:], "score"]
        stsb = [
            (i, "x", "y", "2012test", "0001", "none", "none", a, b, f"{1.5 + 2 * label:.3f}")
            for i, (a, b, label) in enumerate(pairs)
        ]
        lines(root / f"STS-B/{file}.tsv", [header, *stsb])
        qqp = [(i, 1, 2, a, b, label) for i, (a, b, label) in enumerate(pairs)]
        lines(root / f"QQP/{file}.tsv", [("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), *qqp])
        word = ("not_entailment", "entailment")
        qnli = [(i, a, b, word[label]) for i, (a, b, label) in enumerate(pairs)]
        lines(root / f"QNLI/{file}.tsv", [("index", "question", "sentence", "label"), *qnli])
        lines(root / f"RTE/{file}.tsv", [("index", "sentence1", "sentence2", "label"), *qnli])
        wnli = [(i, a, b, label) for i, (a, b, label) in enumerate(pairs)]
        lines(root / f"WNLI/{file}.tsv", [("index", "sentence1", "sentence2", "label"), *wnli])
        three = ("entailment", "neutral", "contradiction")
        annotators = ["label1"] if file == "train" else [f"label{i}" for i in range(1, 6)]
        mnli = [
            (i, 1, "1n", "fiction", "(", "(", "(", "(", a, b, *[three[i % 3]] * len(annotators), three[i % 3])
            for i, (a, b, _) in enumerate(pairs)
        ]
        for name in ("train",) if file == "train" else ("dev_matched", "dev_mismatched"):
            lines(root / f"MNLI/{name}.tsv", [(*MNLI_TEXT, *annotators, "gold_label"), *mnli])
    return root


def assert_predicts_as_written(run: Path, glue: Path) -> None:
    """What a run of SST-2 loads as predicts on the dev set what the run wrote."""
    from specbasis.finetuning import load
    from specbasis.finetuning.sources import load_task

    model, tokenizer = load(run)
    dev = load_task("sst2", data_dir=glue).dev["dev"]
    with torch.inference_mode():
        logits = model(**tokenizer([text for (text,) in dev.inputs], padding=True, return_tensors="pt")).logits
    said = [line.split(",")[-1] for line in (run / "predictions.csv").read_text().splitlines()[1:]]
    assert [str(p) for p in logits.argmax(-1).tolist()] == said
