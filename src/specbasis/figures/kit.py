"""What every figure is made of: style, panels, bands, heat maps, scatters, axes, legends, and the two files.

Only this module imports matplotlib, when a figure is drawn: without the extra ``report`` the rest still works.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.extras import require

Floats = npt.NDArray[np.float64]
Figure = Any
Axes = Any
"""Matplotlib's, which has no types and is imported late."""

COLORS = ("#0072b2", "#c2410c", "#00795c", "#a8357f", "#7d6200", "#5a4fcf", "#4f5b66", "#9b1c31")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
QUIET = "#57606a"
INK = "#1b1f24"
MISSING = "#c9ced6"
"""Behind a heat map: what has no figure."""
REFERENCE = (0, (4, 3))
"""The dash of chance levels and other lines to compare with."""

STYLE = {
    "svg.hashsalt": "specbasis",  # equal figures get equal files
    "font.family": "DejaVu Sans",  # part of matplotlib: the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.labelcolor": QUIET,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a dollar
    "figure.facecolor": "white",
}

# --- files --------------------------------------------------------------------------------------------------------


def render(name: str, make: Callable[[], Figure]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of a figure, as PNG and as SVG; equal figures give equal bytes. None is not drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", extra="report", purpose="figures need")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script; drawn as boxes
        figure = make()
        if figure is None:
            return
        FigureCanvasAgg(figure)
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=144, metadata=metadata)
            yield f"{name}.{form}", buffer.getvalue()


def write_figure(path: Path, make: Callable[[], Figure]) -> list[Path]:
    """Write a figure as PNG and SVG, beside each other under the name of a path; returns the two.

    Raises:
        InputError: matplotlib is not installed, or the folder cannot be written.
    """
    written = []
    for name, content in render(path.stem, make):
        written.append(path.with_name(name))
        write_whole(written[-1], content)
    return written


def write_page(path: Path, parts: Iterable[str], make: Callable[[], Figure]) -> list[Path]:
    """Write a page of Markdown, its parts apart by empty lines, and its figure beside it; returns the files."""
    write_whole(path, "\n\n".join(part.rstrip("\n") for part in parts) + "\n")
    return [path, *write_figure(path, make)]


# --- panels -------------------------------------------------------------------------------------------------------


def panels(
    down: int,
    across: int,
    size: tuple[float, float],
    title: str,
    *,
    between: float = 0.3,
    right: float = 0.15,
    left: float = 0.7,
    below: float = 0.6,
) -> tuple[Figure, Any]:
    """Panels of a size in inches, on fixed places: an automatic layout would draw everything several times."""
    from matplotlib.figure import Figure

    top, gap = 0.7, 0.62
    width = left + across * size[0] + (across - 1) * between + right
    height = top + down * size[1] + (down - 1) * gap + below
    figure = Figure(figsize=(width, height))
    points = min(11.0, 72 * (width - 0.2) / (0.68 * len(title)))  # a long title shrinks to fit
    figure.text(0.12 / width, 1 - 0.28 / height, title, weight="bold", size=points)
    places = {
        "left": left / width,
        "right": 1 - right / width,
        "top": 1 - top / height,
        "bottom": below / height,
        "wspace": between / size[0],
        "hspace": gap / size[1],
    }
    return figure, figure.subplots(down, across, squeeze=False, gridspec_kw=places)


def free_panels(down: int, across: int, size: tuple[float, float], title: str, **shared: Any) -> tuple[Figure, Any]:
    """Panels whose places follow from what stands around them, for long labels; ``shared`` as subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * across, size[1] * down + 0.5), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=10)
    return figure, figure.subplots(down, across, squeeze=False, **shared)


def hide(axes: Any, used: int) -> None:
    """Show nothing where panels beyond the first ``used`` would stand."""
    for ax in axes.flat[used:]:
        ax.set_visible(False)


def nothing(ax: Axes, text: str) -> None:
    """Say in the middle of a panel why it is empty."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", color=QUIET)


