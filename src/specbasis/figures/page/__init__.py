"""The page: one HTML file with data, style and drawing code inside, that asks nothing of the network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from specbasis.comparison.comparison import Comparison
from specbasis.figures.data import MARKED_RANKS, SIDES, Band, Floats, Pair, Series
from specbasis.figures.drawing import missing, requested
from specbasis.figures.summary import (
    COLUMNS,
    SEVERITIES,
    VERDICTS,
    by_reason,
    evidence,
    no_problems,
    over_all_ranks,
    summary_table,
)
from specbasis.figures.table import Column, Table, breakable
from specbasis.measures.table import registered
from specbasis.treatment.advice import next_steps

MOST_RANKS = 256
"""Ranks kept of each matrix, at most; the others are thinned out."""

MOST_POINTS = 200_000
"""Matrices × ranks that the page holds before it keeps fewer ranks of each (about 50 bytes a point)."""

N, CHANGE = "n", "effective_rank_change"
"""Columns of the table of matrices that are no measures: of how many ranks, and a difference of two measures."""


def render(comparison: Comparison, pairs: list[Pair]) -> bytes:
    """The page as UTF-8."""
    manifest = comparison.manifest
    points = sum(len(pair) for pair in pairs)
    limit = int(np.clip(MOST_POINTS // max(1, points), 32, MOST_RANKS))
    plotly = (files("specbasis.figures.page") / "plotly.js.gz").read_bytes()
    script = _asset("page.js")
    about = [_about(pair.label, comparison) for pair in pairs]
    columns = _columns(manifest, pairs)
    text = _template("page.html").render(
        manifest=manifest,
        manifest_text=json.dumps(manifest, indent=1, ensure_ascii=False),
        pairs=about,
        columns=columns,
        every_pair=Markup(_all_pairs(about).html()),
        signs=VERDICTS,
        severities=SEVERITIES,
        style=Markup(_asset("page.css")),
        plotly=base64.b64encode(plotly).decode("ascii"),
        script=Markup(_inline(script)),
        missing=missing(pairs),
        hashes=[_hash(gzip.decompress(plotly)), _hash(script.encode())],
        requested=requested(pairs),
        shared=Markup(_json({"table": columns, "marked": MARKED_RANKS})),
        data=[Markup(_json(_data(pair, limit))) for pair in pairs],
    )
    return text.encode("utf-8", "replace")


def render_treatment(**about: Any) -> str:
    """The page of what a treatment made: no script, one picture inside; see `figures.treatment.write_page`."""
    return _template("treatment.html").render(style=Markup(_asset("page.css")), **about)


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("specbasis.figures.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(name)


def _columns(manifest: dict[str, Any], pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    """(key, heading, meaning, number format) of the table of matrices, which follow from the table of measures."""
    columns = [(N, "n", "number of singular values", "d")]
    # First what is read first: the size of the update.
    for m in sorted(registered(), key=lambda m: m.name != "relative_update"):
        if m.shown == "matrices":
            columns.append((m.name, m.heading or m.name, f"{m.title}: {m.formula}", m.digits))
        if m.name == "effective_rank_tuned":
            columns.append((CHANGE, "ΔER", "effective rank of tuned minus that of base", "s1"))
    titles = {measure["name"]: measure["title"] for measure in manifest.get("measures", [])}
    numbers = dict.fromkeys(name for pair in pairs for name in pair.own_numbers)
    return [*columns, *((name, name, titles[name], "f") for name in numbers)]


def _all_pairs(pairs: list[dict[str, Any]]) -> Table:
    """A line for each pair: a button that chooses it, its verdict, and its means over all matrices."""
    button = Markup('<button type="button" class="link" data-choose-pair="{}">{}</button>')
    badge = Markup('<span class="badge {0}"><span aria-hidden="true">{1}</span> {0}</span>')
    rows = []
    for i, about in enumerate(pairs):
        kind = about["verdict"].kind
        _, *means = summary_table([about["summary"]]).rows[0]
        kinds = [f["finding"].kind for f in about["findings"] if f["finding"].severity == "problem"]
        badges = badge.format(kind, VERDICTS[kind]), ", ".join(kinds) or "none"
        rows.append((button.format(i, about["label"]), *badges, *means))
    columns = (Column("tuned"), Column("verdict", words=True), Column("problems", words=True), *COLUMNS[1:])
    return Table(columns, tuple(rows))


def _about(label: str, comparison: Comparison) -> dict[str, Any]:
    """What the page says in words and in its summary table about a pair."""
    about, summaries = comparison.manifest["pairs"][label], comparison.summaries[label]
    return {
        "label": label,
        "headline": comparison.headlines[label],
        "verdict": comparison.verdicts[label],
        "no_problems": no_problems(comparison.facts[label]),
        "findings": [{"finding": finding, "evidence": evidence(finding)} for finding in comparison.findings[label]],
        "summary": summaries[-1],
        "table": Markup(summary_table(summaries).html()),
        "next_steps": next_steps(comparison, label),
        "over_all_ranks": over_all_ranks(summaries[-1]),
        "notes": about["notes"],
        "architecture": about["architecture"],
        "tuned": about["tuned"],
        "skipped": by_reason(comparison.skipped[label]),
        "skipped_count": len(comparison.skipped[label]),
        "failed": [failure for failure in comparison.failed if failure["pair"] == label],
    }


def _data(pair: Pair, limit: int) -> dict[str, Any]:
    """What the figures of a pair draw, compactly."""
    whole = {m.name: pair.whole(m.name) for m in registered() if m.shown == "matrices"}
    whole[CHANGE] = whole["effective_rank_tuned"] - whole["effective_rank_base"]
    whole |= {f"chance_alignment_{side}": pair.whole(f"chance_alignment_{side}") for side in SIDES}
    whole |= {name: pair.whole(name) for name in pair.own if name not in pair.own_ranks}
    for side in SIDES:
        whole[f"turned_{side}"] = pair.turned(f"alignment_{side}")
        whole[f"turned_null_{side}"] = pair.turned(f"null_alignment_gaussian_{side}")
    whole[N] = pair.sizes.astype(float)
    names = [m.name for m in registered() if m.shown == "ranks"]
    return {
        "label": pair.label,
        "matrices": pair.matrices,
        "whole": {key: _floats(values) for key, values in whole.items()},
        "series": {name: _series(pair.series[name].thinned(limit)) for name in names if name in pair.series},
        "bands": {
            profile: {group: _band(band) for group, band in groups.items()}
            for profile, groups in pair.bands.items()
        },
        "own": pair.own_ranks,
        "panels": pair.panels(),
        "chance": {side: pair.chance_levels(side) for side in SIDES},
        "first": pair.representatives()[-1],
        "thinned": bool(pair.vectors() > limit),
    }


def _series(series: Series) -> dict[str, Any]:
    return {
        "start": _ints(series.start),
        "index": _ints(series.index),
        "value": _floats(series.value),
        "bound": None if np.isnan(series.bound).all() else _coarse(series.bound),
        "unresolved": np.flatnonzero(~series.resolved).tolist(),
    }


def _band(band: Band) -> dict[str, Any]:
    ends = {name: _floats(getattr(band, name)) for name in ("x", "low", "median", "high")}
    return {**ends, "count": _ints(band.count)}


def _floats(values: Floats) -> str:
    """float32, base64: seven digits, NaN and infinity included, in 5.3 characters a number."""
    with np.errstate(over="ignore"):
        return "f" + _base64(values.astype("<f4"))


def _coarse(values: Floats) -> str:
    """The leading 16 bits of float32 (sign, exponent, 7 bits), base64: two digits, for error bounds."""
    with np.errstate(over="ignore"):
        return "c" + _base64((values.astype("<f4").view("<u4") >> 16).astype("<u2"))


def _ints(values: npt.NDArray[np.int64]) -> str:
    """uint16 where that is enough, else int32, base64."""
    small = not len(values) or (values.min() >= 0 and values.max() < 2**16)
    return ("u" if small else "i") + _base64(values.astype("<u2" if small else "<i4"))


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _json(content: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _breakable(text: str) -> Markup:
    """See `breakable`; of a text that is not escaped yet."""
    return Markup(breakable(escape(text)))


def _asset(name: str) -> str:
    return (files("specbasis.figures.page") / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script as the text of a script element."""
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("a script that ends its own element cannot stand inside a page")
    return script


def _hash(script: bytes) -> str:
    """What a content security policy calls a script: only these scripts run in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode("ascii")
