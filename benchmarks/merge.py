"""Spectral merging beside FusionBench 0.2.33, on random updates of several shapes.

FusionBench is not installed: its wheel is downloaded into a temporary folder, and only the functions that merge one
matrix are read from it and run. Run: python benchmarks/merge.py [--wheel FILE]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import subprocess
import sys
import tempfile
import typing
import zipfile
from pathlib import Path
from typing import Any

import torch

from specbasis.treatment.methods import Delta, merged
from specbasis.treatment.options import MergeOptions

FILES = ("task_singular_vector/utils/TSVM_utils.py", "isotropic_merging/iso_utils.py",
         "singular_value_calibration/utils.py")  # fmt: skip
SHAPES = ((12, 12), (48, 12), (12, 48), (64, 100), (384, 384), (384, 1536))


def functions(wheel: Path) -> dict[str, Any]:
    """The functions of the three files, which need torch and nothing of the rest of the package."""
    known: dict[str, Any] = {name: getattr(typing, name) for name in ("Dict", "List", "Optional", "Tuple")}
    known |= {"torch": torch, "Tensor": torch.Tensor, "StateDictType": dict, "print": lambda *_: None}
    known["timeit_context"] = lambda _: contextlib.nullcontext()
    with zipfile.ZipFile(wheel) as archive:
        for file in FILES:
            tree = ast.parse(archive.read(f"fusion_bench/method/{file}"))
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
            exec(compile(tree, file, "exec"), known)
    return known


def difference(theirs: dict[str, Any], shape: tuple[int, int], n: int, dtype: torch.dtype) -> dict[str, float]:
    """Method → largest difference of an entry by the largest entry."""
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]
    deltas, vectors = [Delta(x.double()) for x in tensors], [{"W": x} for x in tensors]
    summed = merged(deltas, MergeOptions(method="task-arithmetic"), generator)
    calibrate = theirs["subspace_consistency_spectral_calibration_accelerated"]
    tsv_m = theirs["compute_and_sum_svd_mem_reduction"]
    pairs = {
        "tsv-m": (MergeOptions(method="tsv-m"), tsv_m(vectors, accelerator="cpu")["W"]),
        "iso-c": (MergeOptions(method="iso-c"), theirs["iso_c"](vectors, "cpu")["W"]),
        "iso-cts": (MergeOptions(method="iso-cts"), theirs["iso_cts"](vectors, 0.8, "cpu")["W"]),
        "calibrate": (
            MergeOptions(method="task-arithmetic", calibrate=1.0),
            calibrate(torch.zeros(shape, dtype=dtype), tensors, summed.to(dtype), 1.0, "cpu"),
        ),
    }
    return {
        name: float((merged(deltas, options, generator) - wanted).abs().max() / wanted.abs().max())
        for name, (options, wanted) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path)
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            asked = ["download", "fusion_bench==0.2.33", "--no-deps", "--quiet", "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", *asked], check=True)
            wheel = next(Path(folder).glob("*.whl"))
        theirs = functions(wheel)
    for dtype in (torch.float64, torch.float32):
        worst: dict[str, float] = {}
        for shape in SHAPES:
            for n in (2, 3, 5):
                for name, value in difference(theirs, shape, n, dtype).items():
                    worst[name] = max(worst.get(name, 0.0), value)
        print(f"theirs in {dtype}:", ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))


if __name__ == "__main__":
    main()