# --- marks --------------------------------------------------------------------------------------------------------


def band(
    ax: Axes,
    x: npt.ArrayLike,
    low: npt.ArrayLike,
    middle: npt.ArrayLike,
    high: npt.ArrayLike,
    *,
    color: str,
    label: str | None = None,
    dash: Any = "solid",
    width: float = 1.7,
    alpha: float = 0.16,
    fill_label: str | None = None,
    **marks: Any,
) -> None:
    """A line, and what lies between two others around it; with dots where a line would not be seen."""
    if alpha:
        ax.fill_between(x, low, high, color=color, alpha=alpha, lw=0, label=fill_label)
    marks = marks or {"marker": "o" if np.size(x) < 3 else None}
    ax.plot(x, middle, color=color, lw=width, ls=dash, label=label, **marks)


def heat(ax: Axes, values: Floats, extent: tuple[float, float, float, float] | None = None, **colors: Any) -> Any:
    """A heat map from 0 to 1, grey where there is no figure; ``colors`` as matplotlib's imshow."""
    ax.grid(False)
    ax.set_facecolor(MISSING)
    look = {"cmap": "cividis", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    return ax.imshow(values, extent=extent, **(look | colors))


def numbers(ax: Axes, values: Floats, texts: Sequence[Sequence[str]], down: Any, across: Any, **colors: Any) -> Any:
    """Values as colours (see `heat`) with texts on them; the rows and columns have names."""
    for y, line in enumerate(texts):
        for x, text in enumerate(line):
            ink = "#ffffff" if colors.get("alpha") is None and abs(values[y, x]) > 0.6 else INK
            ax.text(x, y, text, ha="center", va="center", size=6.5, color=ink)
    image = heat(ax, values, **colors)
    ax.set_facecolor("white")
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down)
    return image


def scatter(ax: Axes, x: Floats, y: Floats, color: Floats, size: float = 26, edge: float = 0.6) -> Any:
    """Dots on a scale of colours from 0 to 1."""
    return ax.scatter(x, y, c=color, cmap="cividis", vmin=0, vmax=1, edgecolor=INK, linewidth=edge, s=size)


def colorbar(figure: Figure, marks: Any, title: str, bottom: float, height: float, *, right: float = 0.6) -> Any:
    """A bar of colours on a fixed place, in inches from the lower right corner."""
    across, up = figure.get_size_inches()
    place = figure.add_axes((1 - right / across, bottom / up, 0.12 / across, height / up))
    bar = figure.colorbar(marks, cax=place)
    bar.outline.set_visible(False)
    if title:
        bar.ax.set_title(title, size=8, weight="normal", color=QUIET, loc="center")
    return bar


def reference(ax: Axes, level: float, label: str | None = None, dash: Any = REFERENCE) -> None:
    """A level to compare with, such as chance."""
    ax.axhline(level, color=QUIET, lw=0.9, ls=dash, zorder=1, label=label)


def chance_lines(ax: Axes, levels: Sequence[tuple[int, float, int]]) -> None:
    """Levels of chance by dimension; those that lie close together share one label, above the highest."""
    clusters: list[list[tuple[int, float]]] = []
    for d, level, _ in sorted(levels, key=lambda entry: -entry[1]):
        ax.axhline(level, color=QUIET, lw=0.8, ls=REFERENCE, zorder=1)
        if clusters and clusters[-1][0][1] - level < 0.06:
            clusters[-1].append((d, level))
        else:
            clusters.append([(d, level)])
    for cluster in clusters:
        ax.annotate(
            f"chance, d = {', '.join(str(d) for d, _ in cluster)}",
            (1, cluster[0][1]),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            size=7,
            color=QUIET,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )


# --- axes ---------------------------------------------------------------------------------------------------------


def rank_axis(ax: Axes, *, limits: bool = True) -> None:
    """Ticks that begin at rank 1, as ranks do."""
    low, high = ax.get_xlim()
    high = max(high, 1.5)
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000) if (high - 1) / s <= 7), 5000)
    ax.set_xticks([1, *(t for t in range(step, int(high) + 1, step) if t > 1)])
    if limits:
        ax.set_xlim(max(low, -0.05 * high), high)


