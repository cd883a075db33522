"""Many comparisons as one population: summaries, and correlations with scores that say what they could have seen.

Reads the rows of results folders, and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.architecture.key import MatrixKey
from specbasis.architecture.selection import Selection
from specbasis.checkpoint.atomic import write_whole
from specbasis.comparison.comparison import Comparison, load
from specbasis.comparison.correlations import Correlation, correlate
from specbasis.comparison.facts import SIDES, Facts
from specbasis.comparison.summary import RoleSummary, summarise
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.statistics import LEVEL, detectable
from specbasis.core.text import csv_text, named_parts
from specbasis.jobs import results as store
from specbasis.jobs.folder import plain, write_json

DEPTHS = ("shallow", "middle", "deep")
"""Thirds of each stack of blocks, from the input."""

RANKS = ((1, 10), (11, 30), (31, 100), (101, 200))
"""Ranges of 1-based ranks, both ends included, within which alignment is averaged."""


@dataclass(frozen=True, eq=False)
class Member:
    """One pair of the population.

    Attributes:
        name: its label, with the folder before it where two folders have the same.
        pair: its label in its own folder.
        comparison: the folder that it is in.
        modality: what the models read, such as "vision"; empty where not said.
    """

    name: str
    pair: str
    comparison: Comparison
    modality: str = ""

    @property
    def base(self) -> str:
        """SHA-256 of its base: finetunes of one base are not independent of each other."""
        return str(self.comparison.manifest["base"]["sha256"])


@brief
@dataclass(frozen=True, eq=False)
class Population:
    """What many pairs add up to. Tables are lists of flat dictionaries, one for each line.

    Attributes:
        members: the pairs.
        models: one line for each pair: verdict, alignment, size of the update, what was found.
        parts: one line for each pair and role, and for each pair and block (kind, part).
        cells: one line for each pair, depth and range of ranks: mean alignment of both sides, resolved ranks only.
        correlations: see `Correlation`; empty without scores.
        score: name of the column of scores.
        unscored: pairs without a score.
    """

    members: list[Member]
    models: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    cells: list[dict[str, Any]]
    correlations: list[Correlation]
    score: str = ""
    unscored: tuple[str, ...] = ()

    @property
    def power(self) -> list[dict[str, Any]]:
        """For each modality and number of clusters: the least |r| that would have been seen 4 times in 5.

        Keys: modality, clusters, unit, tests, alone (at p < 0.05), family (at 0.05 / tests, the most that control
        can ask for).
        """
        lines = {(c.modality, c.clusters, c.unit, c.family) for c in self.correlations if c.family}
        return [
            {
                "modality": modality,
                "clusters": clusters,
                "unit": unit,
                "tests": family,
                "alone": detectable(clusters),
                "family": detectable(clusters, LEVEL / family),
            }
            for modality, clusters, unit, family in sorted(lines)
        ]

    def write(self, out: str | Path) -> Path:
        """Write models.csv, parts.csv, cells.csv, correlations.csv and population.json to a folder; returns it."""
        out = Path(out)
        tables = {
            "models": self.models,
            "parts": self.parts,
            "cells": self.cells,
            "correlations": [asdict(c) for c in self.correlations],
        }
        for name, lines in tables.items():
            names = list(dict.fromkeys(key for line in lines for key in line))
            if lines:
                write_whole(out / f"{name}.csv", csv_text(names, (map(line.get, names) for line in lines), ".6g"))
        whole = {"score": self.score, "unscored": self.unscored, "power": self.power} | tables
        write_json(out / "population.json", plain(whole))
        return out


def population(
    results: Sequence[str | Path | Comparison],
    *,
    scores: Mapping[str, float] | None = None,
    score: str = "score",
    modality: Mapping[str, str] | None = None,
    ranks: Sequence[tuple[int, int]] = RANKS,
    roles: Sequence[str] = (),
) -> Population:
    """Summaries over many pairs, and how the alignment of their parts goes with a score.

    For each modality, third of the depth and range of ranks: mean alignment of a model against its score, Spearman
    and Pearson, with permutation p-values adjusted over all of these tests of one method, intervals that draw whole
    families of finetunes, and the least correlation that so many models could have shown (`Population.power`).

    Args:
        results: results folders, or comparisons; each may have many pairs.
        scores: pair → score.
        score: what the score is called.
        modality: pair or folder → modality; correlations are taken within each.
        ranks: ranges of 1-based ranks, both ends included.
        roles: only matrices with these roles (a prefix such as "ffn" counts).

    Raises:
        InputError: a folder holds no results, or no pair has a score.

    Source: Yu et al. 2026, App. J, Fig. 18; Benjamini & Hochberg 1995; Benjamini & Yekutieli 2001.
    """
    members = gather(results, modality or {})
    for low, high in ranks:
        if not 1 <= low <= high:
            raise InputError(f"got ranks {low}-{high}; want ascending ranges from 1, such as 1-10")
    models = [_model(member) for member in members]
    parts = [line for member in members for line in _parts(member)]
    lines = [line for member in members for line in cells(member, ranks, roles)]
    known = {m.name: scores[key] for m in members for key in (m.name, m.pair) if scores and key in scores}
    unscored = tuple(m.name for m in members if m.name not in known) if scores is not None else ()
    if scores is not None and not known:
        pairs = named_parts((m.name for m in members), 3)
        raise InputError(f"no pair has a score: pairs are {pairs}; scores are for {named_parts(scores, 3)}")
    for line in models:
        if line["pair"] in known:
            line[score] = known[line["pair"]]
    correlations = correlate(lines, known, {m.name: m.base for m in members}) if known else []
    return Population(members, models, parts, lines, correlations, score if known else "", unscored)


def gather(results: Sequence[str | Path | Comparison], modality: Mapping[str, str]) -> list[Member]:
    """Every pair of some results folders, with a name of its own."""
    if isinstance(results, str | Path | Comparison):
        results = [results]
    comparisons = [r if isinstance(r, Comparison) else load(r) for r in results]
    folders = store.unique_labels([str(c.folder) for c in comparisons])
    labels = [label for c in comparisons for label in c.pairs]
    members = []
    for folder, comparison in zip(folders, comparisons, strict=True):
        for label in comparison.pairs:
            name = label if labels.count(label) == 1 else f"{folder}/{label}"
            keys = (name, label, folder, str(comparison.folder))
            members.append(Member(name, label, comparison, next((modality[k] for k in keys if k in modality), "")))
    if not members:
        raise InputError("got no results; want folders that compare wrote")
    return members


# --- tables -----------------------------------------------------------------------------------------------------


def _model(member: Member) -> dict[str, Any]:
    """A pair's line among the models."""
    comparison, pair = member.comparison, member.pair
    verdict, line = comparison.verdicts[pair], comparison.summaries[pair][-1]
    return {
        "pair": member.name,
        "base": comparison.manifest["base"]["source"],
        "modality": member.modality,
        "verdict": verdict.kind,
        "matrices": line.matrices,
        "frozen": len(verdict.frozen),
        "unrelated": len(verdict.unrelated),
        **_figures(line),
        "findings": "; ".join(finding.kind for finding in comparison.findings[pair]),
    }


