"""Tasks from official files, tables and image folders; and each kind of damage in one line."""

import json

import pytest

from specbasis.core.errors import InputError
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tables import READERS
from specbasis.finetuning.tasks import GLUE, Layout, Task, subset, task_named
from tests.finetuning import lab


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return lab.glue(tmp_path_factory.mktemp("glue"))


@pytest.mark.parametrize("name", GLUE)
def test_every_official_layout_gives_texts_and_labels(name, root):
    data = load_task(name, data_dir=root)
    texts = [text for text, _ in lab.sentiment(24)]
    assert len(data.train) == 24
    assert set(data.dev) == ({"matched", "mismatched"} if name == "mnli" else {"dev"})
    assert all(len(split) == 12 for split in data.dev.values())
    assert [inputs[0] for inputs in data.train.inputs] == texts  # a quote at the end is text
    if name not in ("cola", "sst2"):
        assert [inputs[1] for inputs in data.train.inputs] == [f"a {text}" for text in texts]
    expected = {
        "stsb": [1.5, 3.5] * 12,
        "mnli": [0.0, 1.0, 2.0] * 8,
        "rte": [1.0, 0.0] * 12,  # entailment is class 0
        "qnli": [1.0, 0.0] * 12,
    }
    assert data.train.labels == expected.get(name, [0.0, 1.0] * 12)


@pytest.mark.parametrize("spelling", ["SST-2", "sst2", "sst_2", "Sst-2"])
def test_a_task_is_found_however_it_is_spelt(spelling):
    assert task_named(spelling).name == "sst2"


def test_a_folder_that_is_called_like_a_task_does_not_hide_it(root, tmp_path, monkeypatch):
    (tmp_path / "rte").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_task("rte", data_dir=root).task.title == "RTE"
    with pytest.raises(InputError, match="holds 0 folders; want one folder of images"):
        load_task("./rte")


def test_a_subset_is_fixed_and_apart_from_what_is_chosen_on(root):
    data = load_task("sst2", data_dir=root)
    small, again = (subset(data, examples=8, selection=5) for _ in range(2))
    assert small.digest == again.digest
    assert len(small.train) == 8
    assert len(small.selection) == 5
    assert len(subset(data, selection=5).train) == 19
    taken = subset(data, examples=19, selection=5)
    assert sorted([*taken.train.inputs, *taken.selection.inputs]) == sorted(data.train.inputs)
    with pytest.raises(InputError, match="train holds 24 examples; got 5 to choose on and 20"):
        subset(data, examples=20, selection=5)


def test_rows_that_the_official_qqp_file_breaks_are_dropped_and_told(tmp_path):
    lab.glue(tmp_path)
    path = tmp_path / "QQP/train.tsv"
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*whole[:5], "9\t1\t2\tonly a question\n", *whole[5:]]), encoding="utf-8")
    data = load_task("qqp", data_dir=tmp_path)
    assert len(data.train) == 24
    assert data.notes == ("train.tsv: 1 rows with missing columns dropped, which occur in the official file",)


def test_mrpc_is_read_from_the_original_corpus_and_the_official_list_of_dev_pairs(tmp_path):
    lab.glue(tmp_path)
    folder = tmp_path / "MRPC"
    rows = [f'{i % 2}\t{i}\t{i + 50}\the said "{i}\tshe said {i}' for i in range(10)]
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    (folder / "msr_paraphrase_train.txt").write_text("\r\n".join([header, *rows, ""]), encoding="utf-8", newline="")
    assert len(load_task("mrpc", data_dir=tmp_path).train) == 24  # train.tsv goes first
    (folder / "train.tsv").unlink()
    with pytest.raises(InputError, match=r"neither train\.tsv nor dev_ids\.tsv, GLUE's list"):
        load_task("mrpc", data_dir=tmp_path)
    (folder / "dev_ids.tsv").write_text("1\t2\n", encoding="utf-8")
    with pytest.raises(InputError, match="names 0 of the 10 pairs"):
        load_task("mrpc", data_dir=tmp_path)
    (folder / "dev_ids.tsv").write_text("3\t53\n8\t58\n", encoding="utf-8")
    data = load_task("mrpc", data_dir=tmp_path)
    assert data.dev["dev"].inputs == [('he said "3', "she said 3"), ('he said "8', "she said 8")]
    assert data.dev["dev"].labels == [1.0, 0.0]
    assert len(data.train) == 8


