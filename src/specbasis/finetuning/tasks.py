"""Tasks: what is predicted from what, by which official metrics, and the examples of each split.

`specbasis.finetuning.sources` reads the examples. The dev set only ever yields the final score: whatever is chosen
is chosen on `TaskData.selection`, a fixed part of train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from specbasis.core.brief import brief
from specbasis.core.errors import InputError

CORRELATIONS = ("pearson", "spearman")
"""The metrics of regression."""


@dataclass(frozen=True)
class Layout:
    """Where the official files of a GLUE task, and its table at the Hub, hold what.

    Attributes:
        texts: names of the columns of the one or two texts.
        label: name of the column of the label; at the Hub it is always "label".
        header: column names of a file without a header line; empty where the first line names them.
        dev: names of the dev sets; the file is ``NAME.tsv``.
        drops_short: rows with missing columns occur inside of the official file, and are dropped (QQP).
        undivided: the original corpus's file, of train and dev together, which serves where ``train.tsv`` is not.
        pair: columns of its pairs' names; the official list, ``dev_ids.tsv``, says which pairs are dev.
        hub_texts: the text columns at the Hub, where they have other names.
    """

    texts: tuple[str, ...]
    label: str
    header: tuple[str, ...] = ()
    dev: tuple[str, ...] = ("dev",)
    drops_short: bool = False
    undivided: str = ""
    pair: tuple[str, ...] = ()
    hub_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        name: short, lower case: "cola".
        title: as the literature and the official folders write it: "CoLA".
        metrics: names in `metrics.METRICS`, official order; the score of a table is the first one, or the mean
            of the two correlations.
        labels: names of the classes, in the order of the logits; empty for regression.
        layout: the official files; None for a user's own task.
        images: the inputs are image files.
        pair: an example is two texts.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    layout: Layout | None = None
    images: bool = False
    pair: bool = False

    @property
    def regression(self) -> bool:
        """Whether the label is a number to be met, rather than a class."""
        return not self.labels

    def score(self, values: Mapping[str, float]) -> float:
        """The one number of a table: the first metric, or the mean of Pearson's and Spearman's correlations."""
        if self.metrics == CORRELATIONS:
            return (values["pearson"] + values["spearman"]) / 2
        return values[self.metrics[0]]


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_THREE = ("entailment", "neutral", "contradiction")
_COLA = Layout(("sentence",), "label", header=("source", "label", "mark", "sentence"))
_MRPC = Layout(
    ("#1 String", "#2 String"),
    "Quality",
    undivided="msr_paraphrase_train.txt",
    pair=("#1 ID", "#2 ID"),
    hub_texts=_PAIR,
)
_QQP = Layout(_QUESTIONS, "is_duplicate", drops_short=True)
_MNLI = Layout(_PAIR, "gold_label", dev=("dev_matched", "dev_mismatched"), hub_texts=("premise", "hypothesis"))

GLUE = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("matthews",), _BINARY, _COLA),
        Task("sst2", "SST-2", ("accuracy",), _BINARY, Layout(("sentence",), "label")),
        Task("mrpc", "MRPC", ("accuracy", "f1"), _BINARY, _MRPC, pair=True),
        Task("stsb", "STS-B", CORRELATIONS, (), Layout(_PAIR, "score"), pair=True),
        Task("qqp", "QQP", ("accuracy", "f1"), _BINARY, _QQP, pair=True),
        Task("mnli", "MNLI", ("accuracy",), _THREE, _MNLI, pair=True),
        Task("qnli", "QNLI", ("accuracy",), _ENTAILMENT, Layout(("question", "sentence"), "label"), pair=True),
        Task("rte", "RTE", ("accuracy",), _ENTAILMENT, Layout(_PAIR, "label"), pair=True),
        Task("wnli", "WNLI", ("accuracy",), _BINARY, Layout(_PAIR, "label"), pair=True),
    )
}
"""GLUE by name: the eight tasks of Yu et al. 2026, Tab. 1, and WNLI. Metrics: Wang et al. 2019 (GLUE), Tab. 1."""


def task_key(name: str) -> str:
    """A task's name without what people spell differently; empty for what can only be a path."""
    return "" if "/" in name or "." in name else "".join(c for c in name.lower() if c.isalnum())


def task_named(name: str) -> Task:
    """The GLUE task of a name, however it is spelt: SST-2, sst2, sst_2.

    Raises:
        InputError: no such task.
    """
    key = task_key(name)
    if key not in GLUE:
        raise InputError(
            f"got task {name!r}; want one of {', '.join(GLUE)}, or the path of a table (.csv .tsv .json .jsonl "
            ".parquet) or of a folder of images"
        )
    return GLUE[key]


@brief
@dataclass(frozen=True, eq=False)
class Split:
    """Examples: the texts (or the path of the image) of each, and its label.

    Attributes:
        inputs: one tuple an example: one text, two texts, or one path.
        labels: index of the class, or the value for regression.
        rows: the number of each in the file that it came from, as messages count: lines, the header's being 1, or
            objects; empty where there is no such file.
    """

    inputs: list[tuple[str, ...]]
    labels: list[float]
    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> Split:
        """The examples of these indices, in this order."""
        order = list(indices)
        rows = [self.rows[i] for i in order] if self.rows else []
        return Split([self.inputs[i] for i in order], [self.labels[i] for i in order], rows)

    def by_content(self) -> list[int]:
        """The indices, ordered by a hash of the examples' content: the same whatever the seed and the method."""

        def key(index: int) -> bytes:
            text = "\x1f".join((*self.inputs[index], repr(self.labels[index]), str(index)))
            return hashlib.blake2b(text.encode(), digest_size=16).digest()

        return sorted(range(len(self)), key=key)


@brief
@dataclass(frozen=True, eq=False)
class TaskData:
    """A task with its examples.

    Attributes:
        task: what is predicted.
        train: what is trained on.
        dev: dev sets by name; MNLI has two.
        selection: a fixed part of the source's train, never trained on; empty unless `subset` made it.
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
    first, size = selection or 0, len(data.train)
    if first + (examples or 1) > size:
        raise InputError(
            f"{data.task.title}: train holds {size} examples; got {first} to choose on and "
            f"{examples or 'the rest'} to train on"
        )
    order = data.train.by_content()
    rest = order[first : first + examples] if examples else order[first:]
    return replace(data, train=data.train.take(sorted(rest)), selection=data.train.take(sorted(order[:first])))


def selection_size(train: int) -> int:
    """How many examples of train are kept for choosing: a tenth, at most 2000."""
    return min(2000, max(1, train // 10))
