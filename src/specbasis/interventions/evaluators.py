"""Ready-made evaluators: each loads the model that it judges, and scores it example by example.

All of them are callables from a model to `Sample`s, so one's own is any function that does the same. Batches are
built once and used for every edit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.core.errors import InputError
from specbasis.core.statistics import Array
from specbasis.finetuning.metrics import METRICS
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import Split, Task, task_named
from specbasis.interventions.samples import Sample, perplexity, ratio

TOKENS = 4096
"""Tokens of one batch, padding included. More: fewer calls; less: less padding of short texts, less memory."""


class Judge(Protocol):
    """An evaluator that also knows how to load what it judges.

    Attributes:
        metric: the metric that figures show.
    """

    @property
    def metric(self) -> str:
        """The metric that figures show."""

    def load(self, source: str) -> nn.Module:
        """The model that a source holds."""

    def __call__(self, model: nn.Module) -> Mapping[str, Sample | float]:
        """Scores of every example."""


# --- texts that are classified -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Classification:
    """A task of texts or images with labels: GLUE, or one's own table or folder; see `specbasis.finetuning.tasks`.

    Attributes:
        source: name of a GLUE task, path of a table of texts, or of a folder of images with one folder a class.
        data_dir: folder with GLUE in its official layout; without it GLUE comes from the Hub.
        limit: judge on this many examples of the dev set, drawn once with a fixed seed; all where it has fewer.
        text: the columns of a table that hold the one or two texts.
        label: its column with the label.
        max_length: tokens at which texts are cut.
    """

    source: str
    data_dir: str | None = None
    limit: int | None = None
    text: tuple[str, ...] = ()
    label: str = ""
    max_length: int = 256
    _batches: dict[str, list[tuple[list[int], dict[str, Tensor]]]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}  # another process encodes for itself

    @cached_property
    def _data(self) -> tuple[Task, Split]:
        own = Path(self.source).expanduser()
        data = load_task(
            self.source,
            data_dir=self.data_dir,
            dev=own if own.exists() else None,
            text=self.text,
            label=self.label,
        )
        split = next(iter(data.dev.values()))
        if self.limit is not None and self.limit < len(split):
            chosen = np.random.default_rng(0).choice(len(split), self.limit, replace=False)
            split = split.take(sorted(chosen.tolist()))
        return data.task, split

    @property
    def metric(self) -> str:
        """The task's first metric."""
        return self._task.metrics[0]

    @property
    def _task(self) -> Task:
        return self._data[0] if Path(self.source).expanduser().exists() else task_named(self.source)

    def load(self, source: str) -> nn.Module:
        """A transformers model with the head that its folder holds."""
        import transformers

        images = self._task.images
        return _pretrained(
            transformers.AutoModelForImageClassification
            if images
            else transformers.AutoModelForSequenceClassification,
            source,
        )

    def __call__(self, model: nn.Module) -> dict[str, Sample | float]:
        """The task's metrics, from prediction and label of every example."""
        task, split = self._data
        labels = np.asarray(split.labels, dtype=np.float64)
        order = [] if task.regression else _label_order(model, task)
        predictions = np.zeros(len(split))
        with torch.inference_mode():
            for indices, batch in self._encoded(model):
                logits = model(**{name: x.to(_device(model)) for name, x in batch.items()}).logits.float().cpu()
                _want_finite(logits)
                outputs = logits[:, 0] if task.regression else logits[:, order].argmax(-1)
                predictions[indices] = outputs.numpy()
        values = np.stack([predictions, labels], axis=1)
        return {name: Sample(values, METRICS[name].statistic) for name in task.metrics}

    def _encoded(self, model: nn.Module) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of examples of like length, with their indices; texts are kept, images are read each time."""
        import transformers

        task, split = self._data
        place = _place(model)
        if task.images:
            yield from _images(transformers.AutoImageProcessor.from_pretrained(place), split)
            return
        if place not in self._batches:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            columns = [list(column) for column in zip(*split.inputs, strict=True)]
            longest = min(
                self.max_length, getattr(model.config, "max_position_embeddings", None) or self.max_length
            )
            encoded = tokenizer(*columns, truncation=True, max_length=longest)
            self._batches[place] = list(_padded(tokenizer, encoded, len(split)))
        yield from self._batches[place]


def _padded(tokenizer: Any, encoded: Any, count: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    names = [name for name in encoded if name in tokenizer.model_input_names]
    for indices in _by_length([len(ids) for ids in encoded["input_ids"]][:count]):
        items = [{name: encoded[name][i] for name in names} for i in indices]
        yield indices, dict(tokenizer.pad(items, return_tensors="pt"))


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of at most `TOKENS` tokens, of like length."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _images(processor: Any, split: Split) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    from PIL import Image

    for start in range(0, len(split), 32):
        indices = list(range(start, min(start + 32, len(split))))
        pictures = []
        for index in indices:
            with Image.open(split.inputs[index][0]) as picture:
                pictures.append(picture.convert("RGB"))
        yield indices, dict(processor(pictures, return_tensors="pt"))


def _label_order(model: Any, task: Task) -> list[int]:
    """Which logit belongs to each class of the task: by the names in the model's config where they agree."""
    named = {str(name).lower(): int(index) for name, index in (model.config.label2id or {}).items()}
    wanted = [str(name).lower() for name in task.labels]
    if set(wanted) <= set(named):
        return [named[name] for name in wanted]
    if model.config.num_labels != len(wanted):
        count = model.config.num_labels
        raise InputError(f"{_place(model)}: has {count} labels; the task has {len(wanted)} ({', '.join(wanted)})")
    return list(range(len(wanted)))