def _figures(line: RoleSummary) -> dict[str, float]:
    sides = {
        f"{name}_{side}": getattr(line, name)[i]
        for name in ("top10", "top30", "chance")
        for i, side in enumerate(SIDES)
    }
    return sides | {"rsd": line.rsd, "relative_update": line.relative_update}


def _parts(member: Member) -> list[dict[str, Any]]:
    """A pair's lines by role and by block."""
    rows = member.comparison.facts[member.pair].rows
    parts = [("role", line.role, line) for line in member.comparison.summaries[member.pair][:-1]]
    for stack, block in _places(rows):
        of_block = rows.filter((pc.field("block") == block) & (pc.field("stack") == stack))
        parts.append(("block", f"{stack} {block}".strip(), summarise(Facts(of_block))[-1]))
    return [
        {"pair": member.name, "kind": kind, "part": part, "matrices": line.matrices, **_figures(line)}
        for kind, part, line in parts
    ]


def _places(rows: pa.Table) -> list[tuple[str, int]]:
    """(stack, block) of every block."""
    places = rows.filter(pc.is_valid(pc.field("block"))).group_by(["stack", "block"]).aggregate([])
    return sorted(zip(places["stack"].to_pylist(), places["block"].to_pylist(), strict=True))


def cells(
    member: Member, ranks: Sequence[tuple[int, int]] = RANKS, roles: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Mean alignment of a pair by third of the depth and range of ranks: over matrices, then over both sides."""
    rows = member.comparison.facts[member.pair].rows
    # Depth is counted in each stack over all of its blocks, whatever roles are asked for.
    last = dict(_places(rows))
    aligned = rows.filter(
        pc.is_in(pc.field("measure"), pa.array([f"alignment_{side}" for side in SIDES]))
        & (pc.field("resolved") == True)  # noqa: E712 - may be null
        & pc.is_valid(pc.field("block"))
    )
    selection = Selection(roles=tuple(roles))
    means: dict[tuple[str, tuple[int, int], str], list[float]] = {}
    for low, high in ranks:
        within = aligned.filter((pc.field("index") >= low - 1) & (pc.field("index") < high))
        of_matrices = within.group_by(["stack", "block", "role", "matrix", "measure"]).aggregate(
            [("value", "mean")]
        )
        for line in of_matrices.to_pylist():
            if selection.admits(MatrixKey(line["block"], line["role"], line["matrix"])):
                depth = DEPTHS[min(len(DEPTHS) - 1, len(DEPTHS) * line["block"] // (last[line["stack"]] + 1))]
                side = line["measure"].removeprefix("alignment_")
                means.setdefault((depth, (low, high), side), []).append(line["value_mean"])
    lines = []
    for depth, (low, high) in itertools.product(DEPTHS, ranks):
        left, right = (float(np.mean(means.get((depth, (low, high), side), [math.nan]))) for side in SIDES)
        lines.append(
            {
                "pair": member.name,
                "modality": member.modality,
                "depth": depth,
                "ranks": f"{low}-{high}",
                "alignment": (left + right) / 2,
                "alignment_left": left,
                "alignment_right": right,
            }
        )
    return lines
