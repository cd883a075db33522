"""Tasks: what is predicted from what, the official metrics, and the examples, from whatever file holds them.

GLUE comes from a folder in its official layout or from the Hub; a user's own task from a table of texts or a
folder of
images. The dev set only ever yields the final score: whatever is chosen is chosen on `TaskData.selection`, a fixed
part of train.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specbasis.core.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where the official files of a GLUE task hold what.

    Attributes:
        texts: names of the columns of the one or two texts.
        label: name of the column of the label.
        header: column names of a file without a header line; empty where the first line names them.
        dev: name of each dev set, and its file.
        drops_short: rows with missing columns occur inside of the official file, and are dropped (QQP).
        undivided: the original corpus's file, of train and dev together, which serves where ``train.tsv`` is not.
        pair: columns of its pairs' names; the official list, ``dev_ids.tsv``, says which pairs are dev.
    """

    texts: tuple[str, ...]
    label: str
    header: tuple[str, ...] = ()
    dev: Mapping[str, str] = field(default_factory=lambda: {"dev": "dev.tsv"})
    drops_short: bool = False
    undivided: str = ""
    pair: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        name: short, lower case: "cola".
        title: as the literature writes it: "CoLA".
        metrics: names in `metrics.METRICS`, official order; the score of a table is the first one, or the mean
            of the two correlations.
        labels: names of the classes, in the order of the logits; empty for regression.
        layout: the official files; None for a user's own task.
        hub: (texts, label) columns at the Hub.
        images: the inputs are image files.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    layout: Layout | None = field(default=None, hash=False)
    hub: tuple[tuple[str, ...], str] = ((), "label")
    images: bool = False

    @property
    def regression(self) -> bool:
        """Whether the label is a number to be met, rather than a class."""
        return not self.labels

    def score(self, values: Mapping[str, float]) -> float:
        """The one number of a table: the first metric, or the mean of Pearson's and Spearman's correlations."""
        if self.metrics == CORRELATIONS:
            return (values["pearson"] + values["spearman"]) / 2
        return values[self.metrics[0]]


CORRELATIONS = ("pearson", "spearman")
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("matthews",),
            ("0", "1"),
            Layout(("sentence",), "label", ("source", "label", "mark", "sentence")),
            (("sentence",), "label"),
        ),
        Task(
            "sst2",
            "SST-2",
            ("accuracy",),
            ("0", "1"),
            Layout(("sentence",), "label"),
            (("sentence",), "label"),
        ),
        Task(
            "mrpc",
            "MRPC",
            ("accuracy", "f1"),
            ("0", "1"),
            Layout(
                ("#1 String", "#2 String"),
                "Quality",
                undivided="msr_paraphrase_train.txt",
                pair=("#1 ID", "#2 ID"),
            ),
            (_PAIR, "label"),
        ),
        Task("stsb", "STS-B", CORRELATIONS, (), Layout(_PAIR, "score"), (_PAIR, "label")),
        Task(
            "qqp",
            "QQP",
            ("accuracy", "f1"),
            ("0", "1"),
            Layout(("question1", "question2"), "is_duplicate", drops_short=True),
            (("question1", "question2"), "label"),
        ),
        Task(
            "mnli",
            "MNLI",
            ("accuracy",),
            ("entailment", "neutral", "contradiction"),
            Layout(
                _PAIR,
                "gold_label",
                dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
            ),
            (("premise", "hypothesis"), "label"),
        ),
        Task(
            "qnli",
            "QNLI",
            ("accuracy",),
            _ENTAILMENT,
            Layout(("question", "sentence"), "label"),
            (("question", "sentence"), "label"),
        ),
        Task("rte", "RTE", ("accuracy",), _ENTAILMENT, Layout(_PAIR, "label"), (_PAIR, "label")),
        Task("wnli", "WNLI", ("accuracy",), ("0", "1"), Layout(_PAIR, "label"), (_PAIR, "label")),
    )
}
"""GLUE by name: the eight tasks of Yu et al. 2026, Tab. 1, and WNLI. Metrics: Wang et al. 2019 (GLUE), Tab. 1."""

_HUB_DEV = {"mnli": {"matched": "validation_matched", "mismatched": "validation_mismatched"}}


