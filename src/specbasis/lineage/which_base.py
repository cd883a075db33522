"""Which model of a database the weights of another come from: one answer, and what it stands on.

Weights have no direction: a finetune and its base, or two finetunes of an absent third, differ alike. So
"finetuned" is said only where the record is declared a base, or where the way from the query to another relative in
the database leads through it; else the two are "related".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from specbasis.core.statistics import adjusted
from specbasis.core.text import number_of
from specbasis.lineage.correspondence import Correspondence, correspondence, counted, forms, same_values
from specbasis.lineage.database import is_database, read
from specbasis.lineage.fingerprint import Fingerprint, Floats, fingerprint

LEVEL = 0.01
"""Of all queries that come from no model of the database, at most this share is attributed to one."""

NEAREST = 6
"""Relatives among which the parents of a merge are sought; all sets of two to `PARENTS` of them."""

PARENTS = 4

EXPLAINED = 0.05
"""A merge leaves at most this share of the squared distance to the nearest parent; a sibling leaves half of it."""

STRAIGHT = 0.1
"""Cosine of two updates up to which they start at this model: from one of three siblings it is 1/2."""

FAR = 0.9
"""Median cosine below which a finetune cannot be told from a training of the same initialisation.

Folds of one training that begin at one seed were seen at 0.81 to 0.88, finetunes at 0.98 and more.
"""

_COPIES = ("equal", "undecided", "quantised", "scaled", "rounded to", "of which", "units in")


@dataclass(frozen=True, eq=False)
class Relative:
    """A record of the database whose weights correspond to the query's.

    Attributes:
        link: how, with its p-value.
        p: adjusted for all records of the database (Holm 1979).
        distance: √ of the mean over the query's matrices of ‖difference‖² / ‖·‖², √2 for those it has not.
        cosine: of the entries as they are, median over matrices.
        forms: of each matrix that was compared.
        share: of the query's matrix parameters that were compared.
    """

    link: Correspondence
    p: float
    distance: float
    cosine: float
    forms: Sequence[str]
    share: float

    @property
    def name(self) -> str:
        """Of the record."""
        return self.link.record.name

    @property
    def is_copy(self) -> bool:
        """Whether each matrix is the record's in some form."""
        return all(form.startswith((*_COPIES, "entries pruned")) for form in self.forms)


Source = str | Path | Mapping[str, Tensor]


def fingerprint_of(source: Source) -> Fingerprint:
    """The fingerprint of a checkpoint, or the first in a file of them."""
    if isinstance(source, str | Path) and is_database(source):
        return next(read(Path(source)))
    return fingerprint(source)


@dataclass(frozen=True)
class Answer:
    """Where a model comes from.

    Attributes:
        kind: "identical", "copy", "pruned", "grown", "reordered", "finetuned", "merge", "related", or "none".
        bases: names of the records, the nearest first.
        sentence: the answer in words.
        records: the names of all that were compared.
        level: the error rate of that family.
        shares: of a merge: name → share and its 95 % interval.
        depth: block of the query → block of the base.
        ranking: the figures of each relative.
    """

    kind: str
    bases: tuple[str, ...]
    sentence: str
    records: tuple[str, ...]
    level: float
    shares: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    depth: Mapping[str, str] = field(default_factory=dict)
    ranking: tuple[Mapping[str, Any], ...] = ()


