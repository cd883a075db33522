"""A finished finetune made small: as a LoRA, as cores, or as a difference; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.places import transformers_address
from specbasis.checkpoint.writer import stored_bytes, want_new
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.core.text import shareable
from specbasis.finetuning.tasks import TaskData
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.environment import environment
from specbasis.jobs.folder import locked
from specbasis.jobs.progress import Report, silent
from specbasis.treatment.cores import Cores
from specbasis.treatment.difference import Dense, Difference
from specbasis.treatment.form import Form, Source
from specbasis.treatment.heal import heal as healed
from specbasis.treatment.judged import Scores, compared, judge_pair, score
from specbasis.treatment.low_rank import LowRank
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.treated import Treated, weights_of, written_record
from specbasis.treatment.updates import Update, differing, share


@takes(ExtractOptions)
def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    judge: Judge | None = None,
    heal: TaskData | None = None,
    progress: Report | None = None,
    **keywords: Any,
) -> Extraction:
    """Write a finetune as a LoRA adapter that PEFT loads without specbasis, or in another form.

    For every matrix delta = tuned − base ≈ B A with B = U √S, A = √S Vh of its leading triplets: the best
    approximation of each rank (Eckart & Young). Scaling is 1. Nothing is dropped in silence: biases, norms, new
    heads, grown embeddings and what else has no low-rank update are carried whole (PEFT's ``modules_to_save`` and
    ``bias``), and what cannot be is listed with its share of ‖delta‖². A LoRA, DoRA or AdaLoRA as ``tuned`` is
    resized; the update of one that is stored as a product is not formed.

    As ``delta``, each matrix is stored as a few directions of 8 bits and what is left in 1, 2 or 4 bits an entry
    (`specbasis.checkpoint.delta`), directions and bits chosen at one price of a byte for all matrices; the folder
    is read wherever a finetune is. As ``dense``, what differs from the base is stored as it is, in the same folder.
    As ``spectral``, each matrix is the leading k × k core Uᵀ delta V in the singular vectors of its base, which are
    not stored but decomposed again: for finetunes that were trained so, and beside a LoRA of as many bytes.

    Where so many ranks are wanted that the factors of a matrix would take more bytes than the matrix, it is stored
    whole; ``rank`` alone gives every matrix what it says.

    One matrix and its factors are in memory at a time; the files of either model are read three times, the
    finetune's once with ``rank``.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetune, or a PEFT adapter of base.
        out: the new folder.
        options: all options as one value; or each as a keyword.
        judge: from a model to its metrics, such as `specbasis.interventions.evaluators.judge` makes: then base,
            finetune and what is written are judged.
        heal: a task, as `specbasis.finetuning.load_task` reads one: the LoRA is trained on its training examples
            for ``steps``, and judged before and after. The shares in the record are those before.
        progress: called as work goes on.
        **keywords: the fields of `ExtractOptions`, below.

    Raises:
        InputError: a source cannot be read, the two are no base and finetune, nothing differs, the size holds
            nothing, or ``out`` exists or is being written by another run.

    Source: Eckart & Young 1936; as LoRA extraction: thomwolf, peft #312 (2023), mergekit-extract-lora.
    Directions and bits together: Yao et al. 2024 (LQER, Delta-CoMe); Liu et al. 2024 (BitDelta).
    """
    chosen, out = ExtractOptions.of(options, keywords), Path(out)
    if heal is not None:
        if chosen.form != "lora" or isinstance(base, Mapping):
            raise InputError("got a task to heal on; want --as lora, and a base that transformers loads")
        transformers_address(base)  # raises where it loads none
    want_new(out)
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    report = progress or silent
    with locked(out, beside=True):
        want_new(out)
        changes = differing(pretrained, finetuned, report)
        scores = judge_pair(pretrained, finetuned, judge) if judge is not None else {}
        form = FORMS[chosen.form](pretrained, finetuned, changes, chosen, report, base)
        with writing(out), whole(out) as temporary:
            temporary.mkdir()
            form.write(temporary)
            tested = _tested(form, temporary, base, chosen, scores, judge, heal)
            record = {**_record(form, temporary), **environment(("transformers", "peft")), **tested}
            record = written_record(temporary / Extraction.RECORD, record)
    return Extraction(out, record)


FORMS: dict[str, type[Form]] = {"lora": LowRank, "spectral": Cores, "delta": Difference, "dense": Dense}
"""What a finetune can be extracted as."""


def _tested(
    form: Form,
    folder: Path,
    base: Any,
    options: ExtractOptions,
    scores: Mapping[str, Scores],
    judge: Judge | None,
    heal: TaskData | None,
) -> dict[str, Any]:
    """The scores of what was written, and how it was healed, with its scores after that."""

    def judged() -> dict[str, Any]:
        if judge is None:
            return {}
        sources = (form.tuned.source, form.base.source)
        return compared({**scores, "treated": score(open_tuned(folder, form.base), judge, sources)})

    tested: dict[str, Any] = {"scores": judged()} if judge is not None else {}
    if heal is not None:
        tested["healed"] = healed(folder, base, heal, options)
        after = {f"{metric}, healed": values for metric, values in judged().items()}
        tested |= {"scores": tested["scores"] | after} if after else {}
    return tested


def _record(form: Form, folder: Path) -> dict[str, Any]:
    """What of the finetune is in the folder; see `Extraction`."""
    tuned = form.tuned
    left = [(c, reason, _squares(c)) for c, reason in form.left_out]
    lined = {line["name"] for line in form.lines}
    others = [c for c in form.carried if c.name not in lined]
    carried = sum(_squares(c) for c in others)
    total = sum(line["squares"] for line in form.lines) + carried + sum(squares for _, _, squares in left)
    held = sum(line["share"] * line["squares"] for line in form.lines) + carried
    return {
        "base": shareable(form.base.source),
        "tuned": shareable(tuned.source),
        "weights": weights_of({"base": form.base, "tuned": tuned}),
        "options": form.options.config(),
        "matrices": form.lines,
        "carried": [{"name": c.name, "share_of_update": share(_squares(c), total)} for c in others],
        "left_out": [
            {"name": c.name, "reason": reason, "share_of_update": share(squares, total) if squares else None}
            for c, reason, squares in left
        ],
        "notes": form.notes
        + [
            f"{c.name} has {c.shape[0]} rows, the base's {form.base.entries[c.shorter].shape[0]}: give the model "
            "as many before the adapter is loaded (resize_token_embeddings, num_labels)"
            for c in form.carried
            if c.shorter and isinstance(form, LowRank)
        ],
        "total": {
            "share": share(held, total),
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "tuned_bytes": sum(stored_bytes(n, e) for n, e in tuned.entries.items() if e.dtype in FORMATS),
        },
    }


def _squares(change: Update) -> float:
    """‖delta‖²; 0 where its numbers are none."""
    return 0.0 if change.reason or isnan(change.squares[0]) else change.squares[0]


@dataclass(frozen=True, eq=False, repr=False)
class Extraction(Treated):
    """What `extract` wrote.

    Attributes:
        folder: the adapter's, or the difference's.
        record: what of the finetune it holds: ``matrices``, ``carried``, ``left_out``, ``notes``, ``total``,
            ``scores``; ``healed``, see `heal.heal`.
    """

    RECORD: ClassVar[str] = "specbasis_extract.json"

    @property
    def matrices(self) -> list[dict[str, Any]]:
        """One line for each matrix.

        name, role, block, shape, rank, bytes; squares, ‖delta‖²; and shares of it: share, what is kept; chance,
        what random directions would hold; share_of_entries, what the largest entries hold in as many bytes;
        share_of_signs, what one bit an entry holds; share_of_lora, beside a core, what a LoRA of as many bytes
        holds. Entries and signs are None for an update that is not formed. whole: the matrix itself is stored.
        """
        return list(self.record["matrices"])
