"""Small live models with the layouts that an edit has to get right."""

import torch
from torch import nn

from tests.pico import bert_state, finetuned


class Tied(nn.Module):
    """A GPT-2-like block: Conv1D (in, out), fused q, k, v in its columns, and a head tied to the embedding."""

    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=19, n_embd=width, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        self.inner = GPT2LMHeadModel(config).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).logits


def bert(seed: int = 0, width: int = 12) -> nn.Module:
    """A transformers BERT with random weights, and a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4 * width
    )
    return BertForSequenceClassification(config).eval()


def bert_pair(folder, seed: int = 0):
    """A base and two finetunes of it on disk, as transformers writes them; their paths."""
    base = bert(seed)
    paths = [folder / name for name in ("base", "one", "two")]
    base.save_pretrained(paths[0])
    for number, path in enumerate(paths[1:], start=1):
        model = bert(seed)
        model.load_state_dict(finetuned(model.state_dict(), 0.2, number))
        model.save_pretrained(path)
    return paths


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, bit for bit."""
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


__all__ = ["Tied", "bert", "bert_pair", "bert_state", "bits"]
