"""Open checkpoints, what they have in common, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from specbasis.architecture.cut import laid_out, matrix_size
from specbasis.architecture.family import STRUCTURAL
from specbasis.architecture.key import ROLES, Skipped
from specbasis.architecture.pair import MatrixPair, Pairing, pair
from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned, other_weights
from specbasis.checkpoint.entry import watched
from specbasis.comparison.options import Options
from specbasis.comparison.task import Source, Task, sharing
from specbasis.core.attention_heads import head_count
from specbasis.core.errors import InputError
from specbasis.core.svd import ALGORITHM
from specbasis.jobs import results as store
from specbasis.jobs.environment import environment
from specbasis.jobs.provenance import provenances
from specbasis.jobs.results import Results


@dataclass(frozen=True)
class Matched:
    """Two or more open checkpoints and what they have in common.

    Attributes:
        source: what base is called in every process.
        base: the pretrained checkpoint.
        sources: label → what a tuned checkpoint is called.
        tuned: label → the same, open.
        pairings: label → the matrices that are in both.
        options: what to compare.
    """

    source: Source
    base: Checkpoint
    sources: Mapping[str, Source]
    tuned: Mapping[str, Checkpoint]
    pairings: Mapping[str, Pairing]
    options: Options

    @classmethod
    def open(cls, base: Any, tuned: Any, options: Options) -> Matched:
        """Open the checkpoints that a user named, and find what they have in common.

        Raises:
            InputError: no tuned checkpoint, one that cannot be read, or nothing in common.
        """
        source, sources = _in_words(base), _listed(tuned)
        if not sources:
            raise InputError("got no tuned checkpoint; want at least one")
        opened = open_checkpoint(source, stream=options.stream)
        places, by_label = store.opened_by_label(sources, lambda s: open_tuned(s, opened, stream=options.stream))
        if layouts := options.layouts:
            opened = laid_out(opened, layouts)
            by_label = {label: laid_out(checkpoint, layouts) for label, checkpoint in by_label.items()}
        pairings = {
            label: pair(
                opened,
                checkpoint,
                common_rows=options.common_rows,
                transposed=options.transposed,
                admits=options.filter,
            )
            for label, checkpoint in by_label.items()
        }
        if not any(pairing.matched for pairing in pairings.values()):
            everything = {label: pair(opened, checkpoint) for label, checkpoint in by_label.items()}
            raise InputError(_nothing_in_common(opened, everything))
        _check_heads(opened, pairings, options)
        return cls(source, opened, places, by_label, pairings, options)

    @property
    def in_memory(self) -> bool:
        """Whether any source is tensors, which cannot be named to another process."""
        return any(isinstance(source, Mapping) for source in (self.source, *self.sources.values()))

    def tasks(self, results: Results | None) -> list[Task]:
        """One task per matrix of base with pairs that are not done, longest first."""
        by_matrix: dict[str, list[tuple[str, Source, MatrixPair]]] = {}
        for label, pairing in self.pairings.items():
            for m in pairing.matched:
                if results is None or not results.is_done(label, m.key.name):
                    by_matrix.setdefault(m.key.name, []).append((label, self.sources[label], m))
        tasks = [Task(self.source, tuple(todo), self.options) for todo in by_matrix.values()]
        return sorted(tasks, key=lambda task: -task.flops)

    def watched(self) -> Callable[[], None]:
        """A check that no file of these checkpoints has changed since now."""
        return watched({path for checkpoint in (self.base, *self.tuned.values()) for path in checkpoint.files})

    def sharing(self) -> AbstractContextManager[None]:
        """Let the tasks of this process read the checkpoints that are open here."""
        tuned = ((self.sources[label], self.source, checkpoint) for label, checkpoint in self.tuned.items())
        return sharing([(self.source, None, self.base), *tuned])

    @contextmanager
    def results(self, folder: Path) -> Iterator[Results]:
        """The results folder of this comparison, new or continued, with all that is known before the first row.

        Raises:
            InputError: the folder cannot be used, or holds another comparison.
        """
        base, *tuned = provenances((self.base, *self.tuned.values()), _earlier(folder))
        by_label = dict(zip(self.tuned, tuned, strict=True))
        shown = [m for m in self.options.taken if m.shown == "table"]
        config = {
            "algorithm": ALGORITHM,
            "base": base["sha256"],
            "tuned": {label: provenance["sha256"] for label, provenance in by_label.items()},
            **self.options.config(),
        }
        with store.create(folder, config, add=self.options.add) as results:
            kept = results.manifest
            results.manifest.update(
                environment(),
                base=base,
                pairs=kept.get("pairs", {})
                | {
                    label: _about(pairing, self._unasked(pairing), by_label[label], self.options, base)
                    | {"other_base": self._other_base(label, base)}
                    for label, pairing in self.pairings.items()
                },
                measures=[{"name": m.name, "title": m.title, "source": m.source} for m in shown],
                failed=[f for f in kept.get("failed", []) if f["pair"] not in self.pairings],
                runs=kept.get("runs", []),
            )
            results.write_manifest()
            yield results

    def _unasked(self, pairing: Pairing) -> list[Skipped]:
        """The parameters of base that roles, blocks or name leave out, wholly or in part; nothing is read."""
        if self.options.filter is None:
            return []
        left = {name: matrix_size(name, self.base.entries) for name in self.base.entries}
        for m in pairing.matched:
            left[m.base.parameter] -= prod(m.base.shape)
        known = {item.name for item in pairing.skipped}
        return [
            Skipped(n, "both", "not asked for", size) for n, size in left.items() if size > 0 and n not in known
        ]

    def _other_base(self, label: str, base: Mapping[str, Any]) -> str:
        """What an adapter's file says of other weights that it was made from; else empty."""
        tuned = self.tuned[label]
        return other_weights(tuned, base["sha256"] if tuned.under is self.base else "")