# --- texts that are predicted -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Text:
    """How well a language model predicts a text file: the loss of each passage, and the perplexity of all.

    A passage is what blank lines separate, or a line where there are none. A causal model predicts each token from
    those before it in its passage; a masked one predicts 15 % of the tokens, drawn once, from all others.

    Attributes:
        path: a text file, UTF-8.
        limit: judge on this many passages.
        max_length: tokens of a passage; longer ones are cut into several.
    """

    path: str
    limit: int | None = None
    max_length: int = 256
    metric: str = "perplexity"
    _batches: dict[str, list[tuple[list[int], dict[str, Tensor]]]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def load(self, source: str) -> nn.Module:
        """A transformers model with its language-model head, causal or masked as its config says."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(_address(source), trust_remote_code=False)
        masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.architectures or ())
        return _pretrained(
            transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM, source
        )

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``perplexity`` and ``loss`` (nats per predicted token), from loss and tokens of each passage."""
        rows: dict[int, Array] = {}
        with torch.inference_mode():
            for indices, batch in self._encoded(model):
                inputs = {name: x.to(_device(model)) for name, x in batch.items() if name != "labels"}
                logits, labels = model(**inputs).logits.float().cpu(), batch["labels"]
                if not type(model).__name__.endswith(("ForMaskedLM", "ForPreTraining")):
                    logits, labels = logits[:, :-1], labels[:, 1:]
                _want_finite(logits)
                losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
                for index, loss, label in zip(indices, losses.double(), labels, strict=True):
                    rows[index] = np.array([float(loss.sum()), float((label != -100).sum())])
        values = np.stack([rows[index] for index in sorted(rows) if rows[index][1] > 0])
        return {
            "perplexity": Sample(values, perplexity, higher_is_better=False),
            "loss": Sample(values, ratio, higher_is_better=False),
        }

    def _encoded(self, model: nn.Module) -> list[tuple[list[int], dict[str, Tensor]]]:
        place = _place(model)
        if place not in self._batches:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            longest = min(
                self.max_length, getattr(model.config, "max_position_embeddings", None) or self.max_length
            )
            encoded = tokenizer(
                _passages(self.path)[: self.limit],
                truncation=True,
                max_length=longest,
                return_overflowing_tokens=tokenizer.is_fast,
            )
            batches = list(_padded(tokenizer, encoded, len(encoded["input_ids"])))
            masked = type(model).__name__.endswith(("ForMaskedLM", "ForPreTraining"))
            for indices, batch in batches:
                _mask(batch, tokenizer, indices) if masked else _label(batch)
            self._batches[place] = batches
        return self._batches[place]


def _passages(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8 ({error}); want a text file") from error
    parts = text.split("\n\n") if "\n\n" in text else text.splitlines()
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise InputError(f"{path}: holds no text")
    return found


def _label(batch: dict[str, Tensor]) -> None:
    batch["labels"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)


def _mask(batch: dict[str, Tensor], tokenizer: Any, indices: Sequence[int]) -> None:
    """Hide 15 % of each passage's tokens, at least one, special ones excepted; the same ones every time."""
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
    noise = torch.stack(
        [torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(index)) for index in indices]
    )
    noise[special] = 2.0
    count = (0.15 * (~special).sum(1)).ceil().long()
    hidden = (noise.argsort(1).argsort(1) < count[:, None]) & ~special
    batch["labels"] = torch.where(hidden, ids, -100)
    batch["input_ids"] = torch.where(hidden, tokenizer.mask_token_id, ids)


# --- ANARCII ------------------------------------------------------------------------------------------------------

CHAINS: Mapping[str, str] = {"antibody": "HKL", "tcr": "ABGD", "shark": "H"}
"""Receptor → the chain types that its model numbers; germline V genes of sharks are in no package."""

_RESIDUES = "ACDEFGHIKLMNPQRSTVWXY"
_REMOVED = (111, 112, 110, 113, 109, 114, 108, 115, 107, 116, 106, 117)
"""The order in which IMGT leaves positions of CDR3 empty as it gets shorter than 13."""


@dataclass(frozen=True, eq=False)
class Numbering:
    """ANARCII's task: the IMGT number of every residue of a receptor's variable domain.

    Domains are germline V and J genes joined, whose numbers are known from IMGT's alignment; they come from the
    package ``anarci``, read as data. CDR3 is renumbered by IMGT's rule, since it is made of two genes.

    Attributes:
        receptor: a key of `CHAINS`.
        count: domains, spread evenly over chains and species, drawn with a fixed seed.
        metric: ``exact``, the share of domains whose labels are all right. Greedy decoding, which is what ANARCII
            does, gives exactly these right, since it takes the right path if and only if each step on it is the
            likeliest. ``labels`` is the share of labels, ``loss`` the nats of one, with the right ones before it.

    Source: Lefranc et al. 2003, IMGT unique numbering for V-domains; Dunbar & Deane 2016 for the germline table.
    """

    receptor: str
    count: int = 240
    metric: str = "exact"

    def __post_init__(self) -> None:
        if self.receptor not in CHAINS:
            raise InputError(f"got receptor {self.receptor!r}; want one of {', '.join(CHAINS)}")

    def load(self, source: str) -> nn.Module:
        """ANARCII's encoder–decoder with the weights of a checkpoint."""
        from specbasis.checkpoint import open_checkpoint

        try:
            from anarcii.inference.model import S2S, Decoder, Encoder
        except ImportError as error:
            raise InputError(
                "ANARCII's task needs anarcii and anarci: pip install 'specbasis[numbering]'"
            ) from error
        weights = open_checkpoint(source)
        device = torch.device("cpu")
        width = weights["encoder.tok_embedding.weight"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
        hidden = weights["encoder.layers.0.positionwise_feedforward.fc_1.weight"].shape[0]
        half = (width, layers, 4, hidden, 0.0, device)  # every published model has 4 heads
        tables = [weights[f"{side}.tok_embedding.weight"].shape[0] for side in ("encoder", "decoder")]
        model = S2S(Encoder(tables[0], *half), Decoder(tables[1], *half), 0, 0, device)
        model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
        ready: nn.Module = model.eval()
        return ready

    @cached_property
    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        domains = germline_domains(self.receptor, self.count)
        letters = {letter: 4 + index for index, letter in enumerate(_RESIDUES)}
        # Vocabulary of the decoder: 4 special tokens, 1 … 128, X, then the chains.
        chains = {letter: 4 + 128 + 1 + index for index, letter in enumerate(_decoder_chains(self.receptor))}
        encoded = [
            (
                torch.tensor([1, *(letters[residue] for residue in sequence), 2]),
                torch.tensor([1, chains[chain], *(3 + number for number in numbers), 2]),
            )
            for chain, sequence, numbers in domains
        ]
        encoded.sort(key=lambda pair: len(pair[0]))
        parts = (encoded[start : start + 128] for start in range(0, len(encoded), 128))
        return [
            (_together([source for source, _ in part]), _together([target for _, target in part])) for part in parts
        ]

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``exact``, ``labels`` and ``loss`` of every domain."""
        rows: list[Tensor] = []
        anarcii: Any = model
        with torch.inference_mode():
            for source, target in self._batches:
                hidden, inputs, labels = source == 0, target[:, :-1], target[:, 1:]
                later = torch.ones(inputs.shape[1], inputs.shape[1]).triu(1).bool()
                logits, _ = anarcii.decoder(inputs, anarcii.encoder(source, hidden), inputs == 0, later, hidden)
                _want_finite(logits)
                wanted = labels != 0
                loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * wanted
                right = (logits.argmax(-1) == labels) & wanted
                rows.append(torch.stack([loss.sum(1), right.sum(1), wanted.sum(1)], dim=1))
        loss_sum, right_sum, total = torch.cat(rows).double().numpy().T
        return {
            "exact": Sample((right_sum == total).astype(np.float64)[:, None]),
            "labels": Sample(np.stack([right_sum, total], axis=1), ratio),
            "loss": Sample(np.stack([loss_sum, total], axis=1), ratio, higher_is_better=False),
        }


def _together(sequences: list[Tensor]) -> Tensor:
    """Sequences of labels as one tensor, padded with zeros."""
    padded: Tensor = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return padded


def _decoder_chains(receptor: str) -> str:
    return "ABGD" if receptor == "tcr" else "HLK"


def germline_domains(receptor: str, count: int) -> list[tuple[str, str, list[int]]]:
    """(chain, residues, IMGT number of each) of variable domains joined from germline V and J genes.

    Raises:
        InputError: the package ``anarci`` is not installed.
    """
    genes = _germlines()
    random = np.random.default_rng(0)
    groups = [
        (chain, list(genes["V"][chain][species].values()), list(genes["J"][chain][species].values()))
        for chain in CHAINS[receptor]
        for species in sorted(genes["V"][chain])
        if species in genes["J"][chain]
    ]
    domains = []
    for number in range(20 * count):
        chain, heads, tails = groups[number % len(groups)]
        head, tail = (options[random.integers(len(options))] for options in (heads, tails))
        domain = _joined(head, tail)
        if domain and (chain, *domain) not in domains:
            domains.append((chain, *domain))
        if len(domains) == count:
            break
    return domains


def _joined(head: str, tail: str) -> tuple[str, list[int]] | None:
    """A V and a J gene as residues and numbers; None where a gene is incomplete or CDR3 is no germline one."""
    loop = (head[104:] + tail[:117]).replace("-", "")
    if head[22] != "C" or head[103] != "C" or tail[117] not in "WF" or not 3 <= len(loop) <= 13:
        return None
    left_out = set(_REMOVED[: 13 - len(loop)])
    numbers = [i + 1 for i in range(104) if head[i] != "-"]
    numbers += [n for n in range(105, 118) if n not in left_out]
    numbers += [i + 1 for i in range(117, 128) if tail[i] != "-"]
    residues = head[:104].replace("-", "") + loop + tail[117:].replace("-", "")
    return (residues, numbers) if set(residues) <= set(_RESIDUES) and len(residues) > 90 else None


def _germlines() -> Mapping[str, Any]:
    """The table of germline genes in the package anarci, read as a literal: the package is not imported."""
    import ast
    import importlib.util

    spec = importlib.util.find_spec("anarci")
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = Path(folders[0]) / "germlines.py" if folders else None
    if file is None or not file.is_file():
        raise InputError("germline sequences need the package anarci: pip install 'specbasis[numbering]'")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "all_germlines":
            found: Mapping[str, Any] = ast.literal_eval(node.value)
            return found
    raise InputError(f"{file}: holds no all_germlines; want anarci 2020 or newer")


# --- lm-evaluation-harness ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of lm-evaluation-harness, with one score for each example where it gives one.

    Attributes:
        tasks: names, separated by commas.
        limit: examples of each task.
        include: folder with task files of one's own.
        metric: the metric that figures show; the first that the first task reports by default.
    """

    tasks: str
    limit: int | None = None
    include: str | None = None
    metric: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_manager"}

    @cached_property
    def _manager(self) -> Any:
        """The harness's index of its tasks, which takes seconds to read."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                "harness tasks need lm-evaluation-harness: pip install 'specbasis[harness]'"
            ) from error
        return TaskManager(include_path=self.include)

    def load(self, source: str) -> nn.Module:
        """A causal language model of transformers."""
        import transformers

        return _pretrained(transformers.AutoModelForCausalLM, source)

    def __call__(self, model: nn.Module) -> dict[str, Sample | float]:
        """``TASK.METRIC`` for every task and metric."""
        manager = self._manager
        import transformers
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        tokenizer = transformers.AutoTokenizer.from_pretrained(_place(model), trust_remote_code=False)
        known: Any = model
        # What stands before a text of which every token counts; the harness fails where a tokenizer names nothing.
        first = [tokenizer.bos_token_id, tokenizer.eos_token_id, known.config.bos_token_id, 0]
        with redirect_stderr(StringIO()):  # its bars, once for every edit, would run over the grid's own
            found = simple_evaluate(
                HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=16,
                    prefix_token_id=next(token for token in first if token is not None),
                ),
                tasks=self.tasks.split(","),
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
            )
        scores: dict[str, Sample | float] = {}
        for task, results in found["results"].items():
            for key, value in results.items():
                metric, _, _ = key.partition(",")
                if isinstance(value, int | float) and not metric.endswith(("_stderr", "sample_len")):
                    each = [sample.get(metric) for sample in found["samples"].get(task, [])]
                    whole = each and all(isinstance(one, int | float) for one in each)
                    scores[f"{task}.{metric}"] = Sample(np.array(each, float)[:, None]) if whole else float(value)
        return scores


# --- what they share ----------------------------------------------------------------------------------------------


def judge(text: str, /, **options: Any) -> Judge:
    """The evaluator that a text names: ``glue:TASK``, ``table:FILE``, ``images:FOLDER``, ``text:FILE``,
    ``anarcii:RECEPTOR`` or ``harness:TASK,TASK``.

    Args:
        text: as above.
        options: ``data_dir`` (GLUE), ``text`` and ``label`` (tables), ``limit`` (all of them).

    Raises:
        InputError: none of these.
    """
    kind, _, what = text.partition(":")
    if kind not in _JUDGES or not what:
        raise InputError(f"got task {text!r}; want one of {', '.join(f'{name}:…' for name in _JUDGES)}")
    found: Judge = _JUDGES[kind](what, options)
    return found


_JUDGES: Mapping[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "glue": lambda what, o: Classification(task_named(what).name, o.get("data_dir"), o.get("limit")),
    "table": lambda what, o: Classification(
        what, None, o.get("limit"), tuple(o.get("text", ())), o.get("label", "")
    ),
    "images": lambda what, o: Classification(what, None, o.get("limit")),
    "text": lambda what, o: Text(what, o.get("limit")),
    "anarcii": lambda what, o: Numbering(what, o.get("limit") or 240),
    "harness": lambda what, o: Harness(what, o.get("limit")),
}


def _pretrained(kind: Any, source: str) -> nn.Module:
    place = _address(source)
    try:
        model: nn.Module = kind.from_pretrained(place, trust_remote_code=False, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: transformers cannot load it ({first})") from error
    return model.eval()


def _address(source: str) -> str:
    """What transformers' from_pretrained wants for a source."""
    from specbasis.checkpoint.places import locate

    if source.startswith("pkg:"):
        place, _ = locate(source)
        (file,), _ = place.provenance(["config.json"])
        return str(file.parent)
    return str(Path(source).expanduser()) if Path(source).expanduser().exists() else source.removeprefix("hub:")


def _place(model: Any) -> str:
    """Where a transformers model came from, which is where its tokenizer is."""
    place = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not place:
        raise InputError(
            f"{type(model).__name__}: does not say where it was loaded from; want a transformers model"
        )
    return place


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _want_finite(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model's outputs hold NaN or Inf")


def describe(evaluate: object) -> str:
    """An evaluator in a manifest: what was set and changes its numbers, in one line."""
    fields = vars(evaluate) if hasattr(evaluate, "__dict__") else {}
    set_to = {name: value for name, value in fields.items() if name[0] != "_" and value not in (None, "", ())}
    told = {
        name: value for name, value in set_to.items() if name != "data_dir"
    }  # a place; the same data is anywhere
    name = getattr(evaluate, "__qualname__", type(evaluate).__name__)
    return f"{name} {json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)}"
