"""`fingerprint`, `which-base` and `db`: where a model comes from, without the models it may come from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from specbasis.cli.common import document, line
from specbasis.cli.flags import JSON, MODEL
from specbasis.core.text import number_of

db_app = typer.Typer(help="Databases of fingerprints, one file each.", no_args_is_help=True)

FILE = Annotated[Path, typer.Argument(metavar="FILE", help="a database of fingerprints")]
MODELS = Annotated[list[str], typer.Argument(metavar="MODEL...", help="checkpoints, or files of fingerprints")]
DATABASE = Annotated[Path, typer.Option("--db", help="the database", envvar="SPECBASIS_DB")]
OUT = Annotated[Path, typer.Option("--out", help="the file to write")]
NAME = Annotated[str, typer.Option("--name", help="what to call it, such as org/name")]
LEVEL = Annotated[float, typer.Option("--level", help="family-wise error rate over the whole database")]


def fingerprint(model: MODEL, out: OUT, name: NAME = "") -> None:
    """Write the fingerprint of a model (at most 1.5 MB): a database of one model; from the Hub by byte range."""
    from specbasis.lineage.database import write
    from specbasis.lineage.fingerprint import fingerprint as run

    record = run(model)
    write(out, [record.named(name, base=False)])
    line(f"{out}: {number_of(len(record.layout.labels), 'matrix')} of {record.name}, {out.stat().st_size:,} bytes")


def which_base(
    model: MODEL,
    db: DATABASE = Path("fingerprints.parquet"),
    card: Annotated[bool, typer.Option("--card", help="compare with base_model in its README.md")] = False,
    level: LEVEL = 0.01,
    json: JSON = False,
) -> None:
    """Say which model of a database a model comes from; with --card exit code 1 if its card says otherwise."""
    from specbasis.lineage.which_base import contradiction, fingerprint_of, which_base as find

    query = fingerprint_of(model)
    answer = find(query, db, level=level)
    wrong, about_card = contradiction(answer, query.header["card"]) if card else (False, "")
    if json:
        document(
            {
                **asdict(answer),
                "card": {"base_model": query.header["card"], "contradicted": wrong} if card else None,
            }
        )
    else:
        line(answer.sentence)
        for row in answer.ranking[:5]:
            line(f"  {row['record']}: p {row['p']:.1g}, cosine {row['cosine']:.3f}, {row['way']}: {row['forms']}")
        if about_card:
            line(about_card)
    if wrong:
        raise typer.Exit(1)


@db_app.command()
def add(
    file: FILE,
    models: MODELS,
    base: Annotated[bool, typer.Option("--is-base", help="they were trained from no other model")] = False,
    name: NAME = "",
) -> None:
    """Add models, or fingerprints of them."""
    from itertools import chain

    from specbasis.core.errors import InputError
    from specbasis.lineage.database import is_database, read, write
    from specbasis.lineage.fingerprint import fingerprint as run

    if name and len(models) > 1:
        raise InputError(f"got --name {name} for {len(models)} models; want one model with it")
    old = read(file) if file.exists() else ()
    new = chain.from_iterable(read(Path(m)) if is_database(m) else [run(m).named(name, base)] for m in models)
    line(f"{file}: {number_of(write(file, chain(old, new)), 'model')}")


@db_app.command("list")
def list_(file: FILE, json: JSON = False) -> None:
    """List the models of a database."""
    from specbasis.lineage.database import read

    keys = ("name", "source", "revision", "base", "weights", "config", "tokenizer")
    rows = [{key: r.header[key] for key in keys} | {"matrices": len(r.values)} for r in read(file)]
    if json:
        document(rows)
        return
    for row in rows:
        line(f"{row['name']}  {'base, ' * row['base']}{row['matrices']} matrices, sha256 {row['weights'][:16]}")


@db_app.command()
def export(
    file: FILE, names: Annotated[list[str], typer.Argument(metavar="NAME...", help="models of it")], out: OUT
) -> None:
    """Write some models of a database to a file of their own."""
    from specbasis.lineage.database import chosen, write

    line(f"{out}: {number_of(write(out, chosen(file, names)), 'model')}")


@db_app.command()
def merge(files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="databases")], out: OUT) -> None:
    """Write the models of several databases to one; each is proven by its seal."""
    from itertools import chain

    from specbasis.lineage.database import read, write

    line(f"{out}: {number_of(write(out, chain.from_iterable(map(read, files))), 'model')}")
