"""Correlations of alignment with scores over the models of a population, and the scores themselves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.checkpoint.regular import regular
from specbasis.core.errors import InputError
from specbasis.core.statistics import (
    METHODS,
    adjusted,
    correlation,
    correlation_interval,
    correlation_test,
)

LEAST = 5
"""Fewer units than this give no correlation: its interval would span everything."""

RESAMPLES = 4999
"""Of a permutation test; a fifth of them for an interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Correlation between the mean alignment of a part of the models and a score, over models.

    Attributes:
        modality, depth, ranks: the part.
        method: "spearman" or "pearson".
        models, clusters: how many models, and how many units are drawn and exchanged.
        unit: what these are: "base", each with all its finetunes; "finetune" where there are fewer than `LEAST`
            bases: then nothing is said about other bases.
        r: the coefficient, over models.
        low, high: 95 % interval, by a bootstrap that draws units.
        p: permutation p-value; over the means of each base where these are the units.
        q_bh, q_by: p adjusted for the family: Benjamini–Hochberg, and Benjamini–Yekutieli for any dependence.
        family: how many tests the family has: all parts and modalities of this method.
    """

    modality: str
    depth: str
    ranks: str
    method: str
    models: int
    clusters: int
    unit: str
    r: float
    low: float
    high: float
    p: float
    q_bh: float
    q_by: float
    family: int


def correlate(
    cells: Sequence[Mapping[str, Any]], scores: Mapping[str, float], clusters: Mapping[str, str]
) -> list[Correlation]:
    """Every cell's alignment against the scores, both methods, each adjusted over its own family."""
    groups: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for line in cells:
        if line["pair"] in scores and math.isfinite(line["alignment"]):
            groups.setdefault((line["modality"], line["depth"], line["ranks"]), []).append(
                (line["pair"], line["alignment"])
            )
    correlations: list[Correlation] = []
    for method in METHODS:
        tests = []
        for part, members in groups.items():
            names, alignments = zip(*members, strict=True)
            x, y = np.array(alignments), np.array([scores[name] for name in names])
            unit, of = units(names, clusters)
            tests.append((part, len(x), int(of.max()) + 1, unit, _test(method, x, y, of)))
        p = [figures[-1] for *_, figures in tests]
        family = int(np.isfinite(p).sum())
        correlations += [
            Correlation(*part, method, n, k, unit, *figures, float(bh), float(by), family)
            for (part, n, k, unit, figures), bh, by in zip(tests, adjusted(p, "bh"), adjusted(p, "by"), strict=True)
        ]
    return correlations


def units(names: Sequence[str], bases: Mapping[str, str]) -> tuple[str, NDArray[Any]]:
    """What may be drawn and exchanged, and the number of each model's: bases, or finetunes where bases are few."""
    of = np.unique([bases.get(name, name) for name in names], return_inverse=True)[1]
    return ("base", of) if of.max(initial=-1) + 1 >= LEAST else ("finetune", np.arange(len(names)))


def _test(method: str, x: Floats, y: Floats, of: NDArray[Any]) -> tuple[float, float, float, float]:
    """(r, low, high, p) of one cell; NaN where there are fewer than `LEAST` clusters or nothing varies."""
    clusters = range(of.max() + 1)
    p = math.nan
    if len(clusters) >= LEAST:
        a, b = (np.array([values[of == c].mean() for c in clusters]) for values in (x, y))
        p = correlation_test(a, b, RESAMPLES, method)
    if math.isnan(p):
        return (math.nan,) * 4
    return correlation(x, y, method), *correlation_interval(x, y, of, RESAMPLES // 5, method), p


def read_scores(path: Path, column: str = "") -> tuple[dict[str, float], str]:
    """Scores from a CSV file with a column ``pair`` or ``model``, and the name of their column.

    Raises:
        InputError: no such file or column, several columns to choose from, or a score that is no number.
    """
    try:
        with regular(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines, fields = list(reader), [name for name in reader.fieldnames or [] if name]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    key = next((name for name in ("pair", "model") if name in fields), "")
    if not key:
        raise InputError(f"{path}: has columns {', '.join(fields) or 'none'}; want one called pair or model")
    others = [name for name in fields if name != key]
    if column not in others and (column or len(others) != 1):
        raise InputError(f"{path}: which column holds the scores? there is: {', '.join(others)}; say --column NAME")
    column = column or others[0]
    scores = {}
    for i, line in enumerate(lines, 2):
        text = (line[column] or "").strip()
        if not text:
            continue
        try:
            scores[line[key]] = float(text)
        except ValueError as error:
            raise InputError(f"{path}, line {i}: got {text!r} in column {column}; want a number") from error
        if not math.isfinite(scores[line[key]]):
            raise InputError(f"{path}, line {i}: got {text!r} in column {column}; want a finite number")
    return scores, column