def block_axis(ax: Axes, blocks: Sequence[int | None], places: Sequence[float]) -> None:
    """Ticks with the numbers of blocks; a dash for a matrix outside of the blocks."""
    ax.set_yticks(places, ["–" if block is None else str(block) for block in blocks])
    ax.tick_params(axis="y", length=0)


def logarithmic(ax: Axes, which: str) -> None:
    """A logarithmic axis whose ticks are plain characters: a figure's text is never read as a formula."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_formatter(NullFormatter())


def stretched(ax: Axes, most: int = 7) -> None:
    """A vertical axis from 0 to 1 that is logarithmic in 1 − y: 0, 0.9, 0.99, … stand at equal steps."""
    ax.set_yscale(
        "function", functions=(lambda y: -np.log10(np.maximum(10.0**-most, 1 - y)), lambda nines: 1 - 10.0**-nines)
    )
    places = [1 - 10.0**-n for n in range(most + 1)]
    ax.set_yticks(places, [f"{y:.{n}f}" if n < 3 else f"1−{_power(10.0**-n, 0)}" for n, y in enumerate(places)])
    ax.tick_params(axis="y", labelsize=7)
    ax.yaxis.minorticks_off()
    ax.set_ylim(0, 1 - 10.0**-most)


def _power(value: float, _: int) -> str:
    """A power of ten in plain characters."""
    if 0.01 <= value <= 100:
        return f"{value:g}"
    return "10" + str(round(np.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def few_decades(ax: Axes) -> None:
    """Readable ticks where a logarithmic x axis spans little."""
    low, high = ax.get_xlim()
    if ax.get_xscale() == "log" and high / low < 100:
        ticks = [m * 10.0**e for e in range(-12, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])


# --- words --------------------------------------------------------------------------------------------------------


def legend_of_pairs(
    figure: Figure, ax: Axes, labels: Sequence[str], extra: str = "", dash: Any = REFERENCE
) -> None:
    """The lines "0", "1" … of a panel by the names of their pairs, below the panels, and one extra."""
    from matplotlib.lines import Line2D

    lines = {line.get_label(): line for line in ax.get_lines()}
    handles = [lines[str(i)] for i in range(len(labels)) if str(i) in lines]
    names = [plain(label) for label in labels][: len(handles)]
    if extra:
        handles.append(Line2D([], [], color=QUIET, lw=1.2, ls=dash))
        names.append(extra)
    columns = max(1, min(len(names), int(100 / (8 + max(map(len, names), default=1)))))
    rows = -(-len(names) // columns)
    if rows > 2:  # many pairs: the figure grows below by what the legend needs beyond the space that there is
        more = 0.19 * (rows - 2)
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + more)
        for panel in figure.axes:
            x, y, w, h = panel.get_position().bounds
            panel.set_position((x, (y * height + more) / (height + more), w, h * height / (height + more)))
        for text in figure.texts:
            text.set_y(1 - 0.28 / (height + more))
    figure.legend(handles, names, loc="lower left", ncols=columns, fontsize=8.5, borderaxespad=0.4)


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """A legend in the middle below fixed panels."""
    place = (0.5, 0.02 / figure.get_size_inches()[1])
    figure.legend(handles, names, loc="lower center", ncols=columns, fontsize=7.5, bbox_to_anchor=place)


def plain(text: str, limit: int = 60) -> str:
    """A label that a figure can show: printable, on one line, not too long, never a hidden legend entry."""
    text = "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in text)
    text = text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 + 1 :]}"
    return f" {text}" if text.startswith("_") else text


def ending(name: str, length: int) -> str:
    """The end of a name, which tells it from others; what is left out is marked."""
    return name if len(name) <= length else "…" + name[1 - length :]


def counted(n: int) -> str:
    """A number with spaces between thousands."""
    return f"{n:,}".replace(",", " ")
