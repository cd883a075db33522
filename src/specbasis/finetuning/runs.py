"""A finetune and its folder: adapter, `metrics.json`, `predictions.csv`, `manifest.json` and model card.

A run is (base, task, method, seed, protocol, placement). While it is under way its folder holds `checkpoints/` with
what is trained, so that a run that was killed goes on; `metrics.json` is written last and says that it is finished.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.checkpoint import Checkpoint, open_checkpoint, sha256, weights_sha256
from specbasis.checkpoint.atomic import whole, write_whole, writing
from specbasis.checkpoint.card import CARD
from specbasis.checkpoint.digest import proven
from specbasis.checkpoint.entry import watched
from specbasis.checkpoint.regular import read_json
from specbasis.checkpoint.writer import want_new, write_model
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.extras import quiet
from specbasis.core.options import takes
from specbasis.core.text import cell
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.options import FinetuneOptions, Placement, Protocol, Source, require_libraries
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tables import lines
from specbasis.finetuning.tasks import Split, Task, TaskData, selection_size, subset
from specbasis.jobs.environment import WHERE_USED, environment
from specbasis.jobs.folder import Folder, Kind, opened, plain, refuse_another, write_json

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from specbasis.finetuning.methods import Attached

RUN = Kind("run")
METRICS, MANIFEST, CHECKPOINTS = "metrics.json", "manifest.json", "checkpoints"
PREDICTIONS = "predictions.csv"
BASE_MODEL = "base"
"""Where the whole model is that was trained, if what was given as the base is an adapter on another one."""
LOGS = "runs"
"""Where transformers puts TensorBoard's files, below its own output."""
GRADIENT_EXAMPLES = 1024
"""Training examples that a gradient basis is made from by default. Larger: less noise, and a longer start."""
HELD_BACK = 128
"""How many held-back texts are taken where the user gives none."""


@brief
@dataclass(frozen=True)
class Finetuned:
    """A finished run.

    Attributes:
        folder: where it is; see the module.
        metrics: content of `metrics.json`.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def score(self) -> float:
        """The task's one number on the dev set (MNLI: matched)."""
        return float(self.metrics["score"])


@takes(FinetuneOptions)
def finetune(
    base: str | Path,
    task: str | Path | TaskData,
    method: str = "spectral",
    *,
    out: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
    **keywords: Any,
) -> Finetuned:
    """Finetune a base on a task by a method, and write adapter, metrics, predictions, manifest and model card.

    The same call goes on where a killed run stopped, and returns a finished run as it is.

    Args:
        base: pretrained model: folder, ``hub:org/name``, ``timm:name``, ``pkg:…``; see `base.load_base`. An
            adapter is written as a whole model to ``out/base`` first, which is then the base.
        task: name of a GLUE task, the path of a table or of a folder of images, or examples that are read already.
        method: name in `methods.METHODS`.
        out: folder of the run.
        callbacks: of transformers' Trainer, beside the method's own.
        **keywords: the fields of `FinetuneOptions`, below.

    Raises:
        InputError: an argument does not fit, the data are damaged, the folder holds another run, the disk is full.
    """
    require_libraries()
    from specbasis.finetuning.card import model_card
    from specbasis.finetuning.methods import method_named
    from specbasis.finetuning.train import Run, is_main_process, train

    options = FinetuneOptions.of(None, keywords)
    _check_report(options.report_to)
    method = method_named(method).name
    data = task if isinstance(task, TaskData) else load_task(task, options.part(Source))
    options, data = resolved(options, method, data)
    weights = open_checkpoint(base)
    unchanged = watched(weights.files)
    config = _config(base, weights_sha256(weights), data, method, options)
    folder = Path(out)
    from accelerate import PartialState

    with ExitStack() as alone, _one_line_on_a_full_disk(folder):
        with PartialState().main_process_first():  # of several processes the first one makes the folder
            if is_main_process():
                run = alone.enter_context(opened(folder, RUN, config))
                if "environment" not in run.manifest:
                    run.manifest["environment"] = environment(WHERE_USED)
                    run.write_manifest()
            else:
                refuse_another(folder, RUN.noun, RUN.read(folder)["config"], json.loads(json.dumps(config)))
        if (folder / METRICS).is_file():
            seal = RUN.read(folder).get("metrics", "")  # versions before seals have none
            if seal and seal != sha256(folder / METRICS):
                raise InputError(
                    f"{folder / METRICS}: is not what was written: its SHA-256 differs; delete it, and the same "
                    "command trains again"
                )
            return Finetuned(folder, read_json(folder / METRICS))
        if weights.under is not None:
            with PartialState().main_process_first():
                base = _whole_base(weights, folder.resolve() / BASE_MODEL)
        texts = held_back_texts(options.held_back, data, options.data_dir)
        training = Run(base, data, method, options, texts, unchanged=unchanged)
        metrics = train(training, folder, callbacks)
        predictions = metrics.pop("predictions")
        placed = {"coefficients": metrics.pop("coefficients")}
        metrics = plain(metrics)
        if is_main_process():
            _write_predictions(folder / PREDICTIONS, predictions, training.scored, data.task)
            write_whole(folder / CARD, model_card(config, metrics, data.task, folder))
            _finish(folder, metrics, placed if placed["coefficients"] else {})
    return Finetuned(folder, metrics)


