"""Where the examples of a task come from: GLUE's official files, the Hub, a table of texts, a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specbasis.checkpoint.entry import first_line
from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.core.options import takes
from specbasis.finetuning.options import Source
from specbasis.finetuning.tables import READERS, class_names, column_names, examples, lines, read_table, tab_rows
from specbasis.finetuning.tasks import CORRELATIONS, GLUE, Layout, Split, Task, TaskData, task_key, task_named


@takes(Source)
def load_task(source: str | Path, where: Source | None = None, **keywords: Any) -> TaskData:
    """Read a task and all of its examples.

    Args:
        source: name of a GLUE task; or the path of a table of texts, or of a folder of images, one folder a class.
        where: without ``data_dir`` GLUE comes from the Hub; ``dev`` is a table or folder like ``source``, and
            without it every tenth example of ``source``, by content, is the dev set.
        **keywords: the fields of `Source`, in place of ``where``.

    Raises:
        InputError: no such task, file or column, an empty or truncated file, or a label that is none; names the
            line.
    """
    where = Source.of(where, keywords)
    path = Path(source).expanduser()
    named = isinstance(source, str) and task_key(source) in GLUE  # even where a run's folder is called like a task
    if not named and (path.suffix.lower() in READERS or path.is_dir() or where.dev is not None):
        return _own_task(path, None if where.dev is None else Path(where.dev).expanduser(), where)
    task = task_named(str(source))
    if where.text or where.label or where.regression or where.dev is not None:
        raise InputError(
            f"{task.title} names its own columns and dev set; --text, --label, --dev and --regression are for your "
            "own table (a path to it that is called like a task is written ./NAME)"
        )
    assert task.layout is not None
    notes: list[str] = []
    if where.data_dir is None:
        train, *devs = _glue_hub(task, task.layout)
    else:
        train, *devs = _glue_folder(task, task.layout, Path(where.data_dir).expanduser(), notes)
    names = (name.removeprefix("dev_") for name in task.layout.dev)  # of several, each file begins so
    return TaskData(task, train, dict(zip(names, devs, strict=True)), notes=tuple(notes))


# --- GLUE ---------------------------------------------------------------------------------------------------------

_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


def _glue_folder(task: Task, layout: Layout, root: Path, notes: list[str]) -> list[Split]:
    """Train and the dev sets from the official files."""
    folder = root / task.title
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; want a folder with GLUE, such as {folder}/train.tsv")
    if not folder.is_dir():
        raise InputError(f"{root}: holds no folder {task.title}; want {folder}/train.tsv")
    undivided = folder / layout.undivided
    if layout.undivided and undivided.is_file() and not (folder / "train.tsv").exists():
        return _divided(task, layout, undivided, notes)
    columns, splits = (*layout.texts, layout.label), []
    for path in (folder / f"{name}.tsv" for name in ("train", *layout.dev)):
        rows = tab_rows(path, header=layout.header, columns=columns, drops_short=layout.drops_short, notes=notes)
        splits.append(examples(rows, str(path), layout.texts, layout.label, task.labels))
    return splits


def _divided(task: Task, layout: Layout, path: Path, notes: list[str]) -> list[Split]:
    """Train and dev from the original corpus's one file and the official list of the pairs that are dev."""
    listed = next((path.with_name(name) for name in _DEV_IDS if path.with_name(name).is_file()), None)
    if listed is None:
        raise InputError(
            f"{path.parent}: holds {path.name}, but neither train.tsv nor {_DEV_IDS[0]}, GLUE's list of the pairs "
            "that are the dev set; put it there"
        )
    pairs = {tuple(line.split("\t")) for _, line in lines(listed)}
    rows = list(tab_rows(path, columns=(*layout.texts, layout.label, *layout.pair), notes=notes))
    is_dev = [tuple(row[name] for name in layout.pair) in pairs for _, row in rows]
    if not any(is_dev) or all(is_dev):
        raise InputError(
            f"{listed}: names {sum(is_dev)} of the {len(rows)} pairs of {path.name}; want GLUE's own list"
        )
    whole = examples(rows, str(path), layout.texts, layout.label, task.labels)
    return [whole.take(i for i, held in enumerate(is_dev) if held is part) for part in (False, True)]


