"""Small checkpoints on disk, in layouts that real models have."""

from pathlib import Path

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def bert_state(blocks: int = 2, width: int = 12, seed: int = 0, prefix: str = "") -> State:
    """A BERT-like encoder with random weights, as its state_dict."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.1

    state = {
        "embeddings.word_embeddings.weight": normal(30, width),
        "embeddings.LayerNorm.weight": torch.ones(width),
    }
    for b in range(blocks):
        layer = f"encoder.layer.{b}"
        for part in ("query", "key", "value"):
            state[f"{layer}.attention.self.{part}.weight"] = normal(width, width)
            state[f"{layer}.attention.self.{part}.bias"] = normal(width)
        state[f"{layer}.attention.output.dense.weight"] = normal(width, width)
        state[f"{layer}.intermediate.dense.weight"] = normal(4 * width, width)
        state[f"{layer}.output.dense.weight"] = normal(width, 4 * width)
    state["pooler.dense.weight"] = normal(width, width)
    return {prefix + name: value for name, value in state.items()}


def finetuned(state: State, size: float = 0.05, seed: int = 1, frozen: str = "-") -> State:
    """The same weights after a random update of relative size `size`; names containing `frozen` stay."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: value.clone()
        if frozen in name
        else value + size * value.std(correction=0) * torch.randn(value.shape, generator=g)
        for name, value in state.items()
    }


def write(path: Path, state: State) -> Path:
    """Write a safetensors file, in a folder that is made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path
