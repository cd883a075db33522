"""Where weights come from: which files they are, and what is in them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from loky import cpu_count

from specbasis.checkpoint import Checkpoint, joined_sha256, sha256
from specbasis.checkpoint.entry import file_state
from specbasis.core.text import shareable

_SETTLED = 2 * 10**9
"""Nanoseconds that a file must have been left alone before its hash is used again.

One that is written twice within a tick of the file system's clock keeps its times.
"""


def provenances(checkpoints: Iterable[Checkpoint], earlier: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Source and SHA-256 of checkpoints and of their files; a file that is known and unchanged is not read again.

    Args:
        checkpoints: where the weights are.
        earlier: what this function gave for other runs, as a manifest keeps it.
    """
    known = {file["path"]: file for source in earlier for file in source.get("files", [])}
    with ThreadPoolExecutor(cpu_count()) as pool:  # hashing leaves the interpreter to the others
        return list(pool.map(partial(_provenance, known=known), checkpoints))


def _provenance(checkpoint: Checkpoint, known: Mapping[str, Any]) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for path in checkpoint.files:
        place = shareable(str(path))
        state, earlier = file_state(path), known.get(place, {})
        is_settled = time.time_ns() - state["changed_ns"] > _SETTLED
        is_known = earlier.get("is_settled") and all(earlier.get(key) == state[key] for key in state)
        digest = earlier["sha256"] if is_known else sha256(path)
        files.append({"path": place, **state, "is_settled": is_settled, "sha256": digest})
    whole = joined_sha256(checkpoint, [file["sha256"] for file in files])
    notes = [shareable(note) for note in checkpoint.notes]
    remote = {"revision": checkpoint.revision, "digests": dict(checkpoint.digests), "notes": notes}
    local = {"source": shareable(checkpoint.source), "sha256": whole, "files": files}
    return local | {k: v for k, v in remote.items() if v}
