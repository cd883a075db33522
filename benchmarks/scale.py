"""How time and memory grow: with the number of matrices, their size, workers, and the shards of a large checkpoint.

    python benchmarks/scale.py                 time and peak against matrices, width and workers
    python benchmarks/scale.py --gigabytes 3   peak on a sharded bfloat16 pair of that size, for 1, 4, 16 shards

Every run is a process of its own; the peak is that of the anonymous memory of its whole tree, beyond what the
process took before it began. What the planner predicted stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import speed


def compared(base: str, tuned: str, out: str, workers: int) -> dict[str, object]:
    """All measures at the defaults; what the planner said first."""
    import specbasis as package
    from specbasis.comparison.compare import plan

    predicted = plan(base, tuned, workers=workers).bytes
    idle = speed.anonymous(os.getpid())
    started, cpu = time.perf_counter(), time.process_time()
    package.compare(base, tuned, out, workers=workers)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "idle": idle, "predicted": predicted}


def bare(base: str, tuned: str, out: str, workers: int) -> dict[str, object]:
    """Alignment and spectra of all ranks: the work of the bars."""
    return speed.specbasis(base, tuned, out, workers)


WORK = {"compared": compared, "bare": bare}


def write_large(folder: Path, gigabytes: float, shards: int) -> tuple[Path, Path]:
    """A pair shaped like a decoder of 1.5e9 parameters (width 1536, inner 8960), in bfloat16, in shards."""
    import torch
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (1536, 1536), "self_attn.o_proj": (1536, 1536)}
    shapes |= {"mlp.gate_proj": (8960, 1536), "mlp.up_proj": (8960, 1536), "mlp.down_proj": (1536, 8960)}
    each = 2 * sum(rows * columns for rows, columns in shapes.values())
    names = [(f"model.layers.{b}.{part}.weight", shape) for b in range(max(1, round(gigabytes * 1e9 / each)))
             for part, shape in shapes.items()]  # fmt: skip
    paths = folder / "base", folder / "tuned"
    for path in paths:
        path.mkdir()
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        base = {name: torch.randn(shape, generator=g).mul_(0.03).bfloat16() for name, shape in part}
        tuned = {name: W + (0.002 * torch.randn(W.shape, generator=g)).bfloat16() for name, W in base.items()}
        for path, state in zip(paths, (base, tuned), strict=True):
            save_file(state, path / file)
        index |= dict.fromkeys(base, file)
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def run(work: str, base: Path, tuned: Path, workers: int) -> dict[str, float]:
    """One comparison in its own process."""
    with tempfile.TemporaryDirectory() as out:
        return speed.run(work, sys.executable, base, tuned, Path(out) / "rows", workers, script=Path(__file__))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help="size of each checkpoint of a sharded pair")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        work, base, tuned, out, workers = arguments.contender
        print(json.dumps(WORK[work](base, tuned, out, int(workers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.gigabytes:
            for shards in (1, 4, 16):
                within = Path(folder) / str(shards)
                within.mkdir()
                base, tuned = write_large(within, arguments.gigabytes, shards)
                found = run("compared", base, tuned, os.cpu_count() or 1)
                print(
                    f"{arguments.gigabytes} GB, {shards} shards: peak {found['peak'] / 1e9:.2f} GB, of it "
                    f"{found['idle'] / 1e9:.2f} idle, predicted beside that {found['predicted'] / 1e9:.2f}; "
                    f"{found['seconds']:.0f} s"
                )
                for path in within.rglob("*.safetensors"):
                    path.unlink()
            return
        grown = [(b, w) for b, w in ((2, 384), (4, 384), (8, 384), (2, 768), (2, 1024))]
        print(f"{'blocks':>7}{'width':>7}{'workers':>9}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}{'predicted':>11}")
        for blocks, width in grown:
            within = Path(folder) / f"{blocks}-{width}"
            within.mkdir()
            pair = speed.write_pair(within, blocks, width)
            for workers in (1, 2):
                found = run("compared", *pair, workers)
                print(
                    f"{blocks:7}{width:7}{workers:9}{found['seconds']:9.2f}{found['cpu']:9.2f}"
                    f"{(found['peak'] - found['idle']) / 1e6:9.0f}{found['predicted'] / 1e6:11.0f}"
                )
        within = Path(folder) / "bert-base"
        within.mkdir()
        pair = speed.write_pair(within, *speed.SIZES["bert-base"])
        one, two = (min(run("bare", *pair, workers)["seconds"] for _ in range(2)) for workers in (1, 2))
        print(
            f"two workers on the pair shaped like BERT-base: {one / two:.2f} times one ({one:.1f} s, {two:.1f} s)"
        )


if __name__ == "__main__":
    main()
