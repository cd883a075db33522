"""`compare --quick` beside the dense route, on a pair shaped like a 7B model: ratios of one run, memory, truth.

    python benchmarks/quick.py                    one block of 32: 7 matrices, 0.4 GB each side
    python benchmarks/quick.py --blocks 8         more of them
    python benchmarks/quick.py --pair BASE TUNED  a pair of your own

Contenders, in turns, each in a process of its own with two workers: `--quick`; `--ranks 16`; the default. The peak
is the anonymous memory of the process tree. Then each rank that `--quick` resolved is compared with the dense
route's: how many there are, and the worst difference beside its bound.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import speed

WIDTH, INNER = 4096, 11008
CONTENDERS: dict[str, dict[str, Any]] = {"quick": {"quick": True}, "ranks": {"ranks": 16}, "default": {}}


def contend(which: str, base: str, tuned: str, out: str, workers: int) -> dict[str, object]:
    """One comparison, without the page."""
    import specbasis as package

    started = time.perf_counter()
    package.compare(base, tuned, out, workers=workers, **CONTENDERS[which])
    return {"seconds": time.perf_counter() - started}


def write_pair(folder: Path, blocks: int) -> tuple[Path, Path]:
    """Blocks of a decoder of 7e9 parameters in bfloat16, a shard each.

    Leading values fall as 1/√rank, from six times the edge of a random bulk into it; the update has sixteen
    directions and noise of a fifth of their size.
    """
    import torch
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    paths, index = (folder / "base", folder / "tuned"), {}
    for path in paths:
        path.mkdir()
    for block in range(blocks):
        states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for part, (out, width) in shapes.items():
            name = f"model.layers.{block}.{part}.weight"
            U, V = torch.randn(out, 64, generator=g), torch.randn(64, width, generator=g)
            spikes = (U / torch.arange(1, 65).sqrt()) @ V / (out * width) ** 0.25
            base = (0.02 * (torch.randn(out, width, generator=g) + 12 * spikes)).bfloat16()
            A, B = torch.randn(out, 16, generator=g), torch.randn(16, width, generator=g)
            delta = A @ B / 4 + 0.2 * torch.randn(out, width, generator=g)
            states[0][name], states[1][name] = base, (base.float() + 0.001 * delta).bfloat16()
        file = f"model-{block + 1:05}-of-{blocks:05}.safetensors"
        for path, state in zip(paths, states, strict=True):
            save_file(state, path / file)
        index |= dict.fromkeys(states[0], file)
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def processor_time() -> float:
    """Of all processes below this one that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def truth(quick: Path, exact: Path) -> str:
    """How many leading ranks of a matrix --quick resolved, and how far these are from the dense route's."""
    import specbasis as package

    keys = ["pair", "matrix", "measure", "index"]
    ours, theirs = (
        frame[frame["measure"].isin(("alignment_left", "alignment_right"))]
        for frame in (package.load(path).to_pandas() for path in (quick, exact))
    )
    both = ours.merge(theirs, on=keys, suffixes=("", "_exact"))
    known = both[(both["resolved"] == True) & (both["bound_exact"] < 1e-6)]  # noqa: E712
    off = (known["value"] - known["value_exact"]).abs()
    count = ours.groupby(["matrix", "measure"], observed=True)["resolved"].sum()
    return (
        f"resolved of {int(ours['index'].max()) + 1}: median {statistics.median(count)}, least {count.min()}; "
        f"worst difference of a resolved rank {off.max():.1e}, worst share of its bound "
        f"{(off / (known['bound'] + known['bound_exact'] + 1e-12)).max():.2f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--pair", nargs=2, metavar=("BASE", "TUNED"))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        which, base, tuned, out, workers = arguments.contender
        print(json.dumps(contend(which, base, tuned, out, int(workers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        within = Path(folder)
        base, tuned = map(Path, arguments.pair) if arguments.pair else write_pair(within, arguments.blocks)
        found = {}
        for which in arguments.only:
            cpu = processor_time()
            found[which] = speed.run(
                which, sys.executable, base, tuned, within / which, arguments.workers, script=Path(__file__)
            )
            line = "{seconds:8.1f} s {cpu:8.1f} CPU s, peak {gigabytes:.2f} GB".format(
                **found[which], cpu=processor_time() - cpu, gigabytes=found[which]["peak"] / 1e9
            )
            if which != "quick" and "quick" in found:
                line += f"; --quick takes 1/{found[which]['seconds'] / found['quick']['seconds']:.1f} of it"
            print(f"{which:8} {line}", flush=True)
        if {"quick", "ranks"} <= set(found):
            print(truth(within / "quick", within / "ranks"))


if __name__ == "__main__":
    main()
