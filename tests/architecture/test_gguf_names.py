"""A model in Hugging Face's names and the same in those of llama.cpp, as its converter writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specbasis.architecture.pair import pair
from specbasis.checkpoint import open_checkpoint

State = dict[str, torch.Tensor]
HEADS, WIDTH, HIDDEN = 4, 64, 96
BOTH = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def normal(*shape: int) -> torch.Tensor:
    return 0.05 * torch.randn(shape)


def attention() -> State:
    kinds = {"q": (WIDTH, WIDTH), "k": (WIDTH // 2, WIDTH), "v": (WIDTH // 2, WIDTH), "o": (WIDTH, WIDTH)}
    return {f"self_attn.{kind}_proj": normal(*shape) for kind, shape in kinds.items()}


def converted(gguf: object, path: Path, tensors: State, *, kind: str = "Q8_0") -> Path:
    """A file with architecture llama: rows of queries and keys in the order that its rotary embedding wants."""
    form = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    for name, W in tensors.items():
        heads = {"attn_q": HEADS, "attn_k": HEADS // 2}.get(name.split(".")[-2])
        X = W if heads is None else W.reshape(heads, 2, -1, WIDTH).transpose(1, 2).reshape(W.shape)
        writer.add_tensor(name, gguf.quants.quantize(X.contiguous().numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("swapped", [False, True])
def test_every_matrix_of_a_llama_meets_its_own(tmp_path: Path, swapped: bool) -> None:
    gguf = pytest.importorskip("gguf")
    shapes = {"mlp.up_proj": (HIDDEN, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)}
    model = {"model.embed_tokens.weight": normal(100, WIDTH), "lm_head.weight": normal(100, WIDTH)}
    stored = {"token_embd.weight": model["model.embed_tokens.weight"], "output.weight": model["lm_head.weight"]}
    for block in range(3):
        for name, W in (attention() | {n: normal(*s) for n, s in shapes.items()}).items():
            model[f"model.layers.{block}.{name}.weight"] = stored[f"blk.{block}.{BOTH[name]}.weight"] = W
    sides = open_checkpoint(model), open_checkpoint(converted(gguf, tmp_path / "m.gguf", stored))
    base, tuned = sides[::-1] if swapped else sides
    pairing = pair(base, tuned)
    assert len(pairing.matched) == len(model)
    assert not pairing.skipped
    for match in pairing.matched:
        W, T = match.base.read(base), match.tuned.read(tuned)
        assert float((W - T).norm()) < 0.01 * float(W.norm()), match.key.name
        grid = (match.base.grid(base) if swapped else match.tuned.grid(tuned)).part(lambda X: X)
        assert torch.equal(grid.values, W if swapped else T)


def test_experts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    experts = {
        "w1": ("ffn_gate_exps", [normal(HIDDEN, WIDTH) for _ in range(12)]),
        "w2": ("ffn_down_exps", [normal(WIDTH, HIDDEN) for _ in range(12)]),
        "w3": ("ffn_up_exps", [normal(HIDDEN, WIDTH) for _ in range(12)]),
    }
    layer = {f"model.layers.0.{name}.weight": W for name, W in attention().items()}
    stored = {f"blk.0.{BOTH[name.split('0.')[1][:-7]]}.weight": W for name, W in layer.items()}
    layer["model.layers.0.block_sparse_moe.gate.weight"] = stored["blk.0.ffn_gate_inp.weight"] = normal(12, WIDTH)
    for name, (short, members) in experts.items():
        # In the order of text, as safetensors keeps them: 0, 1, 10, 11, 2, …
        layer |= {
            f"model.layers.0.block_sparse_moe.experts.{i}.{name}.weight": members[int(i)]
            for i in sorted(map(str, range(12)))
        }
        stored[f"blk.0.{short}.weight"] = torch.stack(members)
    base, tuned = open_checkpoint(layer), open_checkpoint(converted(gguf, tmp_path / "m.gguf", stored))
    pairing = pair(base, tuned)
    assert len(pairing.matched) == len(layer)
    for match in pairing.matched:
        W, T = match.base.read(base), match.tuned.read(tuned)
        assert float((W - T).norm()) < 0.01 * float(W.norm()), match.key.name
        assert np.array_equal(match.tuned.grid(tuned).values.numpy(), T.numpy())
