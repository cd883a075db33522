"""What a GPU gives, and that it gives the same: a BERT-sized pair, one large matrix, a 4096-wide block, a step.

    python benchmarks/gpu.py            some sections alone: python benchmarks/gpu.py rows matrix block step

Everything is made here, of random weights; nothing is downloaded. Times are ratios to the processor of the same
machine, in one run. Rows are compared with those of the processor: their difference must lie within the two bounds
together, wherever both are resolved. A section that fails says so, and the next one runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

import specbasis
from specbasis.core.krylov import approximate_svd
from specbasis.core.svd import decompose

GPU = "cuda"


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Best wall time of a piece of work, the GPU's queue emptied before and after."""
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def moved(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A finetune: each matrix moved by 2 % of its norm, half of it of rank 8."""
    g = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, W in weights.items():
        tuned[name] = W
        if W.ndim == 2:
            noise = torch.randn(W.shape, generator=g)
            low = torch.randn(W.shape[0], 8, generator=g) @ torch.randn(8, W.shape[1], generator=g)
            step = noise / noise.norm() + low / low.norm()
            tuned[name] = (W.float() + 0.014 * W.float().norm() * step).to(W.dtype)
    return tuned


def rows(folder: Path, blocks: int) -> None:
    """All measures of a BERT-base pair on both devices."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=blocks))
    base = {name: W for name, W in model.state_dict().items() if W.is_floating_point() and "embeddings" not in name}
    save_file(base, folder / "base.safetensors")
    save_file(moved(base, 1), folder / "tuned.safetensors")
    paths = str(folder / "base.safetensors"), str(folder / "tuned.safetensors")
    tables, times = {}, {}
    for device in ("cpu", GPU):
        if device == GPU:  # libraries load and kernels are chosen at the first matrix
            decompose(torch.randn(768, 768, device=GPU))
        times[device] = seconds(
            lambda device=device: tables.update(
                {device: specbasis.compare(*paths, nulls=True, device=device).to_pandas()}
            )
        )
    keys = ["pair", "matrix", "measure", "index"]
    both = tables["cpu"].merge(tables[GPU], on=keys, suffixes=("", "_gpu"))
    # Rows without a bound follow from others; their figures are compared to rounding.
    allowed = both.bound.fillna(0) + both.bound_gpu.fillna(0) + 1e-9 * both.value.abs()
    known, known_gpu = both.resolved.eq(True), both.resolved_gpu.eq(True)
    outside = both[known & known_gpu & ((both.value - both.value_gpu).abs() > allowed)]
    print(f"  {len(tables['cpu'])} rows on the processor, {len(tables[GPU])} on the GPU, {len(both)} in common")
    print(
        f"  resolved on both {int((known & known_gpu).sum())}, on one alone {int((known ^ known_gpu).sum())}; "
        f"beyond both bounds {len(outside)}"
    )
    for name, group in outside.groupby("measure"):
        print(f"    {name}: {len(group)}, largest {float((group.value - group.value_gpu).abs().max()):.2e}")
    print(f"  processor {times['cpu']:.1f} s, GPU {times[GPU]:.1f} s: {times[GPU] / times['cpu']:.3f} of the time")


def matrix(folder: Path, blocks: int) -> None:
    """One 4096 × 11008 matrix in bfloat16."""
    W = (0.02 * torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    on_gpu = W.to(GPU)
    decompose(on_gpu[:512, :512])
    cpu, gpu = {}, {}
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "all ranks": lambda X: decompose(X),
        "leading 16, dense": lambda X: decompose(X, 16),
        "leading 16, iteration": lambda X: approximate_svd(X, 16, device=X.device),
    }
    for name, way in ways.items():
        cpu[name] = seconds(lambda way=way: way(W))
        gpu[name] = seconds(lambda way=way: way(on_gpu), repeats=2)
        print(f"  {name:24} processor {cpu[name]:7.2f} s   GPU {gpu[name]:7.2f} s   {gpu[name] / cpu[name]:.3f}")
    a, b = decompose(W, 16), decompose(on_gpu, 16)
    off = (a.spectrum - b.spectrum.cpu()).abs()
    print(
        f"  values beyond both bounds: {int((off > a.spectrum_error + b.spectrum_error.cpu()).sum())} of {len(off)}"
    )
    X = on_gpu.double()
    G = X @ X.mT
    print(f"  of it: Gram {seconds(lambda: X @ X.mT, 2):.2f} s, eigh {seconds(lambda: torch.linalg.eigh(G)):.2f} s")


def block(folder: Path, blocks: int) -> None:
    """One block of 32 of a 4096-wide pair: bfloat16 shards, read, compared with the default measures."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        **{f"self_attn.{part}_proj": (4096, 4096) for part in "qkvo"},
        **{f"mlp.{part}_proj": (11008, 4096) for part in ("gate", "up")},
        "mlp.down_proj": (4096, 11008),
    }
    base = {
        f"model.layers.0.{name}.weight": (0.02 * torch.randn(shape, generator=g)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(base, folder / "wide.safetensors")
    save_file(moved(base, 2), folder / "wide-tuned.safetensors")
    paths = str(folder / "wide.safetensors"), str(folder / "wide-tuned.safetensors")
    for keywords in ({"ranks": 16}, {}):
        took = seconds(lambda keywords=keywords: specbasis.compare(*paths, device=GPU, **keywords))
        print(
            f"  {keywords or 'all ranks'}: {took:.1f} s a block; 32 blocks, extrapolated: {32 * took / 60:.0f} min"
        )


def step(folder: Path, blocks: int) -> None:
    """A training step of a BERT-base with the spectral adapter, with LoRA, and full; 16 × 128 tokens."""
    from peft import LoraConfig, get_peft_model

    from specbasis.adapter import SpectralConfig

    def model() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig())

    targets = r".*layer\.(10|11)\.(intermediate|output)\.dense"
    kinds = {
        "spectral, K = 300": SpectralConfig(rank=300, target_modules=targets, task_type="SEQ_CLS"),
        "LoRA, r = 8": LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS"),
    }
    ids = torch.randint(0, 30000, (16, 128), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(16, dtype=torch.int64)
    for device in (GPU, "cpu"):
        batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
        for name, config in kinds.items():
            adapted = get_peft_model(model(), config).to(device).train()
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
            one = functools.partial(train_step, adapted, optimizer, batch)
            one()
            torch.cuda.reset_peak_memory_stats()
            took = seconds(one, 20 if device == GPU else 3)
            memory = f", peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if device == GPU else ""
            print(f"  {device:5} {name:20} {1000 * took:8.2f} ms a step{memory}")


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """One step of training."""
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


SECTIONS = {"rows": rows, "matrix": matrix, "block": block, "step": step}


def main() -> None:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--blocks", type=int, default=12, help="of the BERT-sized pair")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; this script compares one with the processor")
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    for name in arguments.sections or SECTIONS:
        started = time.perf_counter()
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                SECTIONS[name](Path(folder), arguments.blocks)
        except Exception:
            traceback.print_exc(limit=-6)
        print(f"  [{time.perf_counter() - started:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