def which_base(
    model: Fingerprint | Source, database: Iterable[Fingerprint] | str | Path, *, level: float = LEVEL
) -> Answer:
    """The model of a database that a model comes from.

    Args:
        model: a checkpoint, a file of fingerprints, whose first is taken, or a fingerprint.
        database: a file that `specbasis db` wrote, or fingerprints.
        level: family-wise error rate over the whole database.

    Raises:
        InputError: the model or the database cannot be read.
    """
    query = model if isinstance(model, Fingerprint) else fingerprint_of(model)
    correspondences, names = [], []
    for record in read(Path(database)) if isinstance(database, str | Path) else database:
        names.append(record.name)
        c = correspondence(query, record)
        # Only what may be significant is kept: a database may be larger than memory.
        correspondences.append(c if math.exp(c.log_p) <= level else Correspondence(query, [], c.way, c.log_p))
    holm = adjusted([math.exp(c.log_p) for c in correspondences], "holm")
    sure = [(c, float(q)) for c, q in zip(correspondences, holm, strict=True) if q <= level and c.pairs]
    relatives = _ranked([_relative(query, c, q) for c, q in sure])
    if not relatives:
        models = number_of(len(correspondences), "model")
        text = f"none of these: of {models} none corresponds (family-wise error rate {level:g})"
        return Answer("none", (), text, tuple(names), level)
    kind, text, extra = _judged(query, relatives)
    bases = extra.get("shares") or [relatives[0].name]
    p_value, share = max(relatives[0].p, 1e-300), relatives[0].share
    text = f"{text} (p ≤ {p_value:.1g} over {number_of(len(correspondences), 'model')}, {share:.0%} of it compared)"
    return Answer(kind, tuple(bases), text, tuple(names), level, ranking=tuple(map(_row, relatives)), **extra)


def contradiction(answer: Answer, card: Sequence[str]) -> tuple[bool, str]:
    """Whether an answer contradicts the bases that a model card names, and the sentence that says so.

    Only where the database holds a model that the card names can it be contradicted: what the card names may
    itself come from the base that was found.
    """
    related = {row["record"] for row in answer.ranking}
    known = {name: [record for record in answer.records if _same(name, record)] for name in card}
    wrong = [name for name, records in known.items() if records and not related & set(records)]
    if wrong:
        return (
            True,
            f"the model card is contradicted: it names {', '.join(wrong)}, but the model is {answer.sentence}",
        )
    unknown = [name for name, records in known.items() if not records]
    if unknown:
        return False, f"the model card cannot be checked: {', '.join(unknown)} is not in the database"
    return False, f"the model card agrees: {', '.join(card)}" if card else "the model card names no base_model"


def _same(name: str, record: str) -> bool:
    plain = [text.removeprefix("hub:").partition("@")[0].strip("/").lower() for text in (name, record)]
    return plain[0] == plain[1]


def _ranked(relatives: Sequence[Relative]) -> list[Relative]:
    """Copies first, then the nearest; within the noise of the seeded entries a declared base before the others."""
    near = 1.02 * min((r.distance for r in relatives), default=0.0)

    def order(r: Relative) -> tuple[bool, bool, float]:
        return not r.is_copy or bool(r.link.depth), not (r.link.record.is_base and r.distance <= near), r.distance

    return sorted(relatives, key=order)


def _row(r: Relative) -> dict[str, Any]:
    return {
        "record": r.name, "source": r.link.record.header["source"], "base": r.link.record.is_base, "p": r.p,
        "distance": r.distance, "cosine": r.cosine, "way": r.link.way, "share": r.share, "forms": counted(r.forms),
    }  # fmt: skip


def _relative(query: Fingerprint, link: Correspondence, p: float) -> Relative:
    A, B = query.entries, _in_place(query, link)
    B = np.where(np.isfinite(A), B, np.nan)
    known = np.isfinite(B)
    norms = np.square(np.where(known, A, 0)).sum(1), np.square(np.where(known, B, 0)).sum(1)
    inner = np.where(known, A * B, 0).sum(1)
    whole = np.where(known.any(1), norms[0] + norms[1], 1)
    apart = np.where(known.any(1), 2 * (1 - 2 * inner / np.where(whole > 0, whole, 1)), 2)
    product = np.sqrt(norms[0] * norms[1])
    cosine = np.median((inner[product > 0] / product[product > 0]) if (product > 0).any() else [math.nan])
    sizes = [out * width for *_, out, width, _ in query.header["matrices"]]
    share = sum(sizes[k] for k, _ in link.pairs) / sum(sizes)
    matrix_forms = forms(query, link.record, link.pairs)
    return Relative(link, p, math.sqrt(max(0.0, float(apart.mean()))), float(cosine), matrix_forms, share)


