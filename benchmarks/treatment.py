"""Three GLUE finetunes of a base: made, made small, repaired, merged, and judged; all of it resumes.

    python benchmarks/treatment.py BASE --data-dir glue --out DIR

Finetunes: all of the model, one seed a task. Repair: the task kept, the base's loss on 640 premises of RTE
recovered. Merge: all of them, by every method, judged on every task. Extract: LoRAs of rank 1 to 64; at 1/4, 1/10
and 1/16 of the finetune's bytes a LoRA and a difference of few bits; cores in the base's basis, with all that is no
matrix of a block carried whole.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specbasis import extract, finetune, forgetting, merge, open_checkpoint, repair
from specbasis.checkpoint import weights_sha256
from specbasis.checkpoint.digest import sha256
from specbasis.figures.table import Table
from specbasis.finetuning import runs
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import subset
from specbasis.interventions.evaluators import judge
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, run_experiments
from specbasis.treatment.forgetting import pretraining
from specbasis.treatment.options import DEFAULTS

PROTOCOL: dict[str, dict[str, Any]] = {
    "sst2": {"examples": 8000, "epochs": 2, "batch_size": 32},
    "stsb": {"epochs": 4, "batch_size": 16},
    "cola": {"epochs": 2, "batch_size": 32},
}
"""How each finetune is made, beside a rate of 1e-4, bfloat16 autocast, and what `finetune` does by itself."""

RANKS = (1, 2, 4, 8, 16, 32, 64)
PARTS = (4, 10, 16)
FORMS = ("lora", "delta")
CORES = (150, 64)
LONGER = (0.7, 1.0)
"""Scales of the plain sum: the control of a method that merely takes a longer step than the mean."""


def finetuned(base: str, task: str, data_dir: str, out: Path) -> str:
    """The folder of one finetune, as transformers loads a model."""
    model = out / "finetunes" / task
    if not model.exists():
        protocol = dict(PROTOCOL[task])
        data = subset(load_task(task, data_dir=data_dir), examples=protocol.pop("examples", None))
        folder = out / "runs" / task
        finetune(base, data, "full", out=folder, learning_rate=1e-4, precision="bf16", **protocol)
        runs.merge(folder, model)
    return str(model)


def premises(data_dir: str, out: Path) -> str:
    """A file of 640 premises of RTE, which no finetune was trained on."""
    rte = load_task("rte", data_dir=data_dir)
    file = out / "premises.txt"
    file.write_text("\n\n".join(sorted({inputs[0] for inputs in rte.train.inputs})[:640]) + "\n")
    return str(file)


def experiments(tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Every point: of what the claims are about first."""
    tasks = list(tasks)
    points: list[dict[str, Any]] = [{"what": "forgetting", "task": task} for task in tasks]
    points += [{"what": "merge", "method": method} for method in DEFAULTS]
    points += [{"what": "merge", "method": "task-arithmetic", "scale": scale} for scale in LONGER]
    for part, task, form in itertools.product(reversed(PARTS), tasks, FORMS):
        points.append({"what": "extract", "task": task, "as": form, "part": part})
    points += [{"what": "extract", "task": t, "as": "spectral", "rank": rank} for rank in CORES for t in tasks]
    return points + [{"what": "extract", "task": t, "as": "lora", "rank": r} for t in tasks for r in RANKS]


def run(
    experiment: Mapping[str, Any], base: str, tuned: Mapping[str, str], data_dir: str, texts: str, cache: str
) -> dict[str, Any]:
    """The values of one point."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        if experiment["what"] == "merge":
            judges = {task: judge(f"glue:{task}", data_dir=data_dir) for task in tuned}
            how = {name: experiment[name] for name in ("method", "scale") if name in experiment}
            record = merge(base, dict(tuned), out, judge=judges, **how).record["scores"]
            return {"normalised": record["normalised"], "tasks": record["tasks"]}
        task = experiment["task"]
        if experiment["what"] == "forgetting":
            record = forgetting(base, tuned[task], texts).record
            return {name: record[name] for name in ("metric", "worse", "worse_low", "worse_high")} | record[
                "scores"
            ]
        size = Path(tuned[task], "model.safetensors").stat().st_size
        how = {"rank": experiment["rank"]} if "rank" in experiment else {"size": size // experiment["part"]}
        evaluator = judge(f"glue:{task}", data_dir=data_dir)
        kept = None if experiment["as"] == "spectral" else cache
        record = extract(base, tuned[task], out, judge=evaluator, form=experiment["as"], cache=kept, **how).record
        return {
            "metric": evaluator.metric,
            "share": record["total"]["share"],
            "bytes": record["total"]["bytes"],
            **record["scores"][evaluator.metric],
        }


def models(base: str, tuned: Mapping[str, str], texts: str) -> dict[str, Any]:
    """What the rows were measured on, by content."""
    whole = {"base": base, **tuned}
    digests = {name: weights_sha256(open_checkpoint(source)) for name, source in whole.items()}
    return {"experiment": "treatment", **digests, "texts": sha256(Path(texts))}


def tables(rows: Sequence[Row]) -> str:
    """What came out, as Markdown."""
    done = [row for row in rows if row.error is None]
    small = [
        {
            "task": row.experiment["task"],
            "as": row.experiment["as"],
            "rank or part": str(row.experiment.get("rank", f"1/{row.experiment.get('part')}")),
            "MB": row.values["bytes"] / 1e6,
            "kept of the squared update": row.values["share"],
            **{
                name: row.values[name]
                for name in ("base", "tuned", "treated", "change", "change_low", "change_high")
            },
        }
        for row in done
        if row.experiment["what"] == "extract"
    ]
    merged = [
        {
            "method": " ".join(str(row.experiment[name]) for name in ("method", "scale") if name in row.experiment),
            **{f"{task} {line['metric']}": line["values"]["merged"] for task, line in row.values["tasks"].items()},
            "normalised": row.values["normalised"]["merged"],
            "of the mean": row.values["normalised"]["mean"],
        }
        for row in done
        if row.experiment["what"] == "merge"
    ]
    forgotten = [
        {"task": row.experiment["task"], **{key: row.values[key] for key in ("worse", "worse_low", "worse_high")}}
        for row in done
        if row.experiment["what"] == "forgetting"
    ]
    return "\n\n".join(Table.of(records, ".3f").markdown() for records in (forgotten, small, merged) if records)


def main() -> None:
    """Run what has not run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--data-dir", required=True, help="GLUE in its official layout")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    base, data_dir, out = given.base, given.data_dir, given.out
    out.mkdir(parents=True, exist_ok=True)
    texts, cache = premises(data_dir, out), str(out / "cache")
    tuned = {task: finetuned(base, task, data_dir, out) for task in PROTOCOL}
    for task, source in tuned.items():
        keep, recover = judge(f"glue:{task}", data_dir=data_dir), pretraining(texts, base)
        done = repair(base, source, keep, recover, out / f"repair-{task}", cache=cache)
        print(f"repair {task}: {done.sentence}", flush=True)
    single = partial(run, base=base, tuned=tuned, data_dir=data_dir, texts=texts, cache=cache)
    rows = run_experiments(
        experiments(tuned),
        single,
        out / "points",
        config=models(base, tuned, texts),
        uses=WHERE_USED,
        progress=lambda now: print(f"{now.done} of {now.total}: {now.name}", flush=True),
    )
    print(tables(rows))
    for row in rows:
        if row.error is not None:
            print("failed:", *row.experiment.values(), row.error)


if __name__ == "__main__":
    main()
