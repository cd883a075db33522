"""Many full finetunes of one base on one task: does alignment say of the score what the update's size does not?

Rates × amounts of training × frozen blocks × seeds. Yu et al. 2026, App. J, ask it over published models, which
differ in base, data and task as well. A partial correlation holds the size fixed.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from specbasis.comparison.population import DEPTHS, RANKS
from specbasis.core.extras import quiet
from specbasis.core.statistics import Array, cluster_bootstrap, correlation, detectable, percentile_interval
from specbasis.core.subspace import alignment
from specbasis.core.svd import decompose
from specbasis.figures import kit
from specbasis.figures.table import Column, Table
from specbasis.finetuning.base import load_base
from specbasis.finetuning.methods.sites import ALL_LINEAR, sites
from specbasis.finetuning.options import require_libraries
from specbasis.finetuning.runs import finetune, load
from specbasis.finetuning.tasks import GLUE, Split, subset
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, run_experiments
from specbasis.jobs.progress import Progress
from specbasis.paper.anatomy import predictions, rounded
from specbasis.paper.grid import about_base, whole_task
from specbasis.paper.options import OneTaskOptions

RATES = (2e-5, 1e-4, 4e-4)
AMOUNTS = ((1000, 1), (1000, 3), (4000, 1), (4000, 2))
"""Examples, and epochs over them, in batches of 32."""

FROZEN = (0, 3)
"""Blocks that stay as they are, from the input; with 0 all of the model is trained, else linear layers alone."""

HELD_BACK = 2000
"""Examples of train that score the finetunes, beside the dev set."""

LEADING = 30
ALL = f"all 1-{LEADING}"
RESAMPLES = 4000


def run(options: OneTaskOptions, out: str | Path, progress: Callable[[Progress], None] | None = None) -> list[Row]:
    """One row a finetune: its score, the size of its update, and its alignment by depth and ranks."""
    require_libraries()
    names = ("seed", "frozen", "amount", "learning_rate")
    points = itertools.product(options.seeds, FROZEN, AMOUNTS, RATES)
    experiments = [{"task": options.task, **dict(zip(names, point, strict=True))} for point in points]
    call = functools.partial(measured, base=options.base, data_dir=options.data_dir)
    return run_experiments(
        experiments,
        call,
        out,
        config=about_base(options.base),
        uses=WHERE_USED,
        progress=progress,
        prepare=lambda experiment: whole_task(experiment["task"], data_dir=options.data_dir),
    )


def measured(experiment: Mapping[str, Any], *, base: str, data_dir: str | None) -> dict[str, Any]:
    """Train one finetune and measure it."""
    whole = whole_task(experiment["task"], data_dir=data_dir)
    examples, epochs = experiment["amount"]
    data = subset(whole, examples=examples, selection=HELD_BACK)
    with quiet():
        start = load_base(base, data.task)
    protocol = {name: experiment[name] for name in ("seed", "learning_rate")}
    protocol |= {"epochs": epochs, "batch_size": 32}
    if experiment["frozen"]:
        protocol["blocks"] = tuple(range(experiment["frozen"], start.model.config.num_hidden_layers))
    with tempfile.TemporaryDirectory() as folder:
        done = finetune(base, data, "full", out=Path(folder, "run"), **protocol)
        tuned, _ = load(Path(folder, "run"), base)
    dev, held = next(iter(data.dev.values())), data.selection
    judged = Split([*dev.inputs, *held.inputs], [*dev.labels, *held.labels])
    return {
        "score": data.task.score(predictions(tuned, start, judged).scores(data.task)),
        "examples": len(judged),
        "train_loss": done.metrics["train_loss"][-1],
        **moved(start.model, tuned),
    }


def moved(base: nn.Module, tuned: nn.Module) -> dict[str, Any]:
    """What became of the matrices of the blocks that were trained.

    size: the geometric mean of ‖Δ‖/‖W‖. alignment: by "DEPTH RANKS" as `comparison.population` has them, and of the
    leading ranks over all: |cos| of vectors of equal rank, mean over ranks, sides, and matrices.
    """
    sizes, curves, every = [], [], sites(base, ALL_LINEAR)
    for site in every:
        W, T = (model.get_parameter(f"{site.name}.weight").detach().double() for model in (base, tuned))
        if site.block is None or W.equal(T):
            continue
        sizes.append(float((T - W).norm() / W.norm()))
        a, b = decompose(W), decompose(T)
        curve = (alignment(a.U, b.U) + alignment(a.Vh.mT, b.Vh.mT)) / 2
        curves.append((site.block, curve.numpy()))
    count = 1 + max(site.block or 0 for site in every)
    means: dict[str, float] = {ALL: rounded(np.mean([curve[:LEADING].mean() for _, curve in curves]))}
    for third, (low, high) in itertools.product(range(len(DEPTHS)), RANKS):
        within = [
            curve[low - 1 : high].mean()
            for block, curve in curves
            if block * len(DEPTHS) // count == third and len(curve) >= low
        ]
        if within:
            means[f"{DEPTHS[third]} {low}-{high}"] = rounded(np.mean(within))
    return {"size": rounded(np.exp(np.mean(np.log(sizes)))), "alignment": means}


# --- what the rows say --------------------------------------------------------------------------------------------


def partial_correlation(x: Array, y: Array, z: Array) -> float:
    """Pearson's correlation of the ranks of x and y after a parabola in the rank of z is taken off both.

    A parabola, since the score rises with the size of the update and falls again; NaN where nothing is left.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (x, y, z)]
    centred = ranks[2] - ranks[2].mean()
    basis = np.linalg.qr(np.stack([np.ones_like(centred), centred, centred**2], axis=1))[0]
    left = [values - basis @ (basis.T @ values) for values in ranks[:2]]
    if min(np.abs(values).max() for values in left) < 1e-9 * len(x):
        return float("nan")
    return correlation(left[0], left[1], "pearson")


