"""What nulls cost: processor time of a comparison with them over that without, one thread, in turns.

    python benchmarks/bench_nulls.py                 real small matrices (ANARCII) and matrices shaped like BERT's
    python benchmarks/bench_nulls.py --turns 15      more turns, on a busy machine

The bar is 1.3. Each turn runs the two one after the other, in changing order; the least of all turns is what a
quiet machine takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from speed import write_pair

import specbasis

ANARCII = "pkg:anarcii/models"
BAR = 1.3


def seconds(base: str, tuned: str, *, nulls: bool) -> float:
    """Processor time of a whole comparison, rows and manifest written."""
    started = time.process_time()
    specbasis.compare(base, tuned, nulls=nulls, common_rows=True, workers=1, engine="threads")
    return time.process_time() - started


def main() -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shaped = write_pair(Path(folder), 1, 768)
        cases = {
            "ANARCII antibody_4_2 -> tcr_4_2, 128 × 512, all ranks": (
                f"{ANARCII}/antibody/antibody_4_2_128_512.pt",
                f"{ANARCII}/tcr/tcr_4_2_128_512.pt",
            ),
            "one block of BERT-base, 768 × 3072, 200 ranks": (str(shaped[0]), str(shaped[1])),
        }
        print(f"{'':56}{'without':>9}{'with':>9}  ratio of the least; median of turns (bar {BAR})")
        for name, pair in cases.items():
            seconds(*pair, nulls=True)
            turns = []
            for turn in range(arguments.turns):
                order = (False, True) if turn % 2 == 0 else (True, False)
                turns.append({nulls: seconds(*pair, nulls=nulls) for nulls in order})
            least = {nulls: min(t[nulls] for t in turns) for nulls in (False, True)}
            middle = statistics.median(t[True] / t[False] for t in turns)
            ratio = least[True] / least[False]
            print(f"{name:56}{least[False]:8.2f}s{least[True]:8.2f}s  {ratio:.2f}; {middle:.2f}", flush=True)


if __name__ == "__main__":
    main()