def _in_place(query: Fingerprint, link: Correspondence) -> Floats:
    """The entries of a record, each matrix where its counterpart in the query is; NaN where there is none."""
    B = np.full_like(query.entries, np.nan)
    n = min(B.shape[1], link.record.entries.shape[1])
    for k, j in link.pairs:
        B[k, :n] = link.record.entries[j, :n]
    return B


def _judged(query: Fingerprint, relatives: Sequence[Relative]) -> tuple[str, str, dict[str, Any]]:
    """Kind, sentence, and what else the answer holds."""
    best = relatives[0]
    record, words, name = best.link.record, counted(best.forms), best.name
    whole = len(best.link.pairs) == len(query.layout.labels)
    if (
        whole
        and not best.link.depth
        and len(record.layout.labels) == len(query.layout.labels)
        and set(best.forms) <= {"equal", "undecided"}
        and False not in (proofs := {same_values(query, record, k, j) for k, j in best.link.pairs})
    ):
        proof = "the same values in every matrix" if proofs == {True} else "equal in every entry that was compared"
        proof = "the same file" if query.header["weights"] == record.header["weights"] else proof
        return "identical", f"identical to {name}: {proof}", {}
    if depth := best.link.depth:
        shown = {_block(b): "new" if at is None else _block(at) for b, at in depth.items()}
        used = [at for at in depth.values() if at is not None]
        more = len(used) > len(set(used)) or len(depth) > len(record.layout.blocks)
        kind = "grown" if more else "pruned" if len(set(used)) < len(record.layout.blocks) else "reordered"
        blocks = ", ".join(f"{b} ← {at}" for b, at in shown.items())
        return kind, f"{kind} from {name}, block by block: {blocks}; matrices: {words}", {"depth": shown}
    if smaller := _smaller(query, record):
        return "pruned", f"pruned from {name}: smaller are {counted(smaller)}; matrices: {words}", {}
    if whole and "entries pruned" in best.forms and best.is_copy:
        return "pruned", f"pruned from {name}: {words}", {}
    if whole and best.is_copy:
        return "copy", f"a copy of {name} in another form: {words}", {}
    if best.share >= 0.5 and (shares := _merge(query, relatives)):
        parts = ", ".join(f"{n} {share:.3f} [{low:.3f}, {high:.3f}]" for n, (share, low, high) in shares.items())
        return "merge", f"a merge of {parts}", {"shares": shares}
    unlike = [query.header["matrices"][k][3] for (k, _), f in zip(best.link.pairs, best.forms, strict=True)
              if f == "unlike"]  # fmt: skip
    rest = (
        f"; not from it: {', '.join(unlike[:3])}{' …' if len(unlike) > 3 else ''} ({len(unlike)})" if unlike else ""
    )
    if missing := len(query.layout.labels) - len(best.link.pairs):
        rest += f"; without a counterpart: {number_of(missing, 'matrix')}"
    if best.link.way == "without the order of units":
        return "related", f"related to {name}, its hidden units in another order or rescaled, and changed", {}
    if best.cosine < FAR:
        return "related", f"related to {name}: finetuned far, or trained from the same initialisation{rest}", {}
    if record.is_base:
        return "finetuned", f"finetuned from {name}, which is declared a base{rest}", {}
    if through := _through(query, best, relatives[1:]):
        return "finetuned", f"finetuned from {name}: the way to {through} leads through it{rest}", {}
    return "related", f"related to {name}: finetuned from it or the reverse, or both from a common base{rest}", {}