def _finish(folder: Path, metrics: Mapping[str, Any], placed: Mapping[str, Any]) -> None:
    """Write the metrics of a finished run, their seal and what else was found into the manifest, and tidy up."""
    logs = folder / CHECKPOINTS / LOGS
    if logs.is_dir():
        logs.rename(folder / LOGS)
    write_json(folder / METRICS, metrics)  # whose presence says that the run is finished
    manifest = {**RUN.read(folder), **placed, "metrics": sha256(folder / METRICS)}
    Folder(folder, manifest, RUN).write_manifest()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _whole_base(adapted: Checkpoint, place: Path) -> Path:
    """The base that an adapter on a model comes to, as a folder that transformers loads; written once."""
    return place if place.is_dir() else write_model(adapted, place)


_HEAD = ("name", "title", "metrics", "labels", "images")
"""What a manifest says of the task that the head is for."""


def _config(
    base: str | Path, base_sha256: str, data: TaskData, method: str, options: FinetuneOptions
) -> dict[str, Any]:
    """What makes two runs the same."""
    protocol = dataclasses.asdict(options.part(Protocol))
    head = _HEAD + (("pair",) if options.head == "mean" else ())
    if options.head == "first":
        del protocol["head"]  # versions before know no other
    return {
        "base": str(base),
        "base_sha256": base_sha256,
        "task": data.task.name,
        "head": {name: getattr(data.task, name) for name in head},
        "data": data.digest,
        "method": method,
        "seed": options.seed,
        "protocol": protocol,
        "placement": dataclasses.asdict(options.part(Placement)),
        "cache_prefix": options.cache_prefix is not None,
    }


def _check_report(report_to: str) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    unknown = [name for name in report_to.split(",") if name not in (*installed, "all", "none")]
    if unknown:
        raise InputError(
            f"got report_to = {unknown[0]!r}; want none, or what is installed of what transformers reports to: "
            f"{', '.join(installed) or 'nothing is (pip install tensorboard)'}"
        )


def resolved(options: FinetuneOptions, method: str, data: TaskData) -> tuple[FinetuneOptions, TaskData]:
    """The options with the method's own epochs and learning rate, and the data without what is chosen on."""
    from specbasis.finetuning.methods import METHODS

    epochs, rate = METHODS[method].recipe(data.task.name)
    options = dataclasses.replace(
        options, epochs=options.epochs or epochs, learning_rate=options.learning_rate or rate
    )
    selection = selection_size(len(data.train)) if options.select == "best" else None
    if not len(data.selection) and (selection or options.examples):
        data = subset(data, examples=options.examples, selection=selection)
    if options.takes_gradient:
        count = min(options.basis_examples or GRADIENT_EXAMPLES, len(data.train))
        options = dataclasses.replace(options, basis_examples=count)
    return options, data


