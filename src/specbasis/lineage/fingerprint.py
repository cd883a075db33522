"""What is kept of a model so that it can be recognised without it, in at most 1.5 MB.

Of each matrix: entries at seeded places, which are the same in every model that has a matrix of its shape; the
means of their rows and columns; the steps of the grid on which they lie, where they do; and five ordered lists that
permuting hidden units does not change, three of which rescaling them does not change either, up to the side.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specbasis.architecture.key import MatrixRef
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, joined_sha256, open_checkpoint
from specbasis.checkpoint.digest import SEAL, digest, sealed, sha256
from specbasis.checkpoint.entry import reading
from specbasis.checkpoint.places import NotStreamable, locate
from specbasis.core.dtypes import FORMATS
from specbasis.core.entries import GROUP, grid
from specbasis.core.errors import InputError
from specbasis.core.gram import gram_values

SIZES = ((512, 64), (256, 64), (128, 32), (64, 16), (32, 8))
"""Entries of a matrix, and numbers of each ordered list: the first that fits into `LARGEST` is taken."""

LARGEST = 1_450_000
"""Bytes of all numbers of a fingerprint."""

BUDGET = 300_000_000
"""Bytes that may be read of a model that is streamed; what goes beyond it is known by a band of rows alone."""

ORDERS = ("singular values", "norms of rows", "norms of columns", "shapes of rows", "shapes of columns")
"""The ordered lists. The shape of a row is ‖·‖₄ / ‖·‖₂: a factor on it changes nothing."""

BAND = 2**18  # entries of the band of rows in which the seeded places lie
THREADS = 2  # matrices that are in memory at once
SPECTRUM_SIDE = 1024  # of a larger short side the eigensolver takes too long
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")

Floats = NDArray[np.float64]
Block = tuple[str, int]
Label = tuple[str, int | None, str, tuple[int, int], int]
Named = tuple[str, int | None, str, str, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """The matrices of a model: all that is known of them without a value.

    Attributes:
        labels: what matrices of two models must agree in to be compared: stack, block, role, shape, and which of
            those that agree in these it is.
        ends: of their names.
        numbers: label → number of the matrix.
        kinds: role, shape, and which of those with equal labels → block → number of the matrix.
        blocks: in order.
    """

    labels: tuple[Label, ...]
    ends: tuple[str, ...]
    numbers: Mapping[Label, int]
    kinds: Mapping[tuple[str, tuple[int, int], int], Mapping[Block, int]]
    blocks: Sequence[Block]


@lru_cache(maxsize=64)  # the finetunes of one base have its layout
def _layout(matrices: tuple[Named, ...]) -> Layout:
    seen = Counter[tuple[Any, ...]]()
    labels = []
    kinds: dict[Any, dict[Block, int]] = defaultdict(dict)
    for k, (stack, block, role, name, out, width) in enumerate(matrices):
        # Of a role that says nothing the end of the name does, such as weight_ih.
        role = f"{role} {name.rpartition('.')[2]}" if role in ("other", "conv") else role
        place = (stack, block, role, shape := (height(out), width))
        labels.append((*place, seen[place]))
        if block is not None:
            kinds[role, shape, seen[place]][stack, block] = k
        seen[place] += 1
    blocks = sorted({(stack, block) for stack, block, *_ in matrices if block is not None})
    ends = tuple(name.rpartition(".")[2] for _, _, _, name, *_ in matrices)
    return Layout(tuple(labels), ends, {label: k for k, label in enumerate(labels)}, dict(kinds), blocks)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A model, as far as it has to be known to recognise it and what is made of it.

    Attributes:
        header: name, source, revision, digests, `base`, and the matrices, each as [stack, block, role, name, out,
            in, digest]; sealed together with the values.
        values: (matrices, 3 entries + 5 orders + 1) float32, NaN where there is none.
    """

    header: Mapping[str, Any]
    values: NDArray[np.float32]

    @property
    def name(self) -> str:
        """What it is called in the database."""
        return str(self.header["name"])

    @property
    def is_base(self) -> bool:
        """Whether whoever added it says that it was trained from no other model."""
        return bool(self.header["base"])

    def part(self, which: int) -> Floats:
        """(matrices, entries): entries (0), the means of their rows and columns (1), or steps of their grid (2)."""
        n = self.header["entries"]
        return self.values[:, which * n : (which + 1) * n].astype(np.float64)

    @cached_property
    def entries(self) -> Floats:
        """(matrices, entries) as they are."""
        return self.part(0)

    @cached_property
    def roots(self) -> NDArray[np.float32]:
        """Signed square roots of the entries less the means of their rows and columns; 0 where there is none.

        Roots, so that outliers do not decide what a sum of products says.
        """
        n = self.header["entries"]
        centred = self.values[:, :n] - self.values[:, n : 2 * n]
        centred[~np.isfinite(centred)] = 0
        roots: NDArray[np.float32] = np.copysign(np.sqrt(np.abs(centred)), centred)
        return roots

    @cached_property
    def orders(self) -> Floats:
        """(matrices, `ORDERS`, numbers)."""
        start = 3 * self.header["entries"]
        lists = self.values[:, start : start + len(ORDERS) * self.header["orders"]].astype(np.float64)
        return lists.reshape(len(lists), len(ORDERS), -1)

    @cached_property
    def spacings(self) -> Floats:
        """(matrices, lists × pairs): how two neighbouring gaps of an ordered list share their sum, less the mean.

        Of independent matrices these shares are independent. What all matrices of a model have in common, the
        trend of the list, is taken off, so that a list of fewer than four matrices has none: 0.
        """
        gaps = -np.diff(self.orders, axis=2)
        pairs = gaps[..., : gaps.shape[2] // 2 * 2].reshape(len(gaps), -1, 2)
        whole = pairs[..., 0] + pairs[..., 1]
        known = whole > 0
        shares = np.divide(pairs[..., 0], whole, out=np.zeros_like(whole), where=known)
        count = np.count_nonzero(known, axis=0)
        return np.where(known & (count >= 4), shares - shares.sum(0) / count.clip(min=1), 0)

    @cached_property
    def layout(self) -> Layout:
        """Which matrices it has; one object for all models that have the same."""
        return _layout(tuple(tuple(matrix[:6]) for matrix in self.header["matrices"]))

    def named(self, name: str, base: bool) -> Fingerprint:
        """The same under a name, and declared to be a base or not."""
        return seal({**self.header, "name": name or self.name, "base": base}, self.values)


def seal(header: Mapping[str, Any], values: NDArray[np.float32]) -> Fingerprint:
    """A fingerprint that proves its content."""
    content = {name: value for name, value in header.items() if name != SEAL}
    return Fingerprint(sealed({**content, "values": digest(values.tobytes())}), values)


def fingerprint(source: str | Path | Mapping[str, Tensor], *, budget: int = BUDGET) -> Fingerprint:
    """The fingerprint of a model; from the Hub at most about ``budget`` bytes are read, by byte range.

    What is on the Hub in another format than safetensors is downloaded whole.

    Raises:
        InputError: as `open_checkpoint`; the model has no matrix; a value is NaN or Inf.
    """
    try:
        checkpoint = open_checkpoint(source, stream=True)
    except NotStreamable:
        checkpoint = open_checkpoint(source)
    refs = list(model_map(checkpoint).matrices)
    if not refs:
        raise InputError(f"{checkpoint.source}: holds no matrix of weights; want a model with at least one")
    sizes = [size for size in SIZES if len(refs) * 4 * _width(*size) <= LARGEST]
    n, q = sizes[0] if sizes else SIZES[-1]
    most = LARGEST // (4 * _width(n, q))
    if len(refs) > most:
        refs = [refs[int(k)] for k in np.linspace(0, len(refs) - 1, most).round()]
    whole = _read_whole(checkpoint, refs, budget)
    with ThreadPoolExecutor(THREADS) as pool:  # nearly all of it is in libraries that let threads run
        rows = list(pool.map(lambda ref, is_whole: _matrix(checkpoint, ref, is_whole, n, q), refs, whole))
    values = np.stack([row for row, _ in rows])
    matrices = [
        [ref.key.stack, ref.key.block, ref.key.role, ref.key.name, *ref.shape, proof]
        for ref, (_, proof) in zip(refs, rows, strict=True)
    ]
    header = {
        "version": 1, "name": checkpoint.source, "source": checkpoint.source, "base": False,
        "revision": checkpoint.revision, "entries": n, "orders": q, "matrices": matrices,
        "weights": joined_sha256(checkpoint, [sha256(path) for path in checkpoint.files]),
        "config": digest(json.dumps(dict(checkpoint.config), sort_keys=True)) if checkpoint.config else "",
        **_beside(source),
    }  # fmt: skip
    return seal(header, values)


@torch.no_grad()
def _matrix(
    checkpoint: Checkpoint, ref: MatrixRef, is_whole: bool, n: int, q: int
) -> tuple[NDArray[np.float32], str]:
    """The numbers of a matrix, and the digest of its values where all were read."""
    W = ref.read(checkpoint) if is_whole else None
    band = _band(checkpoint, ref) if W is None else W[slice(*rows_of(ref.shape))]
    if not bool(torch.isfinite(band).all()):
        raise InputError(f"{checkpoint.source}: {ref.key.name} has NaN or Inf entries; no fingerprint of it")
    values = np.full(_width(n, q), np.nan, np.float32)
    values[: 3 * n] = _entries(band, ref.shape, n).ravel()
    if W is not None:
        values[3 * n : -1] = _orders(W, q).ravel()
    values[-1] = float((band if W is None else W).float().square().mean().sqrt())
    return values, "" if W is None else digest(W.to(torch.float32))


def height(out: int) -> int:
    """The rows among which places are seeded: a power of two, so that a vocabulary may grow by a few."""
    return 1 << (out.bit_length() - 1)


def rows_of(shape: tuple[int, int]) -> tuple[int, int]:
    """The band of rows, start and stop, that holds the seeded places of a matrix."""
    high = height(shape[0])
    rows = min(high, max(1, BAND // shape[1]))
    return (start := _random(shape).randint(high - rows + 1)), start + rows


def places(shape: tuple[int, int], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows (of the band) and columns of the seeded entries: no line of the longer side is met twice.

    Then the entries of an independent training, whose hidden units come in any order, have random signs.
    """
    start, stop = rows_of(shape)
    random = _random(shape)
    rows, columns = random.permutation(stop - start), random.permutation(shape[1])
    n = min(n, max(len(rows), len(columns)))
    return np.resize(rows, n), np.resize(columns, n)


def _random(shape: tuple[int, int]) -> np.random.RandomState:
    # The one generator whose numbers are promised to stay: fingerprints of different years must meet.
    return np.random.RandomState([height(shape[0]), shape[1]])


def _width(n: int, q: int) -> int:
    return 3 * n + len(ORDERS) * q + 1


def _read_whole(checkpoint: Checkpoint, refs: Sequence[MatrixRef], budget: int) -> list[bool]:
    """Which matrices are read whole: all on disk; of those streamed, the smallest that the budget allows."""
    whole, left = [True] * len(refs), float(budget)
    beyond: list[tuple[int, int]] = []  # bytes beside the band, which is read in any case
    for k, ref in enumerate(refs):
        entry = checkpoint.entries[ref.parameter]
        row, (start, stop) = FORMATS[entry.dtype].bytes * ref.shape[1], rows_of(ref.shape)
        left -= row * (stop - start)
        if entry.part is not None and not ref.transposed and ref.groups == 1 and ref.columns is None:
            beyond.append((row * (ref.shape[0] - stop + start), k))
    for size, k in sorted(beyond):
        whole[k] = size <= left
        left -= size * whole[k]
    return whole


def _band(checkpoint: Checkpoint, ref: MatrixRef) -> Tensor:
    """The band of a matrix, by its byte range."""
    entry, width = checkpoint.entries[ref.parameter], ref.shape[1]
    first = (ref.expert or 0) * entry.shape[1] if ref.expert is not None else 0
    start, stop = (first + (ref.rows or (0,))[0] + row for row in rows_of(ref.shape))
    part = entry.part
    assert part is not None  # `_read_whole`
    return part(start * width, stop * width).reshape(-1, width)


def _entries(band: Tensor, shape: tuple[int, int], n: int) -> Floats:
    """(3, n): the seeded entries, the means of their rows and columns, and the steps of their grid."""
    X = band.to(torch.float64)
    rows, columns = (torch.from_numpy(index) for index in places(shape, n))
    centre = X.mean(1)[rows] + X.mean(0)[columns] - X.mean()
    result = np.full((3, n), np.nan)
    result[0, : len(rows)] = X[rows, columns].numpy()
    result[1, : len(rows)] = centre.numpy()
    # Rounding a quantised matrix hides its grid: then, negative, the step that 8 bits with a scale a row have.
    result[2, : len(rows)] = -X.abs().amax(1)[rows].numpy() / 127
    if shape[1] >= GROUP:
        first = (columns // GROUP * GROUP).clamp(max=shape[1] - GROUP)
        levels, step = grid(X[rows[:, None], first[:, None] + torch.arange(GROUP)])
        result[2, : len(rows)] = result[2, : len(rows)] if math.isnan(levels) else step.numpy()
    return result


def _orders(W: Tensor, q: int) -> Floats:
    """(`ORDERS`, q): each list in falling order, its leading half and evenly spaced ones of the rest."""
    squares, fourths = ([torch.zeros(0), torch.zeros(W.shape[1], dtype=torch.float64)] for _ in range(2))
    for block in torch.split(W, max(1, 2**22 // W.shape[1])):
        X = block.to(torch.float64).square()
        for sums, Y in ((squares, X), (fourths, X.square())):
            sums[:] = [torch.cat([sums[0], Y.sum(1)]), sums[1] + Y.sum(0)]
    lists = [torch.zeros(0), *(x.sqrt() for x in squares)]
    lists += [(y / x.square().clamp(min=1e-300)) ** 0.25 for x, y in zip(squares, fourths, strict=True)]
    if min(W.shape) <= SPECTRUM_SIDE and float(squares[1].sum()) > 0:
        lists[0] = gram_values(W)
    result = np.full((len(ORDERS), q), np.nan)
    for row, numbers in enumerate(lists):
        ordered = numbers.sort(descending=True).values.numpy()
        half = q // 2
        picked = np.r_[:half, np.linspace(half, len(ordered) - 1, q - half).round().astype(int)]
        ordered = ordered if len(ordered) <= q else ordered[picked]
        result[row, : len(ordered)] = ordered
    return result


def _beside(source: str | Path | Mapping[str, Tensor]) -> dict[str, Any]:
    """Digest of the tokenizer's file, and the bases that the model card names, where a model has them beside it."""
    if isinstance(source, Mapping):
        return {"tokenizer": "", "card": []}
    place, _ = locate(source, stream=True)
    with reading(place.source):
        names = place.names
        name = next((name for name in TOKENIZER if name in names), "")
        card = place.text("README.md").decode(errors="replace") if "README.md" in names else ""
        return {"tokenizer": digest(place.text(name)) if name else "", "card": base_models(card)}


def base_models(card: str) -> list[str]:
    """What a model card names as base_model in its front matter: a word, a list in brackets, or lines of a list."""
    front = re.match(r"\s*---\r?\n(.*?)\n---", card, re.DOTALL)
    named = re.search(r"^base_model:([^\n]*(?:\n[ \t]*-[^\n]*)*)", front[1] if front else "", re.MULTILINE)
    return re.findall(r"[\w./@:][\w./@:-]*", named[1]) if named else []
