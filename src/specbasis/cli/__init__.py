"""The command line: verbs and flags. No science here, and no large library before a verb needs it."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import specbasis
from specbasis.cli import web
from specbasis.cli.adapter import adapter_app
from specbasis.cli.card import card
from specbasis.cli.common import ASIDE, STDERR, STDOUT, discard, line, prepare_streams
from specbasis.cli.compare import compare, inspect, list_findings, list_measures, report, spectra
from specbasis.cli.doctor import doctor
from specbasis.cli.finetune import finetune, list_methods
from specbasis.cli.flags import flags
from specbasis.cli.intervene import edit, intervene, list_kinds
from specbasis.cli.population import lineage, population
from specbasis.cli.reproduce import pretrain, reproduce_app
from specbasis.cli.reproduce.zoo import zoo_app
from specbasis.cli.track import track
from specbasis.cli.treatment import extract, forgetting, merge, repair
from specbasis.cli.which_base import db_app, fingerprint, which_base
from specbasis.core.errors import InputError, is_out_of_memory
from specbasis.core.extras import missing

VERBS = (
    flags(compare, measures=list_measures, fail_on=list_findings),
    flags(report, fail_on=list_findings),
    card,
    inspect,
    spectra,
    flags(edit, kind=list_kinds),
    flags(intervene, kinds=list_kinds),
    flags(finetune, method=list_methods),
    flags(extract),
    flags(forgetting),
    flags(repair),
    flags(merge),
    population,
    lineage,
    fingerprint,
    which_base,
    flags(pretrain),
    flags(track),
    web.app,
    doctor,
)
GROUPS = {"zoo": zoo_app, "adapter": adapter_app, "reproduce": reproduce_app, "db": db_app}


class _Verbs(TyperGroup):
    """The verbs; `--quiet` stands behind one as well as in front of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        others = [word for word in args[:end] if word != "--quiet"]
        return super().parse_args(ctx, ["--quiet"] * (len(others) < end) + others + args[end:])


app = typer.Typer(
    help="What finetuning changes in the singular vectors and values of a model's weights.",
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)

_USAGE: type[Exception] = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it cannot read: an unknown flag or verb, a missing argument."""


ANNOUNCERS = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers of libraries that say, as they are imported, what they were built without."""

INTERNAL = 70
"""Exit code of an error that is a fault of specbasis (EX_SOFTWARE of sysexits.h), and no finding."""

CLOSED_PIPE = 141
"""Exit code where a closed pipe stopped the program: that of a program which SIGPIPE ends, as a shell has it."""


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress and no notes, for any verb")] = False,
) -> None:
    ASIDE.quiet = quiet
    if quiet:  # bars of other libraries, which read this as they are imported
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    if version:
        STDOUT.print(specbasis.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: whatever happens is an exit code, and one line on stderr at most; never a traceback.

    Exit codes: 0 done; 1 a finding that was asked for; 2 what a user can mend; 70 an error of specbasis itself; 130
    interrupted. A reader that goes away early, such as `head`, ends the printing and not the work.
    """
    prepare_streams()
    for name in ANNOUNCERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    code = _run()
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as error:
        discard(sys.stdout)  # else Python tries again as it ends, and that is its exit code
        code = code or _output_failed(error)
    if code == 130:  # what typer makes of Ctrl-C
        line("interrupted: what is in the output folder is kept, and the same command continues it", console=STDERR)
    sys.exit(code)


def _run() -> int:
    """Run the verb; its exit code."""
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # the verbs return their codes: this is typer, which prints itself
        if not isinstance(stop.__context__, OSError):  # shell completion
            return 2 if stop.code else 0
        discard(sys.stdout)
        return CLOSED_PIPE
    except (_USAGE, typer.Abort) as error:
        message = error.format_message() if hasattr(error, "format_message") else ""
        if message:  # none where no verb was given: help is printed
            line(f"error: {message}", console=STDERR, style="red")
        return int(getattr(error, "exit_code", 2))
    except Exception as error:
        message = _to_mend(error)
        if message is None:
            return _internal(error)
        line(f"error: {message}", console=STDERR, style="red")
        return 2


def _to_mend(error: Exception) -> object:
    """What to say of an error that a user can mend; None of one that is a fault of specbasis."""
    if isinstance(error, InputError):
        return error
    if is_out_of_memory(error):
        return (
            "not enough memory; what is done is kept: close other programs, or give --memory or fewer --workers, "
            "and run again"
        )
    if isinstance(error, UnicodeEncodeError):  # bytes of a name that are no UTF-8, on their way to a library
        return f"{error.object[:200]!r}: a name that is not UTF-8 cannot be used here; rename the file or folder"
    if isinstance(error, ImportError):
        broken = (error.name or "").partition(".")[0]
        broken_extra = f"{broken} cannot be imported ({error}); specbasis doctor says what is installed"
        return missing(error) or (broken_extra if broken not in ("", "specbasis") else None)
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: cannot be read or written ({error.strerror or error})"
    return None


def _internal(error: Exception) -> int:
    """Keep the traceback of an error that nobody foresaw in a file, and say where; the exit code of such errors."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="specbasis-", suffix=".log", delete=False, encoding="utf-8",
                                         errors="backslashreplace") as log:  # fmt: skip
            log.write(f"specbasis {specbasis.__version__}, {sys.version}\n{sys.argv}\n{text}")
        place = f"the details are in {log.name}; please report it with them"
    except OSError as refusal:
        place = f"no log could be written: {refusal.strerror}"
    reason = next(iter(str(error).splitlines()), "")[:200]
    line(f"internal error: {type(error).__name__}: {reason}; {place}", console=STDERR, style="red")
    return INTERNAL


def _output_failed(error: Exception) -> int:
    """Say that what was printed did not arrive; nothing where the reader is gone or there never was one."""
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return 0
    line(f"error: the output cannot be written ({error.strerror})", console=STDERR, style="red")
    return 2