def load(folder: str | Path, base: str | Path | None = None) -> tuple[Any, Any]:
    """The finetuned model of a run's folder, in evaluation mode, and its tokenizer or image processor.

    Args:
        folder: of a finished run.
        base: where the base is now; by default where it was.

    Raises:
        InputError: the folder holds no finished run, or the base cannot be loaded.
    """
    attached, processor = _loaded(Path(folder), base)
    return attached.model.eval(), processor


def merge(folder: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Write the finetuned model of a run's folder, its labels and its tokenizer, as transformers loads a model.

    Args:
        folder: of a finished run.
        out: the new folder.
        base: where the base is now; by default where it was.

    Raises:
        InputError: as `load`; ``out`` is there and not empty; or the method is no change of the weights.
    """
    place = Path(out)
    want_new(place)
    attached, processor = _loaded(Path(folder), base)
    with quiet(), writing(place):
        attached.merged().save_pretrained(place)  # type: ignore[operator]
        processor.save_pretrained(place)
    return place


def _loaded(place: Path, base: str | Path | None) -> tuple[Attached, Any]:
    from specbasis.finetuning.base import load_base
    from specbasis.finetuning.methods import load as load_method

    try:
        config = proven(read_json(place / MANIFEST))["config"]
        task = Task(**config["head"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{place}: holds no run (no readable {MANIFEST}); want a folder that finetune wrote"
        ) from error
    if not (place / METRICS).is_file():
        raise InputError(f"{place}: the run is not finished; the same command goes on")
    with quiet():
        own = place / BASE_MODEL
        source = base or (own if own.is_dir() else config["base"])
        protocol = config["protocol"]
        head = protocol.get("head", "first")
        loaded = load_base(source, task, max_length=protocol["max_length"], head=head)
        return load_method(place, loaded.model), loaded.processor


def held_back_texts(
    source: str | Path | Sequence[str] | None, data: TaskData, data_dir: str | Path | None
) -> tuple[str, Sequence[str]]:
    """What the texts are that forgetting is measured on, and the texts.

    Raises:
        InputError: the file is not there, or holds no text.
    """
    if isinstance(source, str | Path):
        texts = [line for _, line in lines(Path(source)) if line.strip()]
        if len(texts) < 2:
            raise InputError(f"{source}: holds {len(texts)} texts; want one a line, at least two")
        return Path(source).name, texts
    if source is not None:
        return "given texts", list(source)
    if data.task.images:
        return "", ()
    if data_dir is not None and (Path(data_dir).expanduser() / "RTE" / "dev.tsv").is_file():
        rte = load_task("rte", data_dir=data_dir).dev["dev"]
        return "premises of RTE's dev set", sorted({inputs[0] for inputs in rte.inputs})[:HELD_BACK]
    name, split = next(iter(data.dev.items()))
    return f"texts of {data.task.title}'s {name} set", [" ".join(inputs) for inputs in split.inputs[:HELD_BACK]]


def _write_predictions(
    path: Path, packed: Mapping[str, Mapping[str, Any]], scored: Mapping[str, Split], task: Task
) -> None:
    """A line for each example that was scored: set, place in it from 0, where it came from, label, prediction.

    It came from a row of a table, by its number as `Split.rows` has it, or is an image, by its path.
    """

    def shown(value: float) -> float | str:
        return value if task.regression else task.labels[int(value)]

    with writing(path), whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("set", "example", "file" if task.images else "row", "label", "predicted"))
        for name, values in packed.items():
            predictions, split = Predictions.unpacked(values), scored[name]
            origins: Sequence[str | int] = [inputs[0] for inputs in split.inputs] if task.images else split.rows
            origins = origins or [""] * len(split)
            for example, (origin, label, predicted) in enumerate(
                zip(origins, predictions.labels, predictions.predicted, strict=True)
            ):
                cells = (cell(value) for value in (origin, shown(float(label)), shown(float(predicted))))
                table.writerow((name, example, *cells))


_FULL = ("No space left", "Disk quota exceeded", "inline_container")
"""What is in the message on a full disk; the last is torch.save's, which sees only that less was written."""


@contextmanager
def _one_line_on_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn what each library makes of a full disk into one line that names the folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not any(sign in str(error) for sign in _FULL):
            raise
        raise InputError(f"{folder}: no space left on the disk; free some, and the same command goes on") from error