def _smaller(query: Fingerprint, record: Fingerprint) -> list[str]:
    """Roles of the matrices that have fewer rows or columns in the query than where they stand in the record."""
    shapes: list[dict[Any, list[tuple[int, int]]]] = [{}, {}]
    for of, model in zip(shapes, (query, record), strict=True):
        for stack, block, role, name, out, width, _ in model.header["matrices"]:
            part = name.split(".")[-2:][0]  # what tells the tables of an embedding apart
            of.setdefault((stack, block, role, part), []).append((out, width))
    alone = [(key[2], *ours, *shapes[1].get(key, ())) for key, ours in shapes[0].items() if len(ours) == 1]
    return [role for role, a, *b in alone if len(b) == 1 and a != b[0] and a[0] <= b[0][0] and a[1] <= b[0][1]]


def _block(block: tuple[str, int]) -> str:
    return f"{block[0]}.{block[1]}" if block[0] else str(block[1])


def _scaled(query: Fingerprint, relatives: Sequence[Relative]) -> tuple[Floats, Floats]:
    """Entries of the query and of each relative, by the size of the query's matrices; 0 where any has none."""
    X = np.stack([query.entries, *(_in_place(query, r.link) for r in relatives)])
    X = np.where(np.isfinite(X).all(0), X, 0)
    size = np.sqrt(np.square(X[0]).sum(1, keepdims=True))
    X /= np.where(size > 0, size, 1)
    return X[0], X[1:]


def _through(query: Fingerprint, best: Relative, others: Sequence[Relative]) -> str:
    """The name of a relative whose update from the best record is at a right angle to the query's, or nothing."""
    for other in others:
        b, (a, r) = _scaled(query, [best, other])
        sizes = np.linalg.norm(b - a), np.linalg.norm(r - a)
        if min(sizes) > 0.1 * max(sizes) and abs(((b - a) * (r - a)).sum()) <= STRAIGHT * sizes[0] * sizes[1]:
            return other.name
    return ""


def _merge(query: Fingerprint, relatives: Sequence[Relative]) -> dict[str, tuple[float, float, float]]:
    """Share of each parent and its 95 % interval, where a few relatives explain the query; else nothing.

    Least squares b ≈ Σ c_j a_j over all entries; intervals from leaving out each matrix in turn.
    """
    near = sorted(relatives, key=lambda r: r.distance)[:NEAREST]
    b, A = _scaled(query, near)
    # Differences to the nearest have more digits than the entries, which are almost the same in all.
    D, d = A[1:] - A[0], b - A[0]
    gram = np.einsum("imn,jmn->mij", D, D)
    right = np.einsum("imn,mn->mi", D, d)
    square = whole = float(np.square(d).sum())
    shares: dict[str, tuple[float, float, float]] = {}
    for k in range(1, min(PARENTS, len(near))):
        best: tuple[float, tuple[int, ...]] = (math.inf, ())
        for chosen in itertools.combinations(range(len(D)), k):
            at = list(chosen)
            G, y = gram[:, at][:, :, at].sum(0), right[:, at].sum(0)
            c = np.linalg.lstsq(G, y, rcond=None)[0]
            best = min(best, (whole - float(y @ c), chosen))
        if best[0] <= EXPLAINED * square:  # a further parent has to explain as much of what is left
            at, square = list(best[1]), max(best[0], 0.0)
            shares = _shares([near[0].name, *(near[j + 1].name for j in at)], gram[:, at][:, :, at], right[:, at])
    return shares


def _shares(names: Sequence[str], G: Floats, y: Floats) -> dict[str, tuple[float, float, float]]:
    def solve(gram: Floats, right: Floats) -> Floats:
        c = np.linalg.lstsq(gram, right, rcond=None)[0]
        shares: Floats = np.r_[1 - c.sum(), c]
        return shares

    whole = solve(G.sum(0), y.sum(0))
    without = np.array([solve(G.sum(0) - G[m], y.sum(0) - y[m]) for m in range(len(G))])
    error = 1.96 * np.sqrt(np.square(without - without.mean(0)).sum(0) * (len(G) - 1) / len(G))
    shares = {
        name: (float(share), float(share - e), float(share + e))
        for name, share, e in zip(names, whole, error, strict=True)
        if abs(share) > e
    }
    return shares if len(shares) > 1 else {}
