"""A finished finetune made small: as a LoRA, or as a difference of few bits; nothing is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned
from specbasis.checkpoint.atomic import clear_beside, whole, writing
from specbasis.checkpoint.digest import sealed
from specbasis.checkpoint.writer import stored_bytes, want_new
from specbasis.core.dtypes import FORMATS
from specbasis.core.options import takes
from specbasis.core.text import shareable
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.folder import environment, plain
from specbasis.jobs.progress import Report, silent
from specbasis.treatment.difference import Difference
from specbasis.treatment.extraction import RECORD, Extraction
from specbasis.treatment.judged import judge_pair, judge_treated
from specbasis.treatment.low_rank import LowRank
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.updates import differing, share

Source = str | Path | Mapping[str, Tensor]


@takes(ExtractOptions)
def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    judge: Judge | None = None,
    progress: Report | None = None,
    **keywords: Any,
) -> Extraction:
    """Write a finetune as a LoRA adapter that PEFT loads without specbasis, or as a difference of few bits.

    For every matrix delta = tuned − base ≈ B A with B = U √S, A = √S Vh of its leading triplets: the best
    approximation of each rank (Eckart & Young). Scaling is 1. Nothing is dropped in silence: biases, norms, new
    heads, grown embeddings and what else has no low-rank update are carried whole (PEFT's ``modules_to_save`` and
    ``bias``), and what cannot be is listed with its share of ‖delta‖². A LoRA, DoRA or AdaLoRA as ``tuned`` is
    resized; the update of one that is stored as a product is not formed.

    As ``delta``, each matrix is stored as a few directions of 8 bits and what is left in 1, 2 or 4 bits an entry
    (`specbasis.checkpoint.delta`), directions and bits chosen at one price of a byte for all matrices; the folder
    is read wherever a finetune is.

    One matrix and its factors are in memory at a time; the files of either model are read three times, the
    finetune's once with ``rank``.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetune, or a PEFT adapter of base.
        out: the new folder.
        options: all options as one value; or each as a keyword.
        judge: from a model to its metrics, such as `specbasis.interventions.evaluators.judge` makes: then base,
            finetune and what is written are judged.
        progress: called as work goes on.
        **keywords: the fields of `ExtractOptions`, below.

    Raises:
        InputError: a source cannot be read, the two are no base and finetune, nothing differs, the size holds
            nothing, or ``out`` exists.

    Source: Eckart & Young 1936; as LoRA extraction: thomwolf, peft #312 (2023), mergekit-extract-lora.
    Directions and bits together: Yao et al. 2024 (LQER, Delta-CoMe); Liu et al. 2024 (BitDelta).
    """
    chosen, out = ExtractOptions.of(options, keywords), Path(out)
    want_new(out)
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    report = progress or silent
    changes = differing(pretrained, finetuned, report)
    scores = judge_pair(pretrained, finetuned, judge) if judge is not None else {}
    form = FORMS[chosen.form](pretrained, finetuned, changes, chosen, report)
    clear_beside(out)
    with writing(out), whole(out) as temporary:
        temporary.mkdir()
        form.write(temporary, base)
        record = {**_record(pretrained, finetuned, form, chosen), **environment(("transformers", "peft"))}
        if judge is not None:
            treated, sources = open_tuned(temporary, pretrained), (finetuned.source, pretrained.source)
            record["scores"] = judge_treated(scores, treated, judge, sources)
        record = sealed(plain(record))
        (temporary / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Extraction(out, record)


FORMS: dict[str, Callable[..., LowRank | Difference]] = {"lora": LowRank, "delta": Difference}
"""What a finetune can be extracted as."""


def _record(
    base: Checkpoint, tuned: Checkpoint, form: LowRank | Difference, options: ExtractOptions
) -> dict[str, Any]:
    """What of the finetune is in the folder; see `Extraction`."""
    left = [(c, reason, 0.0 if c.reason or isnan(c.squares[0]) else c.squares[0]) for c, reason in form.left_out]
    carried = sum(c.squares[0] for c in form.carried)
    total = sum(line["squares"] for line in form.lines) + carried + sum(squares for _, _, squares in left)
    held = sum(line["share"] * line["squares"] for line in form.lines) + carried
    return {
        "base": shareable(base.source),
        "tuned": shareable(tuned.source),
        "options": options.config(),
        "matrices": form.lines,
        "carried": [{"name": c.name, "share_of_update": share(c.squares[0], total)} for c in form.carried],
        "left_out": [
            {"name": c.name, "reason": reason, "share_of_update": share(squares, total) if squares else None}
            for c, reason, squares in left
        ],
        "notes": [
            f"{c.name} has {c.shape[0]} rows, the base's {base.entries[c.shorter].shape[0]}: give the model as "
            "many before the adapter is loaded (resize_token_embeddings, num_labels)"
            for c in form.carried
            if c.shorter and options.form == "lora"
        ],
        "total": {
            "share": share(held, total),
            "bytes": form.stored,
            "tuned_bytes": sum(stored_bytes(n, e) for n, e in tuned.entries.items() if e.dtype in FORMATS),
        },
    }