@dataclass(frozen=True, eq=False)
class Split:
    """Examples: the texts (or the path of the image) of each, and its label.

    Attributes:
        inputs: one tuple an example: one text, two texts, or one path.
        labels: index of the class, or the value for regression.
    """

    inputs: list[tuple[str, ...]]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> Split:
        """The examples of these indices, in this order."""
        chosen = list(indices)
        return Split([self.inputs[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its examples.

    Attributes:
        task: what is predicted.
        train: what is trained on.
        selection: a fixed part of the source's train, never trained on; empty unless `split_for_selection` made it.
        dev: dev sets by name; MNLI has two.
        digest: SHA-256 over every example, in order.
        notes: what was dropped or decided while reading.
    """

    task: Task
    train: Split
    dev: dict[str, Split]
    selection: Split = field(default_factory=lambda: Split([], []))
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over inputs and labels of train, selection and dev."""
        sha = hashlib.sha256()
        for split in (self.train, self.selection, *self.dev.values()):
            for inputs, label in zip(split.inputs, split.labels, strict=True):
                sha.update("\x1f".join((*inputs, repr(label))).encode() + b"\x1e")
        return sha.hexdigest()


def task_named(name: str) -> Task:
    """The GLUE task of a name, however it is spelt: SST-2, sst2, sst_2.

    Raises:
        InputError: no such task.
    """
    key = _task_key(name)
    if key not in GLUE:
        raise InputError(
            f"got task {name!r}; want one of {', '.join(GLUE)}, or the path of a table (.csv .tsv .json .jsonl "
            ".parquet) or of a folder of images"
        )
    return GLUE[key]


def _task_key(name: str) -> str:
    return "" if "/" in name or "." in name else "".join(c for c in name.lower() if c.isalnum())


def load_task(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    dev: str | Path | None = None,
    text: Sequence[str] = (),
    label: str = "",
    regression: bool = False,
) -> TaskData:
    """Read a task and all of its examples.

    Args:
        source: name of a GLUE task; or the path of a table of texts, or of a folder of images, one folder a class.
        data_dir: folder with GLUE in its official layout (``CoLA/train.tsv`` …); without it GLUE comes from the
            Hub.
        dev: the user's dev set, a table or folder like ``source``; without it every tenth example of ``source``, by
            content, is the dev set.
        text: the columns of a table that hold the one or two texts.
        label: the column that holds the label.
        regression: the label is a number, not a class.

    Raises:
        InputError: no such task, file or column, an empty or truncated file, or a label that is none; names the
        line.
    """
    path = Path(source).expanduser()
    named = isinstance(source, str) and _task_key(source) in GLUE  # even where a run's folder is called like a task
    if not named and (path.suffix.lower() in _READERS or path.is_dir() or dev is not None):
        return _own_task(path, None if dev is None else Path(dev).expanduser(), tuple(text), label, regression)
    task = task_named(str(source))
    if text or label or regression or dev is not None:
        raise InputError(
            f"{task.title} names its own columns and dev set; --text, --label, --dev and --regression are for your "
            "own table (a path to it that is called like a task is written ./NAME)"
        )
    return _glue_folder(task, Path(data_dir).expanduser()) if data_dir is not None else _glue_hub(task)


def subset(data: TaskData, *, examples: int | None = None, selection: int | None = None) -> TaskData:
    """A fixed part of train, and a fixed part of the rest to choose on: the same for every seed and method.

    Examples are ordered by the hash of their content, so the parts depend on nothing else than the data.

    Args:
        data: the task.
        examples: how many to train on; all that are not in the selection by default.
        selection: how many to keep for choosing; none by default.

    Raises:
        InputError: train holds fewer.
    """
    held, wanted, there = selection or 0, examples or 0, len(data.train)
    if held + max(wanted, 1) > there:
        raise InputError(
            f"{data.task.title}: train holds {there} examples; got {held} to choose on and "
            f"{examples or 'the rest'} to "
            "train on"
        )
    order = sorted(range(there), key=lambda i: _content_key(data.train, i))
    chosen = order[held : held + wanted] if examples else order[held:]
    return replace(data, train=data.train.take(sorted(chosen)), selection=data.train.take(sorted(order[:held])))


def selection_size(train: int) -> int:
    """How many examples of train are kept for choosing: a tenth, at most 2000."""
    return min(2000, max(1, train // 10))


def _content_key(split: Split, index: int) -> bytes:
    text = "\x1f".join((*split.inputs[index], repr(split.labels[index]), str(index)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- GLUE -------------------------------------------------------------------------------------------------------

_FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI"} | {
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


def _glue_folder(task: Task, root: Path) -> TaskData:
    assert task.layout is not None
    if not root.is_dir():
        raise InputError(
            f"{root}: no such folder; want a folder with GLUE, such as {root}/{_FOLDERS[task.name]}/train.tsv"
        )
    folder = root / _FOLDERS[task.name]
    if not folder.is_dir():
        raise InputError(f"{root}: holds no folder {_FOLDERS[task.name]}; want {folder}/train.tsv")
    files = {"train": "train.tsv", **task.layout.dev}
    notes: list[str] = []
    undivided = folder / task.layout.undivided
    if task.layout.undivided and undivided.is_file() and not (folder / files["train"]).exists():
        splits = _divided(task, undivided, notes)
    else:
        splits = {name: _official(task, folder / file, notes) for name, file in files.items()}
    return TaskData(task, splits.pop("train"), splits, notes=tuple(notes))


def _official(task: Task, path: Path, notes: list[str]) -> Split:
    """Examples of one official TSV: quoting off, since its quotes are text and do not balance."""
    layout = task.layout
    assert layout is not None
    rows = _tsv_rows(path, layout, notes)
    return _examples(rows, str(path), layout.texts, layout.label, _classes(task.labels), task.regression)


def _divided(task: Task, path: Path, notes: list[str]) -> dict[str, Split]:
    """Train and dev from the original corpus's one file and the official list of the pairs that are dev."""
    layout = task.layout
    assert layout is not None
    listed = next((path.with_name(name) for name in _DEV_IDS if path.with_name(name).is_file()), None)
    if listed is None:
        raise InputError(
            f"{path.parent}: holds {path.name}, but neither train.tsv nor {_DEV_IDS[0]}, GLUE's list of the pairs "
            "that are the dev set; put it there"
        )
    pairs = {tuple(line.split("\t")) for _, line in _lines(listed)}
    rows = list(_tsv_rows(path, layout, notes))
    _want_columns(rows[0][1] if rows else (), layout.pair, str(path))
    held = [tuple(row[name] for name in layout.pair) in pairs for _, row in rows]
    if not any(held) or all(held):
        raise InputError(
            f"{listed}: names {sum(held)} of the {len(rows)} pairs of {path.name}; want GLUE's own list"
        )
    return {
        name: _examples(
            (row for row, dev in zip(rows, held, strict=True) if dev == wanted),
            *(str(path), layout.texts, layout.label, _classes(task.labels), task.regression),
        )
        for name, wanted in (("train", False), ("dev", True))
    }


def _tsv_rows(path: Path, layout: Layout, notes: list[str]) -> Iterator[tuple[int, Row]]:
    lines = _lines(path, notes)
    header = layout.header or tuple(next(lines, (0, ""))[1].split("\t"))
    _want_columns(header, (*layout.texts, layout.label), str(path))
    short, last = 0, 0
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) < len(header) and layout.drops_short:
            short, last = short + 1, number
            continue
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {number}: {len(fields)} columns, want {len(header)}; is the file truncated? "
                f"get it again"
            )
        yield number, dict(zip(header, fields, strict=True))
        last = 0
    if last:
        raise InputError(f"{path}, line {last}: the last line lacks columns; is the file truncated? get it again")
    if short:
        notes.append(f"{path.name}: {short} rows with missing columns dropped, which occur in the official file")


def _glue_hub(task: Task) -> TaskData:
    texts, label = task.hub
    splits = {"train": "train", **_HUB_DEV.get(task.name, {"dev": "validation"})}
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{task.title} from the Hub needs `datasets`: pip install 'specbasis[finetune]', or name the "
            f"folder of its "
            "official files with --data-dir"
        ) from None
    try:
        held = datasets.load_dataset("nyu-mll/glue", task.name)
        tables = {name: held[split] for name, split in splits.items()}
    except Exception as error:  # the client's errors are of many classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{task.title}: cannot be had from the Hub ({first}); name the folder of its official files "
            f"with --data-dir"
        ) from error
    classes = {i: i for i in range(len(task.labels))}
    found = {
        name: _examples(enumerate(table, 1), f"nyu-mll/glue {task.name}", texts, label, classes, task.regression)
        for name, table in tables.items()
    }
    return TaskData(task, found.pop("train"), found)


# --- a user's own task ------------------------------------------------------------------------------------------

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_DEV_NAMES = ("dev", "val", "valid", "validation", "test")


def _own_task(path: Path, dev: Path | None, text: tuple[str, ...], label: str, regression: bool) -> TaskData:
    for place in filter(None, (path, dev)):
        if not place.exists():
            raise InputError(f"{place}: no such file or folder")
    if path.is_dir():
        if text or label or regression:
            raise InputError(f"{path}: is a folder of images, whose classes are folders; leave out --text, --label")
        return _image_task(path, dev)
    if not text or not label:
        raise InputError(
            f"{path}: say which columns hold what, such as --text sentence --label label; the file has "
            f"{', '.join(_columns(path))}"
        )
    if len(text) > 2:
        raise InputError(f"got {len(text)} columns of text ({', '.join(text)}); want one or two")
    rows = list(_table(path, (*text, label)))
    names = () if regression else _class_names(rows, str(path), label)
    task = Task(
        path.stem,
        path.stem,
        CORRELATIONS if regression else ("accuracy", "f1") if len(names) == 2 else ("accuracy",),
        names,
        hub=(text, label),
    )
    train = _examples(rows, str(path), text, label, _classes(names), regression)
    held = (
        _examples(_table(dev, (*text, label)), str(dev), text, label, _classes(names), regression) if dev else None
    )
    return _with_dev(task, train, held)


def _with_dev(task: Task, train: Split, dev: Split | None) -> TaskData:
    if dev is not None:
        return TaskData(task, train, {"dev": dev})
    order = sorted(range(len(train)), key=lambda i: _content_key(train, i))
    count = max(1, len(train) // 10)
    if len(train) < 2:
        raise InputError(f"{task.title}: one example cannot be both trained on and held back; want more examples")
    note = f"no dev set was given: {count} of {len(train)} examples, chosen by content, are the dev set"
    return TaskData(
        task, train.take(sorted(order[count:])), {"dev": train.take(sorted(order[:count]))}, notes=(note,)
    )


def _class_names(rows: Iterable[tuple[int, Row]], where: str, label: str) -> tuple[str, ...]:
    """Names of the classes, numbers in numerical order."""
    names = set()
    for number, row in rows:
        value = row.get(label)
        if not _is_plain(value) or value == "":
            raise InputError(
                f"{where}, line {number}: {label} is {_shown(value)}; want the name of a class; leave rows without "
                "a label out"
            )
        names.add(_as_text(value))
    if len(names) > 1000:
        raise InputError(f"{where}: {label} has {len(names)} different values; want classes, or say --regression")
    if len(names) < 2:
        raise InputError(f"{where}: {label} has one value only ({', '.join(names)}); want at least two classes")
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def _columns(path: Path) -> list[str]:
    return list(next(iter(_READERS[path.suffix.lower()](path)), (0, {}))[1])


def _table(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """Rows of a table with their line numbers.

    Raises:
        InputError: a format that is not known, an empty or damaged file, a column that is not there.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path}: got a {suffix or 'file without a suffix'}; want {' '.join(_READERS)}")
    rows = _READERS[suffix](path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    _want_columns(first[1], wanted, str(path))
    yield first
    yield from rows


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if not header:
                return
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(fields)} columns, the header has "
                        f"{len(header)}; is the "
                        "file truncated, or a text with commas not quoted?"
                    )
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not a readable CSV: {error}") from error


def _tab_rows(path: Path) -> Iterator[tuple[int, Row]]:
    lines = _lines(path)
    header = next(lines, (0, ""))[1].split("\t")
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise InputError(f"{path}, line {number}: {len(fields)} columns, the header has {len(header)}")
        yield number, dict(zip(header, fields, strict=True))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        yield number, _json_object(path, number, line)


def _json_object(path: Path, number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON: {error}; is the file truncated?") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number}: got a {type(value).__name__}; want an object a line")
    return value


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects; or an object a line, which is often called .json too."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise InputError(f"{path}: is empty")
        value = json.loads(text)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        try:
            yield from list(_jsonl_rows(path))
        except InputError:
            raise InputError(f"{path}: not JSON: {error}; is the file truncated?") from error
        return
    if isinstance(value, dict):
        lists = [held for held in value.values() if isinstance(held, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise InputError(f"{path}: want a list of objects, one an example")
    yield from enumerate(value, 1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from enumerate(pq.read_table(path).to_pylist(), 1)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".csv": _csv_rows,
    ".tsv": _tab_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _image_task(path: Path, dev: Path | None) -> TaskData:
    train_dir = path / "train" if (path / "train").is_dir() else path
    if dev is None and train_dir != path:
        dev = next((path / name for name in _DEV_NAMES if (path / name).is_dir()), None)
    names = tuple(sorted(place.name for place in train_dir.iterdir() if place.is_dir()))
    if len(names) < 2:
        raise InputError(
            f"{train_dir}: holds {len(names)} folders; want one folder of images for each of two classes or more"
        )
    task = Task(path.name, path.name, ("accuracy",), names, images=True)
    return _with_dev(task, _images(train_dir, names), None if dev is None else _images(dev, names))


def _images(folder: Path, names: tuple[str, ...]) -> Split:
    unknown = sorted(place.name for place in folder.iterdir() if place.is_dir() and place.name not in names)
    if unknown:
        raise InputError(f"{folder}: class {unknown[0]!r} is not among those of train: {', '.join(names)}")
    found = [
        (str(file), index)
        for index, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in _IMAGES
    ]
    if not found:
        raise InputError(f"{folder}: holds no images ({' '.join(sorted(_IMAGES))})")
    return Split([(file,) for file, _ in found], [float(index) for _, index in found])


# --- rows into examples ---------------------------------------------------------------------------------------


def _examples(
    rows: Iterable[tuple[int, Row]],
    where: str,
    texts: Sequence[str],
    label: str,
    classes: Mapping[Any, int],
    regression: bool,
) -> Split:
    split = Split([], [])
    for number, row in rows:
        split.inputs.append(tuple(_text_of(row, column, where, number) for column in texts))
        value = row.get(label)
        split.labels.append(
            _number_of(value, where, number, label)
            if regression
            else _class_of(value, classes, where, number, label)
        )
    if not split.labels:
        raise InputError(f"{where}: holds no examples")
    return split


def _classes(names: Sequence[str]) -> dict[Any, int]:
    return {name: index for index, name in enumerate(names)}


def _text_of(row: Row, column: str, where: str, number: int) -> str:
    value = row.get(column)
    if value is None:
        raise InputError(f"{where}, line {number}: no {column}; want a text")
    if not _is_plain(value):
        raise InputError(f"{where}, line {number}: {column} is {_shown(value)}; want a text")
    text = _as_text(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}, line {number}: {column} holds half a character of UTF-16; want whole ones")
    return text


def _class_of(value: Any, classes: Mapping[Any, int], where: str, number: int, label: str) -> float:
    found = classes.get(value if type(value) is int and value in classes else _as_text(value))
    if found is None:
        some = ", ".join(map(str, list(classes)[:12])) + (" …" if len(classes) > 12 else "")
        raise InputError(f"{where}, line {number}: {label} is {_shown(value)}; want one of {some}")
    return float(found)


def _number_of(value: Any, where: str, number: int, label: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{where}, line {number}: {label} is {_shown(value)}; want a number")
    return found


def _is_plain(value: Any) -> bool:
    """Whether a cell holds one value: no list, no object, no bytes, and no NaN, which stands for nothing."""
    return value is not None and not isinstance(value, list | dict | bytes) and value == value


def _as_text(value: Any) -> str:
    """Text of a cell; 3.0 is 3, so that a table of numbers names its classes the same in every format."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _want_columns(there: Iterable[str], wanted: Sequence[str], where: str) -> None:
    held = list(there)
    missing = [column for column in wanted if column not in held]
    if held in ([], [""]):
        raise InputError(f"{where}: is empty")
    if missing:
        raise InputError(
            f"{where}: no column {missing[0]!r}; it has {', '.join(_shown(c)[1:-1] for c in held[:12])}"
        )


def _lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, ended by a line feed alone: texts hold other separators of Unicode.

    Args:
        path: of the file.
        notes: where it is said that the last line has no end, as in a file that was cut off.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            empty, line = True, "\n"
            for number, line in enumerate(file, 1):
                text = line.rstrip("\r\n")
                if text:
                    empty = False
                    yield number, text
        if notes is not None and not line.endswith("\n"):
            notes.append(f"{path.name}: its last line has no end; if the file is cut off, get it again")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable text: {error}") from error
    if empty:
        raise InputError(f"{path}: is empty")
