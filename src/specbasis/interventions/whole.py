"""Adapters as whole models for a while: what evaluators load, worker processes read, and edits change."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from specbasis.checkpoint import open_checkpoint, open_tuned, refuse_other_weights
from specbasis.checkpoint.writer import write_model
from specbasis.core.extras import require
from specbasis.interventions.stage import Subject


@contextmanager
def whole_models(base: str, subjects: Mapping[str, Subject]) -> Iterator[dict[str, Subject]]:
    """The same subjects, each adapter among them as the model that it makes of the base, until the block ends.

    Raises:
        InputError: a source cannot be read, or the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="specbasis-") as folder:
        written = {}
        pretrained = open_checkpoint(base)
        for number, (label, subject) in enumerate(subjects.items()):
            checkpoint = open_tuned(subject.source, pretrained)
            refuse_other_weights(checkpoint)
            if checkpoint.under is not None:
                place = write_model(checkpoint, Path(folder, str(number)))
                add_tokenizer(place, subject.source, base)
                subject = replace(subject, source=str(place))
            written[label] = subject
        yield written


def add_tokenizer(place: Path, *sources: str) -> None:
    """Beside a written model its tokenizer, where no file of its base was: from the first source that has one."""
    if any(place.glob("tokenizer*")) or any(place.glob("preprocessor_config*")):
        return
    from specbasis.checkpoint.places import transformers_address

    transformers = require("transformers", purpose="judging a model needs")
    for source in sources:
        try:
            transformers.AutoTokenizer.from_pretrained(**transformers_address(source)).save_pretrained(place)
        except (OSError, ValueError, KeyError):  # none there; whoever needs one says so
            continue
        return
