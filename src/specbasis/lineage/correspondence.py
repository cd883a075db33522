"""Whether the weights behind two fingerprints correspond, with a p-value, and how they differ where they do.

The null: one of the two was trained from an initialisation of its own. Its hidden units come in any order, so that
the products of seeded entries, whose rows and columns have mean zero, have independent signs whatever their sizes.
For such a sum, z = Σ c_k / √Σ c_k² exceeds t with a probability of at most exp(−t²/2).

Source: Hoeffding 1963, Theorem 2.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specbasis.lineage.fingerprint import Block, Fingerprint, Floats, Layout

DROPPED = 4
"""The most alike 1/4 of the matrices, at least one of three, count for nothing: a shared table is no kinship."""

SURE = 1e-6
"""p-value below which a block, or a single matrix, corresponds."""

WEAK = 1e-3
"""p-value below which matrices are taken to correspond in place where something else shows that they do."""

Pairs = list[tuple[int, int]]
"""Number of a matrix of the query, and of its counterpart in the record."""


@dataclass(frozen=True, eq=False)
class Correspondence:
    """What a query and a record have in common.

    Attributes:
        record: the fingerprint in the database.
        pairs: the matrices that were compared.
        way: what was compared: "in place", "by blocks", or "without the order of units".
        log_p: natural logarithm of the p-value, over the ways that were tried.
        depth: block of the query → block of the record, or None for one that is not from it; only if they differ.
    """

    record: Fingerprint
    pairs: Pairs
    way: str
    log_p: float
    depth: dict[Block, Block | None] = field(default_factory=dict)


def correspondence(query: Fingerprint, record: Fingerprint) -> Correspondence:
    """The way in which a query corresponds to a record most surely, of three, for which the p-value pays."""
    pairs = by_label(query, record)
    here = log_p(*scores(query.roots, record.roots, pairs), len(query.layout.labels))
    tried = [Correspondence(record, pairs, "in place", here)]
    if here > math.log(SURE) or len(query.layout.blocks) != len(record.layout.blocks):
        tried.append(_by_blocks(query, record))
    if here > math.log(SURE) and query.header["orders"] == record.header["orders"]:
        # Where a part was made anew, what is left in place is weak evidence, and says all the same where it is.
        way = "in place" if here < math.log(WEAK) else "without the order of units"
        p = log_p(*scores(query.spacings, record.spacings, pairs), len(query.layout.labels))
        tried.append(Correspondence(record, pairs, way, p))
    best = next((c for c in tried if c.depth and c.log_p < math.log(SURE)), min(tried, key=lambda c: c.log_p))
    return Correspondence(record, best.pairs, best.way, min(0.0, best.log_p + math.log(3)), best.depth)


def by_label(query: Fingerprint, record: Fingerprint) -> Pairs:
    """Matrices that agree in block, role and shape; where fewer than half do, in the end of their names, shape and
    order, as two frameworks have them, or in shape and order alone.
    """
    return _matched(query.layout, record.layout)


@lru_cache(maxsize=64)
def _matched(ours: Layout, theirs: Layout) -> Pairs:
    ways: list[Pairs] = []
    for key_of in (lambda label, end: label, lambda label, end: (end, label[3]), lambda label, end: label[3]):
        waiting = defaultdict[Any, list[int]](list)
        for k, key in enumerate(map(key_of, theirs.labels, theirs.ends)):
            waiting[key].append(k)
        keys = map(key_of, ours.labels, ours.ends)
        ways.append([(k, waiting[key].pop(0)) for k, key in enumerate(keys) if waiting[key]])
        if 2 * len(ways[-1]) >= min(len(ours.labels), len(theirs.labels)):
            return ways[-1]
    return max(ways, key=len)


def scores(ours: NDArray[Any], theirs: NDArray[Any], pairs: Pairs) -> tuple[Floats, Floats]:
    """The z of each pair of matrices, NaN where there is nothing to test, and √ of how many products are in it."""
    if not pairs:
        return np.zeros(0), np.zeros(0)
    n = min(ours.shape[1], theirs.shape[1])
    A, B = (X[[pair[side] for pair in pairs], :n] for side, X in enumerate((ours, theirs)))
    products = A * B
    size = np.sqrt(np.square(products).sum(1))
    return products.sum(1) / np.where(size > 0, size, np.nan), np.sqrt((products != 0).sum(1))


def log_p(z: Floats, weight: Floats, whole: int) -> float:
    """Logarithm of a bound on the p-value of Σ w z, the largest quarter of its terms left out; 0: no evidence.

    Without its largest terms the sum is at most that over any other set of as many: a quarter of the matrices may
    agree for reasons of their own without harm to the bound. ``whole``: how many matrices the query has.
    """
    weight = weight[np.isfinite(z)]
    terms = np.sort(weight * z[np.isfinite(z)])
    total = terms[: len(terms) - max(len(terms) // DROPPED, whole > 2)].sum()
    return float(-0.5 * total**2 / np.square(weight).sum()) if total > 0 else 0.0


def _by_blocks(query: Fingerprint, record: Fingerprint) -> Correspondence:
    """Each block of the query beside the block of the record that is most like it, wherever that stands."""
    ours, theirs = query.layout.blocks, record.layout.blocks
    kinds = [kind for kind in query.layout.kinds if kind in record.layout.kinds]
    n = min(query.header["entries"], record.header["entries"])
    A, B = _laid_out(query, n, kinds, ours), _laid_out(record, n, kinds, theirs)
    size = np.sqrt(np.square(A) @ np.square(B).mT)
    count = np.sqrt(np.minimum(*((X != 0).sum(2).max(1, initial=0) for X in (A, B))))[:, None, None]
    sums = (count * np.divide(A @ B.mT, size, out=np.zeros_like(size), where=size > 0)).sum(0)
    weights = (count**2 * (size > 0)).sum(0)
    if not weights.any():
        return Correspondence(record, [], "by blocks", 0.0)
    z = np.divide(sums, np.sqrt(weights), out=np.zeros_like(sums), where=weights > 0)
    block_log_p = np.minimum(0, math.log(len(theirs)) - 0.5 * np.square(z.max(1).clip(min=0)))
    needed = math.ceil(len(ours) / DROPPED)  # at least so many blocks correspond: Benjamini & Heller 2008
    p = min(0.0, float(np.sort(block_log_p)[needed - 1]) + math.log(len(ours) - needed + 1))
    matched = [
        theirs[k] if sure < math.log(SURE) else None for k, sure in zip(z.argmax(1), block_log_p, strict=True)
    ]
    depth = dict(zip(ours, matched, strict=True))
    counterparts = record.layout.numbers
    pairs = []
    for k, (stack, block, *rest) in enumerate(query.layout.labels):
        place = (stack, block) if block is None else depth[stack, block]
        if place is not None and (*place, *rest) in counterparts:
            pairs.append((k, counterparts[(*place, *rest)]))
    moved = any(place != block for block, place in depth.items()) or len(ours) != len(theirs)
    return Correspondence(record, pairs, "by blocks", p, depth if moved and p < math.log(SURE) else {})


def _laid_out(
    fingerprint: Fingerprint, n: int, kinds: Sequence[Any], blocks: Sequence[Block]
) -> NDArray[np.float32]:
    """(kinds, blocks, n): the roots of each matrix; zeros where a block has none of a kind."""
    roots, numbers = fingerprint.roots[:, :n], fingerprint.layout.kinds
    padded: NDArray[np.float32] = np.vstack([roots, np.zeros_like(roots[:1])])
    rows = [numbers[kind].get(block, -1) for kind in kinds for block in blocks]
    laid_out: NDArray[np.float32] = padded[np.array(rows, int).reshape(len(kinds), len(blocks))]
    return laid_out


def forms(query: Fingerprint, record: Fingerprint, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """What became of each matrix of the record in the query: its form as a copy, or "changed", or "unlike"."""
    z, _ = scores(query.roots, record.roots, list(pairs))
    copies, _ = scores(query.roots, query.roots, [(k, k) for k, _ in pairs])
    steps = query.part(2)
    result = []
    for (k, j), score, copy in zip(pairs, z, copies, strict=True):
        form = _form(record.entries[j], query.entries[k], steps[k])
        form = form or _order_form(query.orders[k], record.orders[j], float(score), float(copy))
        # The entries are a sample; what was read whole has a digest of all of its values.
        proof = same_values(query, record, k, j)
        result.append(form if proof is None else "equal" if proof else "changed" if form == "equal" else form)
    return result


def same_values(query: Fingerprint, record: Fingerprint, k: int, j: int) -> bool | None:
    """Whether two matrices are equal in all values; None where one was not read whole, or has other rows."""
    ours, theirs = query.header["matrices"][k], record.header["matrices"][j]
    known = ours[6] and theirs[6] and ours[4:6] == theirs[4:6]
    return ours[6] == theirs[6] if known else None


def _form(base: Floats, tuned: Floats, step: Floats) -> str:
    """In what form entries of base are those of tuned; empty where in none."""
    n = min(len(base), len(tuned))
    known = np.isfinite(base[:n]) & np.isfinite(tuned[:n])
    a, b, steps = (torch.from_numpy(x[:n][known]) for x in (base, tuned, step))
    if not len(a) or torch.equal(a, b):
        return "equal" if len(a) else "undecided"
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(a.to(dtype).double(), b):
            return f"rounded to {str(dtype)[6:]}"
        if torch.equal(b.to(dtype).double(), a):
            return f"of which the record is rounded to {str(dtype)[6:]}"
    used = steps.isfinite() & (steps != 0)
    off = ((b - a) / steps)[used].abs()
    fits = float((off <= 0.502 + (2**-8 * b / steps)[used].abs()).double().mean())
    # Such an error is uniform within a step, of which its root mean square is .29; none of it lies beyond.
    hidden = fits == 1 and 0.25 <= float(off.square().mean().sqrt()) <= 0.35
    if len(off) >= 8 and (hidden or (fits >= 0.98 and bool((steps[used] > 0).any()))):
        return "quantised"
    kept = b != 0
    near = (b - a).abs() <= 2**-8 * b.abs()
    if bool(near[kept].all()) and float((~kept & (a != 0)).double().mean()) >= 0.02:
        return "entries pruned"
    factor = float(a @ b) / max(float(a @ a), 1e-300)
    if factor and float((b - factor * a).abs().max()) <= 1e-5 * float(b.abs().max()):
        return "scaled"
    return ""


def _order_form(ours: Floats, theirs: Floats, z: float, copy: float) -> str:
    """Of a matrix that is no copy in place: whether its units come in another order, else what its z says.

    Where the z of a copy would say nothing, or that of these two is not far below it, nothing is known.
    """
    needed = math.sqrt(-2 * math.log(SURE))
    if z >= needed:
        return "changed"
    if not copy >= needed or z > copy / 3:
        return "undecided"
    if ours.shape == theirs.shape:
        for a, b in zip(ours, theirs, strict=True):
            known = np.isfinite(a) & np.isfinite(b)
            varied = known.sum() >= 16 and a[known].std() > 0.01 * a[known].mean()
            if varied and np.abs(a[known] - b[known]).max() <= 1e-3 * a[known].mean():
                return "units in another order or rescaled"
    return "unlike"


def counted(words: Sequence[str]) -> str:
    """Words and how often each occurs: "30 rounded to bfloat16, 2 equal"."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).most_common())
