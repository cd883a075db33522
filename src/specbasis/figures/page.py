"""The page: one HTML file with data, style and drawing code inside, that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from specbasis.comparison.facts import Facts
from specbasis.comparison.findings import find
from specbasis.comparison.summary import summarise
from specbasis.comparison.verdict import judge
from specbasis.figures.data import (
    MARKED_RANKS,
    SIDES,
    Band,
    Floats,
    Pair,
    Series,
    missing,
    own_numbers,
    own_ranks,
    representatives,
    turned,
)
from specbasis.figures.tables import HEADINGS, SEVERITIES, VERDICTS, by_reason, cells, evidence, over_all_ranks
from specbasis.measures.table import registered

MOST_RANKS = 256
"""Ranks kept of each matrix, at most; the others are thinned out."""

MOST_POINTS = 200_000
"""Matrices × ranks that the page holds before it keeps fewer ranks of each (about 50 bytes a point)."""

EFFECTIVE_RANK_CHANGE = (
    "effective_rank_change",
    "ΔER",
    "effective rank of tuned minus that of base",
    "s1",
)


def _per_rank() -> list[str]:
    """Measures of which the page holds the figures of every matrix."""
    return [m.name for m in registered() if m.shown == "ranks"]


def _table() -> list[tuple[str, str, str, str]]:
    """Columns of the table of matrices: key, heading, meaning, number format."""
    columns = [("n", "n", "number of singular values", "d")]
    for m in registered():
        if m.shown == "matrices":
            columns.append((m.name, m.heading, f"{m.title}: {m.formula}", m.digits))
        if m.name == "effective_rank_tuned":
            columns.append(EFFECTIVE_RANK_CHANGE)
    return columns


def render(manifest: dict[str, Any], pairs: list[Pair], bands: list[dict[str, dict[str, Band]]]) -> bytes:
    """The page as UTF-8."""
    points = sum(len(pair) for pair in pairs)
    limit = int(np.clip(MOST_POINTS // max(1, points), 32, MOST_RANKS))
    scripts = [get_plotlyjs(), _asset("page.js")]
    environment = Environment(
        loader=PackageLoader("specbasis.figures", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    text = environment.get_template("page.html").render(
        manifest=manifest,
        manifest_text=json.dumps(manifest, indent=1, ensure_ascii=False),
        pairs=[_about(pair, manifest) for pair in pairs],
        headings=HEADINGS,
        signs=VERDICTS,
        severities=SEVERITIES,
        style=Markup(_asset("page.css")),
        scripts=[Markup(_inline(script)) for script in scripts],
        missing=missing(pairs),
        hashes=[_hash(script) for script in scripts],
        shown={
            "nulls": any("null_alignment_gaussian_left" in pair.series for pair in pairs),
            "heads": any("head_rotation" in pair.series for pair in pairs),
            "own": any(own_ranks(pair) for pair in pairs),
        },
        shared=Markup(_json({"table": _columns(manifest, pairs), "marked": MARKED_RANKS})),
        data=[Markup(_json(_data(pair, band, limit))) for pair, band in zip(pairs, bands, strict=True)],
    )
    return text.encode("utf-8", "replace")


def _columns(manifest: dict[str, Any], pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    """Columns of the table of matrices: the built-in ones, and a user's own figures of whole matrices."""
    titles = {measure["name"]: measure["title"] for measure in manifest.get("measures", [])}
    mine = dict.fromkeys(name for pair in pairs for name in own_numbers(pair))
    return [*_table(), *((name, name, titles[name], "f") for name in mine)]


def _about(pair: Pair, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the page says in words and in its summary table about a pair."""
    about = manifest["pairs"][pair.label]
    facts = Facts(pair.rows, [failure for failure in manifest["failed"] if failure["pair"] == pair.label])
    summaries, verdict = summarise(facts), judge(facts)
    return {
        "label": pair.label,
        "verdict": verdict,
        "findings": [{"finding": finding, "evidence": evidence(finding)} for finding in find(facts, verdict)],
        "lines": [cells(line) for line in summaries],
        "over_all_ranks": over_all_ranks(summaries[-1]),
        "notes": about["notes"],
        "architecture": about["architecture"],
        "tuned": about["tuned"],
        "skipped": by_reason(about["skipped"]),
        "skipped_count": len(about["skipped"]),
        "failed": facts.failed,
    }


def _data(pair: Pair, bands: dict[str, dict[str, Band]], limit: int) -> dict[str, Any]:
    """What the figures of a pair draw, compactly."""
    whole = {key: pair.whole(key) for key, *_ in _table() if key not in ("n", "effective_rank_change")}
    whole["effective_rank_change"] = whole["effective_rank_tuned"] - whole["effective_rank_base"]
    whole |= {f"chance_alignment_{side}": pair.whole(f"chance_alignment_{side}") for side in SIDES}
    whole |= {name: pair.whole(name) for name in pair.own if name not in own_ranks(pair)}
    for side in SIDES:
        whole[f"turned_{side}"] = turned(pair, f"alignment_{side}")
        whole[f"turned_null_{side}"] = turned(pair, f"null_alignment_gaussian_{side}")
    whole["n"] = pair.figures("singular_value_base").lengths.astype(float)
    return {
        "label": pair.label,
        "matrices": pair.matrices,
        "whole": {key: _floats(values) for key, values in whole.items()},
        "series": {name: _series(pair.series[name].thinned(limit)) for name in _per_rank() if name in pair.series},
        "bands": {
            profile: {group: _band(band) for group, band in groups.items()} for profile, groups in bands.items()
        },
        "own": own_ranks(pair),
        "panels": pair.panels(),
        "chance": {side: pair.chance_levels(side) for side in SIDES},
        "first": representatives(pair)[-1],
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
    return {
        "x": _floats(band.x),
        "low": _floats(band.low),
        "median": _floats(band.median),
        "high": _floats(band.high),
        "count": _ints(band.count),
    }


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
    """A path or name that may be broken into lines behind its separators."""
    parts = re.split(r"(?<=[/._\[])", text)
    return Markup("<wbr>").join(parts)


def _asset(name: str) -> str:
    return (files("specbasis.figures") / "assets" / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script as the text of a script element."""
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("a script that ends its own element cannot stand inside a page")
    return script


def _hash(script: str) -> str:
    """What a content security policy calls a script: only these scripts run in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