def _in_words(source: Any) -> Any:
    """A path in words means the same in a worker process."""
    return str(source) if isinstance(source, Path) else source


def _listed(tuned: Any) -> Any:
    """The tuned checkpoints, one or several, as a list, or by the labels that a mapping gives them."""
    if isinstance(tuned, Mapping) and not any(isinstance(value, Tensor) for value in tuned.values()):
        return {label: _in_words(source) for label, source in tuned.items()}
    # A module is one, although some can be iterated over; opening it says what to give.
    is_one = isinstance(tuned, str | Path | Mapping) or hasattr(tuned, "state_dict")
    return [_in_words(source) for source in ([tuned] if is_one else tuned)]


def _check_heads(base: Checkpoint, pairings: Mapping[str, Pairing], options: Options) -> None:
    """Refuse a number of attention heads that divides no matrix of attention."""
    given = options.heads
    keys = [(m.key, m.base.shape) for p in pairings.values() for m in p.matched]
    keys = [(key, shape) for key, shape in keys if key.role in ("attention.query", "attention.output")]
    if given and keys and not any(head_count(base.config, k.role, k.stack, shape, given) for k, shape in keys):
        (key, (rows, columns)), *_ = keys
        raise InputError(
            f"got heads = {given}, into which no attention matrix can be cut ({key.name}: {rows} × {columns}); "
            "want a number that divides its width"
        )


def _about(
    pairing: Pairing,
    unasked: Iterable[Skipped],
    provenance: dict[str, Any],
    options: Options,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """What the manifest says of one pair."""
    return {
        "tuned": provenance,
        "architecture": pairing.family.name,
        "matrices": [m.key.name for m in pairing.matched],
        "skipped": [asdict(item) for item in (*pairing.skipped, *unasked)],
        "notes": [
            *([f"no architecture file matches: {STRUCTURAL.title}"] if pairing.family is STRUCTURAL else []),
            *options.notes(m.key for m in pairing.matched),
            *pairing.notes,
            *(f"base: {note}" for note in base.get("notes", ())),
            *provenance.get("notes", ()),
        ],
    }


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """The provenances that an earlier run of the same folder left."""
    if not (folder / store.COMPARISON.manifest).is_file():
        return []
    manifest = store.load(folder).manifest
    return [manifest.get("base", {}), *(about["tuned"] for about in manifest["pairs"].values())]


def _nothing_in_common(base: Checkpoint, pairings: Mapping[str, Pairing]) -> str:
    """Why there is no matrix to compare: the selection leaves none, or the reasons of the pairing."""
    label, pairing = next(iter(pairings.items()))
    keys = [m.key for p in pairings.values() for m in p.matched]
    if keys:
        roles = ", ".join(role for role in ROLES if any(key.role == role for key in keys))
        blocks = sorted({key.block for key in keys if key.block is not None})
        there = f"roles {roles}" + (f"; blocks {blocks[0]} to {blocks[-1]}" if blocks else "; no blocks")
        return f"{base.source} and {label}: no matrix to compare: roles, blocks or name match none of {there}"
    reasons = "; ".join(dict.fromkeys(s.reason for s in pairing.skipped))
    return f"{base.source} and {label}: no matrix to compare ({reasons[:300]})"