FIGURES: Mapping[str, Callable[[Array], float]] = {
    "score": lambda values: correlation(values[:, 0], values[:, 1]),
    "size": lambda values: correlation(values[:, 0], values[:, 2]),
    "score at equal size": lambda values: partial_correlation(*values.T),
}
"""What alignment is correlated with; of alignment, score and size of each finetune."""


def correlations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every part's `FIGURES`, each with an interval that draws settings with all of their seeds."""
    settings = [json.dumps({k: v for k, v in row.experiment.items() if k != "seed"}) for row in rows]
    lines = []
    for part in dict.fromkeys(name for row in rows for name in row.values["alignment"]):
        chosen = [i for i, row in enumerate(rows) if part in row.values["alignment"]]
        values = np.array(
            [(v["alignment"][part], v["score"], v["size"]) for v in (rows[i].values for i in chosen)], np.float64
        )
        clusters = np.unique([settings[i] for i in chosen], return_inverse=True)[1]
        line: dict[str, Any] = {"part": part, "finetunes": len(chosen), "settings": int(clusters.max()) + 1}
        line |= {name: _with_interval(figure, values, clusters) for name, figure in FIGURES.items()}
        lines.append(line)
    return lines


def _with_interval(figure: Callable[[Array], float], values: Array, clusters: Any) -> tuple[float, float, float]:
    draws = cluster_bootstrap(lambda drawn: figure(values[drawn]), clusters, RESAMPLES)
    return (figure(values), *percentile_interval(draws))


def write(rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``one-task.md``, and ``one-task.png`` and ``.svg``, into the folder of the rows."""
    done = [row for row in rows if row.error is None]
    parts = [f"# Alignment against score at equal size: {base}"]
    if len(done) > 4:
        parts += _words(done)
    parts += [f"- {' '.join(map(str, row.experiment.values()))}: {row.error}" for row in rows if row.error]
    return kit.write_page(Path(out) / "one-task.md", parts, lambda: _figure(done, base) if done else None)


def _words(rows: Sequence[Row]) -> list[str]:
    lines = correlations(rows)
    columns = [Column("matrices and ranks", words=True), Column("finetunes"), *(Column(name) for name in FIGURES)]
    body = [(line["part"], line["finetunes"], *(_shown(*line[name]) for name in FIGURES)) for line in lines]
    settings, task = lines[0]["settings"], GLUE[rows[0].experiment["task"]]
    return [
        f"{len(rows)} full finetunes on {task.title}, {settings} settings; scored on "
        f"{rows[0].values['examples']} examples. Spearman's correlation of alignment (trained matrices alone) "
        "with the score and with ‖Δ‖/‖W‖, and with the score after a parabola in the rank of the size is taken off "
        f"both; in brackets 95 % by a bootstrap that draws settings. {settings} independent settings show |r| ≥ "
        f"{detectable(settings):.2f} 4 times in 5.",
        Table(tuple(columns), tuple(body)).markdown(),
    ]


def _shown(value: float, low: float, high: float) -> str | None:
    """A correlation and its interval; nothing where alignment and size have one order, so that nothing is left."""
    return None if np.isnan(value) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _figure(rows: Sequence[Row], base: str) -> kit.Figure:
    axes: Any
    figure, axes = kit.free_panels(1, 2, (3.8, 3.4), f"One base, one task: {base}")
    aligned = np.array([row.values["alignment"][ALL] for row in rows])
    score, size = (np.array([row.values[name] for row in rows]) for name in ("score", "size"))
    for ax, x, label in (
        (axes[0][0], aligned, f"alignment of the leading {LEADING} ranks"),
        (axes[0][1], size, "‖Δ‖/‖W‖ of the trained matrices"),
    ):
        for frozen, marker in zip(FROZEN, "os", strict=True):
            at = np.array([row.experiment["frozen"] == frozen for row in rows])
            words = f"{frozen} blocks frozen" if frozen else "all trained"
            ax.scatter(x[at], 100 * score[at], s=18, marker=marker, color=kit.COLORS[frozen % 2], label=words)
        ax.set(xlabel=label, ylabel="accuracy (%)")
    kit.logarithmic(axes[0][1], "x")
    kit.few_decades(axes[0][1])
    axes[0][0].legend(fontsize=7)
    return figure
