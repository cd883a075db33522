"""`app`: a comparison in the browser, of a results folder or of two models; on one's own machine or in a Space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

import specbasis
from specbasis.cli.common import line
from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.core.grammar import human_bytes

if TYPE_CHECKING:
    from specbasis.comparison.comparison import Comparison
    from specbasis.jobs.progress import Report

FRAME = 'sandbox="allow-scripts" title="the page" style="width:100%;height:90vh;border:0;background:Canvas"'


@dataclass(frozen=True)
class Reach:
    """What visitors may read: what lies in a folder (None: the Hub's models alone); and seconds of a comparison."""

    root: Path | None = None
    seconds: float = 600.0

    def path(self, text: str) -> Path:
        """What a text names in the root, links followed; an InputError where that is elsewhere or nowhere."""
        with suppress(OSError, ValueError, RuntimeError):  # no such path, or none that a system could have
            if self.root is not None and text.strip():
                path = (self.root / text.strip()).resolve(strict=True)
                if path.is_relative_to(self.root.resolve()):
                    return path
        raise InputError(f"{text!r}: nothing of this name here; a model of the Hub is written hub:org/name")

    def model(self, text: str, *, base: bool = False) -> str:
        """What `compare` calls a model; one of the Hub by its commit, so that what was checked is what is read.

        An adapter is refused as the base, since its file could name any model on this machine as its own.
        """
        from specbasis.checkpoint.adapter_file import is_adapter
        from specbasis.checkpoint.delta import is_delta
        from specbasis.checkpoint.hub import parse_address
        from specbasis.checkpoint.places import locate

        text = f"hub:{text}" if self.root is None and ":" not in text else text.strip()
        named = parse_address(text) if text.startswith(("hub:", "timm:")) else None
        place, _ = locate(text if named else self.path(text), stream=True)
        if base and (is_adapter(place) or is_delta(place)):
            raise InputError(f"{text}: is an adapter; want a whole model as the base")
        if named is None:
            return str(self.path(text))
        label = "" if base else f"{named.repository.rpartition('/')[2]}="
        return label + "/".join(filter(None, (f"hub:{named.repository}@{place.revision}", named.subfolder)))

    def compare(self, base: str, tuned: str, size: str, bar: Any) -> Comparison:
        """Compare two models, unless the plan says that this takes too long or too much memory; bar is gradio's."""
        from specbasis.comparison.compare import plan
        from specbasis.comparison.options import Options

        base, tuned = self.model(base, base=True), self.model(tuned)
        options = Options(quick=size == "quick", stream=True)
        cost = plan(base, tuned, options=options)
        if cost.seconds > self.seconds or cost.bytes > cost.memory:
            takes = f"would take about {cost.seconds:.3g} s and {human_bytes(cost.bytes)}"
            most = f"at most {self.seconds:g} s and {human_bytes(cost.memory)}"
            raise InputError(f"these models {takes}; want {most}: choose quick or smaller models")
        tell: Report = lambda now: bar(now.done / max(now.total, 1), desc=now.name)  # noqa: E731
        return specbasis.compare(base, tuned, options=options, progress=tell)


def interface(reach: Reach, base: str = "", tuned: str = "", folder: str = "") -> Any:
    """The app as gradio's Blocks: a form for two models, one for a results folder, and below what was found."""
    gr = require("gradio", purpose="the app needs")
    from specbasis.figures import write_report
    from specbasis.figures.summary import summary_html

    def shown(make: Callable[[], Comparison]) -> Iterator[Any]:
        """Headline and table, the page in a frame that reaches nothing around it, and its file to download."""
        try:
            with TemporaryDirectory(prefix="specbasis-") as folder:
                comparison = make()
                page = write_report(comparison, Path(folder) / "report.html", figures=False)
                heads = "".join(f"<h3>{escape(comparison.headlines[label])}</h3>" for label in comparison.pairs)
                frame = f'<iframe {FRAME} srcdoc="{escape(page.read_text(encoding="utf-8"))}"></iframe>'
                yield heads + summary_html(comparison) + frame, gr.DownloadButton(value=str(page), visible=True)
        except Exception as error:  # a visitor reads one line, whatever it was
            known = isinstance(error, InputError)
            message = str(error) if known else f"{type(error).__name__}; the log of the app has the details"
            raise gr.Error(escape(message, quote=False), print_exception=not known) from error

    def compare(base: str, tuned: str, size: str, bar: Any = gr.Progress()) -> Iterator[Any]:  # noqa: B008
        yield from shown(lambda: reach.compare(base, tuned, size, bar))

    def show(folder: str) -> Iterator[Any]:
        yield from shown(lambda: specbasis.load(reach.path(folder)))

    where = "hub:org/name" + ("" if reach.root is None else " or a path")
    with gr.Blocks(title="specbasis", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# specbasis\nWhat did finetuning change in the singular vectors of a model's weights?")
        with gr.Tab("Two models"):
            models = [gr.Textbox(base, label="Base", placeholder=where)]
            models.append(gr.Textbox(tuned, label="Tuned", placeholder=where))
            models.append(gr.Radio(["quick", "full"], value="quick", label="Leading ranks, or the whole spectrum"))
            begin = gr.Button("Compare", variant="primary")
        with gr.Tab("A results folder", visible=reach.root is not None):
            text = gr.Textbox(folder, label="Folder", placeholder="a folder that compare wrote")
            reopen = gr.Button("Show", variant="primary")
        outputs = [gr.HTML(), gr.DownloadButton("Download the page", visible=False)]
        begin.click(compare, models, outputs, concurrency_limit=1)
        gr.on([reopen.click, *([blocks.load] if folder else [])], show, text, outputs)
    return blocks


def serve(blocks: Any, **where: Any) -> None:
    """Serve the app until it is interrupted: no share link, no uploads, and nothing fetched from another host."""
    theme = require("gradio", purpose="the app needs").themes.Default(font=["system-ui"], font_mono=["monospace"])
    quiet = {"theme": theme, "quiet": True, "footer_links": [], "ssr_mode": False, "prevent_thread_lock": True}
    try:
        _, url, _ = blocks.queue(max_size=16).launch(share=False, max_file_size=1, **quiet, **where)
    except OSError as error:
        raise InputError("the app cannot be served: the port is taken; give another one with --port") from error
    line(f"app: {url}")
    blocks.block_thread()


def app(
    base: Annotated[str, typer.Argument(metavar="DIR|BASE", help="a folder that compare wrote; or a model")] = "",
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="and a finetune of it")] = "",
    root: Annotated[
        Path, typer.Option(help="nothing outside of it is opened", exists=True, file_okay=False)
    ] = Path(),
    seconds: Annotated[float, typer.Option("--seconds", help="longest predicted time to begin")] = 600.0,
    port: Annotated[int | None, typer.Option("--port", help="default: the first free one from 7860 on")] = None,
) -> None:
    """Serve comparisons in the browser, to this machine alone: of a results folder, or of two models in a form.

    Models come from the Hub or from inside --root; nothing else on the disk can be opened. Ctrl-C ends it.
    """
    reach = Reach(root, seconds)
    if base and not tuned:
        specbasis.load(reach.path(base))
    blocks = interface(reach, base, tuned) if tuned else interface(reach, folder=base)
    serve(blocks, server_name="127.0.0.1", server_port=port)
