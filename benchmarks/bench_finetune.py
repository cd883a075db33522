"""Cost of finetuning with and without the frozen-prefix cache beside PEFT's LoRA, as ratios measured in one run.

DeBERTa-v3-base shape and dropout, the feed-forward matrices of the last two blocks, ranks [0, 300), batch 16 × 64.
Weights are random: time and memory do not depend on their values. Run: python benchmarks/bench_finetune.py

An epoch is a number of equal steps, so its ratios are those of a step: read the batch, forward, backward, update.
A ratio is the median over rounds, of wall time; of processor time beside it, the figure to trust on a busy machine
(with OMP_NUM_THREADS=1, which keeps waiting threads out of it).
Ten epochs with a cold cache are its computation, divided by the batches, and ten steps. Memory is the greatest
resident set of a process of its own while it takes warm steps, less what it had before it made the model. Without
the cache the last block is narrowed to the first position, as with it; "whole" is without that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from bench_adapter import TARGETS, K, Times, deberta, now, ratios, since
from torch import Tensor, nn

from specbasis.adapter import SpectralConfig
from specbasis.finetuning.prefix import Cut, PrefixCache, find_cut
from specbasis.finetuning.prefix.narrow import find_narrow, slicing

MATRICES = r"attention\.self\.(query|key|value)_proj|attention\.output\.dense|intermediate\.dense|output\.dense"
EVERYWHERE = rf".*\.layer\.\d+\.({MATRICES})"
BATCHES = 4
DROPOUT = 0.1

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "spectral": lambda: SpectralConfig(rank=K, target_modules=TARGETS),
    "lora": lambda: peft.LoraConfig(r=8, target_modules=TARGETS),
    "lora everywhere": lambda: peft.LoraConfig(r=8, target_modules=EVERYWHERE),
}


def adapted(name: str) -> nn.Module:
    """The model with an adapter and a trained head."""
    base = deberta()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
    model = peft.get_peft_model(base, CONFIGS[name]())
    for part in ("pooler", "classifier"):
        model.get_submodule(f"base_model.model.{part}").requires_grad_(True)
    return model.train()


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (16 * BATCHES, 64), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 2)}
        for i, row in enumerate(ids)
    ]


def collate(items: list[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Trained:
    """A way to train, which can take a step."""

    def __init__(
        self,
        model: nn.Module,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        inside: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.collator, self.inside, self.at = model, collator, inside, 0
        self.optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.items = examples()

    def step(self) -> Times:
        """Time to read a batch, for forward, backward and update."""
        items = self.items[16 * self.at : 16 * self.at + 16]
        self.at = (self.at + 1) % BATCHES
        start = now()
        self.model(**self.collator(items)).loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return since(start)


def cut_of(model: nn.Module) -> Cut:
    cut = find_cut(model)
    assert isinstance(cut, Cut), cut
    return cut


def peak(name: str, folder: str) -> int:
    """Bytes at the peak of warm steps, less what there was before the model: in this very process."""
    before = resident("VmRSS")
    cached = name == "cached"
    model = adapted("spectral" if cached else name)
    if cached:
        cache = PrefixCache.build(model, cut_of(model), examples(), collate, folder)
        trained = Trained(model, cache.collator(collate), cache.suffix)
    else:
        trained = Trained(model, collate)
    with trained.inside(model):
        trained.step()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        for _ in range(2):
            trained.step()
        return resident("VmHWM") - before


def resident(field: str) -> int:
    """A field of Linux's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each way, interleaved")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(json.dumps(peak(*arguments.peak)))
        return

    with tempfile.TemporaryDirectory() as folder:
        model = adapted("spectral")
        start = now()
        cut = cut_of(model)
        finding = since(start)[0]
        PrefixCache.build(model, cut, examples()[:16], collate, Path(folder, "warm-up"))
        start = now()
        cache = PrefixCache.build(model, cut, examples(), collate, folder)
        cold = [spent / BATCHES for spent in since(start)]
        ways = {
            "cached": Trained(model, cache.collator(collate), cut.suffix),
            "spectral": Trained(model, collate, partial(slicing, name=find_narrow(model))),
            "spectral, whole": Trained(model, collate),
            "lora": Trained(adapted("lora"), collate),
            "lora everywhere": Trained(adapted("lora everywhere"), collate),
        }
        times: dict[str, list[Times]] = {name: [] for name in ways}
        for _ in range(arguments.rounds + 1):
            for name, way in ways.items():
                with way.inside(way.model):
                    times[name].append(way.step())
        size = cache.size
        times = {name: values[1:] for name, values in times.items()}
        peaks = {
            name: json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--peak", name, folder], check=True, capture_output=True, text=True
                ).stdout
            )
            for name in ("cached", "lora")
        }

    median = {name: [statistics.median(c) for c in zip(*values, strict=True)] for name, values in times.items()}
    memory = peaks["cached"] / peaks["lora"]
    ten = [(cold[i] + 10 * median["cached"][i]) / (10 * median["lora"][i]) for i in (0, 1)]
    rows = [
        ("warm epoch / LoRA, same layers", ratios(times["cached"], times["lora"]), 1 / 4),
        ("warm epoch / LoRA everywhere", ratios(times["cached"], times["lora everywhere"]), 1 / 6),
        ("10 epochs from cold / LoRA, same", ten, 1 / 3),
        ("peak memory / LoRA, same layers", (memory, memory), 1 / 2),
        ("without cache / LoRA, same layers", ratios(times["spectral"], times["lora"]), 1.0),
    ]
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} rounds; {cut}")
    print("median step, s: " + ", ".join(f"{name} {wall:.3f}" for name, (wall, _) in median.items()))
    print(
        f"finding the cut {finding:.2f} s, once; computing the cache {cold[0]:.3f} s a batch; {size / 1e6:.1f} MB"
    )
    print("peak memory, MB: " + ", ".join(f"{name} {value / 1e6:.0f}" for name, value in peaks.items()))
    for title, (wall, cpu), bar in rows:
        verdict = "met" if wall <= bar else "MISSED"
        print(f"{title:34s} {wall:7.3f} (processor time {cpu:.3f})   bar {bar:5.3f}   {verdict}")


if __name__ == "__main__":
    main()
