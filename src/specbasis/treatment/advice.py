"""What can be done with a finetune that was compared: commands, from the rows alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.checkpoint.adapter_file import CONFIG
from specbasis.comparison.comparison import Comparison
from specbasis.core.dtypes import FORMATS
from specbasis.core.text import number_of, shareable

RANK = 16
"""The rank that a sentence speaks of: the usual one of a LoRA."""

NUMBER = FORMATS["float32"].bytes


class Step(NamedTuple):
    """What could be done, and the command that does it."""

    reason: str
    command: str


def next_steps(comparison: Comparison, label: str, given: Iterable[str] = ()) -> list[Step]:
    """What can be done with a finetune of its base; nothing with other pairs, and no LoRA of an adapter.

    Args:
        comparison: what was found.
        label: of the pair.
        given: sources as the user wrote them: the results hold no path that could not be shared.
    """
    if comparison.verdicts[label].kind != "finetuned":
        return []
    about = (comparison.manifest["base"], comparison.manifest["pairs"][label]["tuned"])
    written = {shareable(source): source for source in given}
    sources = [written.get(source["source"], source["source"]) for source in about]
    models = shlex.join(w if "…" in s else s for s, w in zip(sources, ("BASE", "TUNED"), strict=True))
    steps = []
    size = low_rank_size(comparison.rows, label)
    is_adapter = any(Path(file["path"]).name == CONFIG for file in about[1].get("files", []))
    if size is not None and not is_adapter:
        share, stored = size
        of = f"the {number_of(len(comparison.facts[label].matrices), 'compared matrix')}"
        reason = (
            f"a LoRA of rank {RANK} of {of} ({stored / 1e6:.3g} MB) would hold {share:.0%} of their squared update"
        )
        steps.append(Step(reason, f"specbasis extract {models} --rank {RANK} --out lora"))
    if any(finding.kind == "intruders" for finding in comparison.findings[label]):
        reason = "leading directions that the base does not have can be damped"
        steps.append(Step(reason, f"specbasis repair {models} --keep TASK --recover TEXTS --out repaired"))
    reason = "to see whether it forgot what the base could do, by held-back texts or a task"
    return [*steps, Step(reason, f"specbasis forgetting {models} --held-back TEXTS")]


def low_rank_size(rows: pa.Table, label: str, rank: int = RANK) -> tuple[float, int] | None:
    """The share of Σ ‖delta‖² that one rank for every matrix holds, and its bytes.

    None without their values, and where the factors would take as many bytes as the matrices.
    """
    of_pair = pc.equal(rows["pair"].cast(pa.string()), label)
    own, norms = (
        rows.filter(pc.and_(of_pair, pc.equal(rows["measure"].cast(pa.string()), name)))
        for name in ("singular_value_delta", "norm_delta")
    )
    if not own.num_rows:
        return None
    squares = np.square(own["value"].to_numpy())
    leading = own["index"].to_numpy() < rank
    first = own.filter(pc.equal(own["index"], 0))
    sizes = [first[name].to_numpy().astype(np.int64) for name in ("out_features", "in_features")]
    ranks = np.minimum(rank, np.minimum(*sizes))
    total = float(np.square(norms["value"].to_numpy()).sum())
    stored = int((ranks * sum(sizes)).sum())
    if not total or stored >= int((sizes[0] * sizes[1]).sum()):
        return None
    return float(squares[leading].sum()) / total, stored * NUMBER
