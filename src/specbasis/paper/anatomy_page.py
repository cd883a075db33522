"""Where updates live, as a page: shares of ‖Δ‖² by kind of matrix, scores under every edit, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.core.statistics import mean_and_spread
from specbasis.figures import kit
from specbasis.figures.kit import Figure
from specbasis.figures.table import Column, Table
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row
from specbasis.paper.anatomy import SIZES

KINDS: Mapping[str, Callable[[str], bool]] = {
    "attention": lambda name: "attention" in name,
    "FFN up": lambda name: name.endswith("intermediate.dense"),
    "FFN down": lambda name: name.endswith("output.dense") and "attention" not in name,
    "pooler": lambda name: name.endswith("pooler.dense"),
}
"""The groups of matrices of a BERT."""

PARTS = {
    "leading": "the leading K × K block of Uᵀ Δ V",
    "middle": "its middle block",
    "last": "its last block",
    "chance": "K × K in a random basis",
    "diagonal": "K leading values alone",
    "entries": "its K² largest entries, anywhere",
    "plain": "the K² largest entries of Δ",
    "low_rank": "the best low rank with at most K² numbers (at least rank 1)",
}


def write(rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``anatomy.md``, and ``anatomy.png`` and ``.svg``, into the folder of the rows."""
    path = Path(out) / "anatomy.md"
    done = [row for row in rows if row.error is None]
    by_task: dict[str, list[Row]] = {}
    for row in done:
        by_task.setdefault(row.experiment["task"], []).append(row)
    parts = [f"# Where a finetune's update lives: {base}"]
    if done:
        parts += ["## Scores", *_scores(by_task), "## Shares of ‖Δ‖²", *_shares(done)]
    parts += [f"- {' '.join(map(str, row.experiment.values()))}: {row.error}" for row in rows if row.error]
    return kit.write_page(path, parts, lambda: _figure(done, by_task, base) if done else None)


def _scores(by_task: Mapping[str, Sequence[Row]]) -> list[str]:
    edits = dict.fromkeys(name for rows in by_task.values() for row in rows for name in row.values["scores"])
    columns = [Column("what the matrices are", words=True)]
    for task, rows in by_task.items():
        columns += [Column(GLUE[task].title), Column(f"− tuned ({len(rows)} seeds)")]
    body = [
        (
            edit,
            *(cell for rows in by_task.values() for cell in _cells([row.values["scores"][edit] for row in rows])),
        )
        for edit in edits
    ]
    return [
        "Score × 100 on the dev set, mean ± standard deviation over seeds; and the mean difference to the unedited "
        "finetune, in brackets the lowest lower and the highest upper end of the seeds' 95 % intervals over the "
        "examples (paired bootstrap). All matrices of attention and feed-forward networks are edited at once, with "
        "“+ pooler” the pooler too; embeddings, norms, biases and the task's head stay tuned.",
        Table(tuple(columns), tuple(body)).markdown(),
    ]


def _cells(scores: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    mean, spread = mean_and_spread([100 * score["score"] for score in scores])
    shown = f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
    if "difference" not in scores[0]:
        return shown, None
    low = 100 * min(score["interval"][0] for score in scores)
    high = 100 * max(score["interval"][1] for score in scores)
    return shown, f"{100 * np.mean([score['difference'] for score in scores]):+.1f} [{low:+.1f}, {high:+.1f}]"


def _shares(rows: Sequence[Row]) -> list[str]:
    parts = [
        "Means over all finetunes and matrices of a kind, in percent. "
        + "; ".join(f"{name}: {about}" for name, about in PARTS.items())
        + ".",
    ]
    columns = (Column("matrices", words=True), Column("K"), *(Column(name, ".2f") for name in PARTS))
    body = [
        (kind, K, *(100 * value for value in shares.values()))
        for kind in KINDS
        for K in SIZES
        if (shares := mean_shares(rows, kind, K))
    ]
    parts.append(Table(columns, tuple(body)).markdown())
    of_all = (
        Column("matrices", words=True),
        *(Column(name, ".3f") for name in ("‖Δ‖/‖W‖", "σ₁(Δ)/σ₁(W)", "in the thin basis", "chance")),
    )
    names = ("size", "top", "thin", "thin_chance")
    table = [(kind, *(float(np.mean([m[n] for m in _of(rows, kind)])) for n in names)) for kind in KINDS]
    return [*parts, Table(of_all, tuple(table)).markdown()]


def _of(rows: Sequence[Row], kind: str) -> list[Mapping[str, Any]]:
    return [m for row in rows for name, m in row.values["matrices"].items() if KINDS[kind](name)]


def mean_shares(rows: Sequence[Row], kind: str, K: int) -> dict[str, float]:
    """The mean share of every part over finetunes and matrices of a kind."""
    matrices = [m[str(K)] for m in _of(rows, kind) if str(K) in m]
    return {name: float(np.mean([m[name] for m in matrices])) for name in PARTS} if matrices else {}


SHOWN = ("base values", "base values, rotated", "base vectors", "base vectors, rotated", "base", "leading 150",
         "random 150", "low rank 150")  # fmt: skip


def _figure(rows: Sequence[Row], by_task: Mapping[str, Sequence[Row]], base: str) -> Figure:
    kinds = [kind for kind in KINDS if kind != "pooler" and _of(rows, kind)]
    figure, axes = kit.free_panels(1, len(kinds) + 1, (3.4, 3.3), f"Where a finetune's update lives: {base}")
    for ax, kind in zip(axes[0], kinds, strict=False):
        shares = {K: mean for K in SIZES if (mean := mean_shares(rows, kind, K))}
        for i, name in enumerate(n for n in PARTS if n != "chance"):
            ax.plot(list(shares), [100 * s[name] for s in shares.values()], "o-", markersize=3, linewidth=1.2,
                    color=kit.COLORS[i % len(kit.COLORS)], label=name.replace("_", " "))  # fmt: skip
        chance = [100 * s["chance"] for s in shares.values()]
        ax.plot(list(shares), chance, "--", color=kit.QUIET, linewidth=1, label="chance")
        ax.set(title=kind, xlabel="K", ylabel="share of ‖Δ‖² (%)", xscale="log")
        kit.logarithmic(ax, "y")
        ax.set_xticks(list(shares), [str(K) for K in shares])
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _bars(axes[0][-1], by_task)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=8)
    return figure


def _bars(ax: Any, by_task: Mapping[str, Sequence[Row]]) -> None:
    for i, (task, rows) in enumerate(by_task.items()):
        means = [100 * np.mean([row.values["scores"][edit]["difference"] for row in rows]) for edit in SHOWN]
        places = [-j + 0.18 * (i - 1.5) for j in range(len(SHOWN))]
        ax.plot(means, places, "o", markersize=4, color=kit.COLORS[i], label=GLUE[task].title)
    ax.axvline(0, color=kit.QUIET, linewidth=1, zorder=0)
    ax.set_yticks([-j for j in range(len(SHOWN))], SHOWN, fontsize=7)
    ax.set(title="scores of edited models", xlabel="score − tuned (points)")
    ax.legend(fontsize=7, loc="upper left")
