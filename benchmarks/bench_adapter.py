"""Cost of the spectral adapter beside its nearest neighbours in PEFT, as ratios measured in one run.

DeBERTa-v3-base shape, the feed-forward matrices of the last two blocks, ranks [0, 300), batch 16 × 64. Weights are
random: time and memory do not depend on their values. Run: python benchmarks/bench_adapter.py [--rounds N]
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from specbasis.adapter import SpectralConfig, parameter_counts

TARGETS = r".*\.layer\.(10|11)\.(intermediate|output)\.dense"
K = 300


def deberta() -> nn.Module:
    """DeBERTa-v3-base with random weights, seeded, and a small vocabulary (embeddings are frozen)."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return DebertaV2ForSequenceClassification(config)


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "spectral": lambda: SpectralConfig(rank=K, target_modules=TARGETS),
    "psoft": lambda: peft.PsoftConfig(
        r=K, psoft_alpha=K, target_modules=TARGETS, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    ),
    "lora": lambda: peft.LoraConfig(r=8, target_modules=TARGETS),
}


Times = tuple[float, float]
"""Seconds of wall time, and of CPU time of all threads: the figure to trust on a busy machine with one thread."""


def now() -> Times:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    """Both clocks from a start."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def ratios(mine: list[Times], others: list[Times]) -> Times:
    """Median over rounds of the ratio within a round, by wall time and by CPU time."""
    wall, cpu = (statistics.median(a[i] / b[i] for a, b in zip(mine, others, strict=True)) for i in (0, 1))
    return wall, cpu


class Trained:
    """One adapted model with its optimiser, which can take a step."""

    def __init__(self, config: peft.PeftConfig) -> None:
        self.model = peft.get_peft_model(deberta(), config)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4)
        self.ids = torch.randint(0, 1000, (16, 64))
        self.labels = torch.randint(0, 2, (16,))
        self.model.train()

    def step(self) -> Times:
        """Forward, backward and update."""
        start = now()
        self.model(input_ids=self.ids, labels=self.labels).loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return since(start)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps in one forward pass for the adapted layers' own backward, parameters left
        out.
        """
        own = {tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        seen: dict[int, int] = {}
        inside = [False]

        def pack(tensor: Tensor) -> Tensor:
            if inside[0] and tensor.data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def enter(*_: object) -> None:
            inside[0] = True

        def leave(*_: object) -> None:
            inside[0] = False

        handles = []
        for module in self.model.modules():
            if hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Linear):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=self.ids, labels=self.labels).loss
        for handle in handles:
            handle.remove()
        del loss
        return sum(seen.values())


def attach(model: nn.Module, make: Callable[[], peft.PeftConfig]) -> Times:
    """Attach an adapter to a model in memory, and take it off again, its weights as they were."""
    config = make()
    held = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if re.match(TARGETS, name.removesuffix(".weight"))
    }
    start = now()
    adapted = peft.get_peft_model(model, config)
    taken = since(start)
    adapted.unload()
    for name, parameter in model.named_parameters():
        if name in held:  # PiSSA takes its part out of the weight
            parameter.data.copy_(held[name])
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method, interleaved")
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")

    trained = {name: Trained(make()) for name, make in CONFIGS.items()}
    for model in trained.values():
        for _ in range(2):
            model.step()
    times: dict[str, list[Times]] = {name: [] for name in trained}
    order = list(trained)
    for _ in range(rounds):
        for name in order:
            times[name].append(trained[name].step())
        order = order[1:] + order[:1]
    paired = {other: ratios(times["spectral"], times[other]) for other in ("psoft", "lora")}
    saved = {name: model.saved_bytes() for name, model in trained.items()}
    counts = parameter_counts(trained["spectral"].model)
    del trained
    gc.collect()

    with tempfile.TemporaryDirectory() as folder:
        bases = Path(folder, "bases.safetensors")
        small = SpectralConfig(rank=K, target_modules=TARGETS, save_basis=False, basis_file=str(bases))
        peft.get_peft_model(deberta(), small).save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        plain = deberta()
        cached = attach(
            plain, lambda: SpectralConfig(rank=K, target_modules=TARGETS, save_basis=False, basis_file=str(bases))
        )
    attached: dict[str, list[Times]] = {"spectral": [], "pissa": []}
    pissa = lambda: peft.LoraConfig(r=K, init_lora_weights="pissa", target_modules=TARGETS)  # noqa: E731
    for _ in range(max(3, rounds // 3)):
        attached["spectral"].append(attach(plain, CONFIGS["spectral"]))
        attached["pissa"].append(attach(plain, pissa))
    uncached = ratios(attached["spectral"], attached["pissa"])

    rows = [
        ("step time / PSOFT free R", paired["psoft"], 1.0),
        ("step time / LoRA r=8", paired["lora"], 1.05),
        ("saved activations / LoRA r=8", (saved["spectral"] / saved["lora"],), 0.5),
        ("attach with basis file, s", cached, 1.0),
        ("attach without / PiSSA", uncached, 1 / 3),
        ("adapter file without basis, MB", (size / 1e6,), 1.5),
    ]
    print(f"{torch.get_num_threads()} threads, {rounds} rounds; {counts}")
    for title, measured in (("step", times), ("attach", attached)):
        medians = {
            name: [statistics.median(clock) for clock in zip(*each, strict=True)] for name, each in measured.items()
        }
        print(
            f"{title}, s wall (CPU): "
            + ", ".join(f"{n} {wall:.3f} ({cpu:.3f})" for n, (wall, cpu) in medians.items())
        )
    print("saved in adapted layers, MB: " + ", ".join(f"{name} {value / 1e6:.2f}" for name, value in saved.items()))
    for title, (value, *cpu), bar in rows:
        by_cpu = f", by CPU time {cpu[0]:.3f}" if cpu else ""
        print(f"{title:34s} {value:7.3f}   bar {bar:5.3f}   {'met' if value <= bar else 'MISSED'}{by_cpu}")


if __name__ == "__main__":
    main()