def _glue_hub(task: Task, layout: Layout) -> list[Split]:
    """Train and the dev sets from the Hub."""
    # Without it the folder of the official files serves as well (--data-dir).
    datasets = require("datasets", purpose=f"{task.title} from the Hub needs")
    names = ("train", *(name.replace("dev", "validation") for name in layout.dev))
    try:
        repository = datasets.load_dataset("nyu-mll/glue", task.name)
        tables = [repository[name] for name in names]
    except Exception as error:  # the client's errors are of many classes
        raise InputError(
            f"{task.title}: cannot be had from the Hub ({first_line(error)}); name the folder of its official "
            "files with --data-dir"
        ) from error
    where, columns, indices = f"nyu-mll/glue {task.name}", layout.hub_texts or layout.texts, range(len(task.labels))
    return [examples(enumerate(table, 1), where, columns, "label", indices) for table in tables]


# --- a user's own task --------------------------------------------------------------------------------------------

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_DEV_FOLDERS = ("dev", "val", "valid", "validation", "test")


def _own_task(path: Path, dev: Path | None, where: Source) -> TaskData:
    text, label, regression = where.text, where.label, where.regression
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
            f"{', '.join(column_names(path))}"
        )
    if len(text) > 2:
        raise InputError(f"got {len(text)} columns of text ({', '.join(text)}); want one or two")
    rows = list(read_table(path, (*text, label)))
    names = () if regression else class_names(rows, str(path), label)
    metrics = CORRELATIONS if regression else ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
    train = examples(rows, str(path), text, label, names)
    held = examples(read_table(dev, (*text, label)), str(dev), text, label, names) if dev else None
    return _with_dev(Task(path.stem, path.stem, metrics, names, pair=len(text) == 2), train, held)


def _with_dev(task: Task, train: Split, dev: Split | None) -> TaskData:
    if dev is not None:
        return TaskData(task, train, {"dev": dev})
    if len(train) < 2:
        raise InputError(f"{task.title}: one example cannot be both trained on and held back; want more examples")
    order, count = train.by_content(), max(1, len(train) // 10)
    note = f"no dev set was given: {count} of {len(train)} examples, chosen by content, are the dev set"
    dev, rest = train.take(sorted(order[:count])), train.take(sorted(order[count:]))
    return TaskData(task, rest, {"dev": dev}, notes=(note,))


def _image_task(path: Path, dev: Path | None) -> TaskData:
    train_folder = path / "train" if (path / "train").is_dir() else path
    if dev is None and train_folder != path:
        dev = next((path / name for name in _DEV_FOLDERS if (path / name).is_dir()), None)
    names = _folders(train_folder)
    if len(names) < 2:
        raise InputError(
            f"{train_folder}: holds {len(names)} folders; want one folder of images for each of two classes or more"
        )
    task = Task(path.name, path.name, ("accuracy",), names, images=True)
    return _with_dev(task, _images(train_folder, names), None if dev is None else _images(dev, names))


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(place.name for place in folder.iterdir() if place.is_dir()))


def _images(folder: Path, names: Sequence[str]) -> Split:
    unknown = [name for name in _folders(folder) if name not in names]
    if unknown:
        raise InputError(f"{folder}: class {unknown[0]!r} is not among those of train: {', '.join(names)}")
    split = Split([], [])
    for index, name in enumerate(names):
        for file in sorted((folder / name).rglob("*")):
            if file.suffix.lower() in _IMAGES:
                split.inputs.append((str(file),))
                split.labels.append(float(index))
    if not split.labels:
        raise InputError(f"{folder}: holds no images ({' '.join(sorted(_IMAGES))})")
    return split