def test_a_file_that_ends_inside_of_a_line_is_noted(tmp_path):
    lab.glue(tmp_path)
    assert load_task("cola", data_dir=tmp_path).notes == ()
    edit(tmp_path / "CoLA/train.tsv", lambda s: s[:-4])
    (note,) = load_task("cola", data_dir=tmp_path).notes
    assert note == "train.tsv: its last line has no end; if the file is cut off, get it again"


def edit(path, change):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "file", "change", "message"),
    [
        (
            "rte",
            "RTE/train.tsv",
            lambda s: s[: s.rindex("\t")],
            r"line 25: 3 columns, want 4; is the file truncated",
        ),
        ("qqp", "QQP/train.tsv", lambda s: s[: s.rindex("\t")], r"line 25: the last line lacks columns"),
        ("sst2", "SST-2/train.tsv", lambda s: s[: s.rindex("\t") + 1], r"line 25: label is ''; want one of 0, 1"),
        (
            "cola",
            "CoLA/dev.tsv",
            lambda s: s.replace("gj04\t0", "gj04\t2", 1),
            r"line 1: label is '2'; want one of 0, 1",
        ),
        ("stsb", "STS-B/dev.tsv", lambda s: s.replace("1.500", "high", 1), r"score is 'high'; want a number"),
        ("stsb", "STS-B/dev.tsv", lambda s: s.replace("1.500", "nan", 1), r"score is 'nan'; want a number"),
        ("mnli", "MNLI/dev_matched.tsv", lambda s: "", r"dev_matched.tsv: is empty"),
        ("mrpc", "MRPC/train.tsv", lambda s: s.replace("Quality", "label"), r"no column 'Quality'"),
        ("qnli", "QNLI/dev.tsv", lambda s: s.split("\n")[0] + "\n", r"dev.tsv: holds no examples"),
    ],
)
def test_damage_is_one_line_that_names_the_place(task, file, change, message, tmp_path):
    lab.glue(tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(InputError, match=message) as caught:
        load_task(task, data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "folder", "message"),
    [
        ("snli", ".", "got task 'snli'; want one of cola"),
        ("rte", "nowhere", "no such folder; want a folder with GLUE"),
        ("rte", ".", "holds no folder RTE"),
    ],
)
def test_what_is_not_there_is_told(task, folder, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_task(task, data_dir=tmp_path / folder)


ROWS = [{"review": text, "stars": label + 1} for text, label in lab.sentiment(20)]


def table(path):
    if path.suffix == ".csv":
        body = "".join('"{}",{}\n'.format(row["review"].replace('"', '""'), row["stars"]) for row in ROWS)
        path.write_text(f"review,stars\n{body}", encoding="utf-8")
    elif path.suffix == ".tsv":
        lab.lines(path, [("review", "stars"), *((row["review"], row["stars"]) for row in ROWS)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def test_the_same_table_is_the_same_task_in_every_format(tmp_path):
    found = [
        load_task(table(tmp_path / f"reviews.{kind}"), text=["review"], label="stars")
        for kind in ("csv", "tsv", "json", "jsonl", "parquet")
    ]
    assert len({data.digest for data in found}) == 1
    first = found[0]
    assert first.task.labels == ("1", "2")
    assert (len(first.train), len(first.dev["dev"])) == (18, 2)
    assert not set(first.train.inputs) & set(first.dev["dev"].inputs) or len(set(map(str, ROWS))) < 20
    assert first.notes[0].startswith("no dev set was given: 2 of 20")


def test_a_format_that_is_added_is_read_by_the_suffix_of_a_file(tmp_path, monkeypatch):
    def rows(path):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield number, dict(zip(("review", "stars"), line.split(" | "), strict=True))

    monkeypatch.setitem(READERS, ".bars", rows)
    lines = [f"{row['review']} | {row['stars']}" for row in ROWS]
    (tmp_path / "reviews.bars").write_text("\n".join(lines), encoding="utf-8")
    data = load_task(tmp_path / "reviews.bars", text=["review"], label="stars")
    assert data.digest == load_task(table(tmp_path / "reviews.csv"), text=["review"], label="stars").digest
    (tmp_path / "dev.txt").touch()
    with pytest.raises(InputError, match=r"got a \.txt; want .*\.parquet \.bars"):
        load_task(tmp_path / "reviews.bars", dev=tmp_path / "dev.txt", text=["review"], label="stars")


def test_a_task_that_is_added_is_read_from_its_folder(tmp_path, monkeypatch):
    layout = Layout(("sentence",), "label", dev=("dev_old", "dev_new"))
    monkeypatch.setitem(GLUE, "sst3", Task("sst3", "SST-3", ("accuracy",), ("0", "1"), layout))
    for name in ("train", "dev_old", "dev_new"):
        lab.lines(tmp_path / f"SST-3/{name}.tsv", [("sentence", "label"), *lab.sentiment(6)])
    data = load_task("SST-3", data_dir=tmp_path)
    assert set(data.dev) == {"old", "new"}
    assert len(data.train) == 6


def test_a_dev_table_and_regression(tmp_path):
    train, dev = table(tmp_path / "train.csv"), table(tmp_path / "dev.jsonl")
    data = load_task(train, dev=dev, text=["review"], label="stars", regression=True)
    assert data.task.regression
    assert data.task.metrics == ("pearson", "spearman")
    assert data.train.labels[:2] == [1.0, 2.0]
    assert len(data.dev["dev"]) == 20


@pytest.mark.parametrize(
    ("text", "label", "content", "message"),
    [
        (["review"], "", None, "say which columns hold what.*the file has review, stars"),
        (["reviews"], "stars", None, "no column 'reviews'; it has review, stars"),
        (["review"], "stars", "review,stars\n", "holds no rows"),
        (["review"], "stars", "", "holds no rows"),
        (["review"], "stars", 'review,stars\n"an open quote,1\n', "not a readable CSV"),
        (
            ["review"],
            "stars",
            "review,stars\na,b,1\n",
            "line 2: 3 columns, want 2; is the file truncated, or a text",
        ),
        (["review"], "stars", "review,stars\na,1\nb,1\n", "stars has one value only"),
        (["review"], "stars", "review,stars\na,1\nb,\nc,2\n", "line 3: stars is ''; want the name of a class"),
        (["review"], "stars", "review,stars\n" + "".join(f"a,{i}\n" for i in range(1200)), "or say --regression"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_in_one_line(text, label, content, message, tmp_path):
    path = table(tmp_path / "reviews.csv")
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_task(path, text=text, label=label)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": 1}, {"a": "y"}], "line 2: b is None; want the name of a class"),
        ([{"a": "x", "b": [1]}, {"a": "y", "b": [0]}], r"line 1: b is \[1\]; want the name of a class"),
        ([{"a": "x", "b": float("nan")}, {"a": "y", "b": 0}], "line 1: b is nan; want the name of a class"),
        ([{"a": ["x"], "b": 1}, {"a": ["y"], "b": 0}], r"line 1: a is \['x'\]; want a text"),
        ([{"a": "x\ud800", "b": 1}, {"a": "y", "b": 0}], "line 1: a holds half a character"),
        ("", "own.json: is empty"),
    ],
)
def test_a_cell_that_holds_nothing_or_too_much_is_refused(rows, message, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(rows) if rows else "", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_task(tmp_path / "own.json", text=["a"], label="b")
    held = [{"a": "x", "b": 0}, {"a": "y", "b": 1}]
    (tmp_path / "held.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(InputError, match=r"own\.json"):
        load_task(tmp_path / "held.json", dev=tmp_path / "own.json", text=["a"], label="b")


def test_a_dev_label_that_train_lacks_is_refused(tmp_path):
    train, dev = table(tmp_path / "train.csv"), tmp_path / "dev.csv"
    dev.write_text("review,stars\nfine,5\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"dev.csv, line 2: stars is '5'; want one of 1, 2"):
        load_task(train, dev=dev, text=["review"], label="stars")


def test_a_folder_of_images_has_its_folders_as_classes(tmp_path):
    from PIL import Image

    for part, count in (("train", 4), ("val", 2)):
        for shade, name in ((30, "dark"), (220, "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / part / name / f"{i}.png")
    data = load_task(tmp_path)
    assert data.task.images
    assert data.task.labels == ("dark", "light")
    assert (len(data.train), len(data.dev["dev"])) == (8, 4)
    (tmp_path / "val" / "grey").mkdir()
    with pytest.raises(InputError, match="class 'grey' is not among those of train"):
        load_task(tmp_path)


def test_the_hub_is_read_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    held = {"train": [("a", 0), ("b", 1)], "validation": [("c", 1)]}

    def load_dataset(name, config):
        assert (name, config) == ("nyu-mll/glue", "sst2")
        return {
            split: datasets.Dataset.from_list([{"sentence": s, "label": y, "idx": 0} for s, y in rows])
            for split, rows in held.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task("sst2")
    assert data.train.inputs == [("a",), ("b",)]
    assert data.dev["dev"].labels == [1.0]

    def offline(*_):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"SST-2: cannot be had from the Hub \(no network\); name the folder"):
        load_task("sst2")
