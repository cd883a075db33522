"""Heads: slices of the four attention matrices, grouped-query too, against a naive loop."""

import pytest
import torch

from specbasis.core.attention_heads import compare_heads, head_count
from tests.helpers.matrices import gaussian, orthonormal


@pytest.mark.parametrize("output", [False, True])
def test_heads_are_those_of_a_naive_loop(output):
    W, T = gaussian(12, 32, 1), gaussian(12, 32, 1) + 0.2 * gaussian(12, 32, 2)
    T[4:8] = W[4:8]  # one head frozen
    found = compare_heads(W.mT if output else W, T.mT if output else T, 3, output)
    for h in range(3):
        a, b = W[4 * h : 4 * h + 4], T[4 * h : 4 * h + 4]
        (Ua, _, Va), (Ub, _, Vb) = (torch.linalg.svd(X, full_matrices=False) for X in (a, b))
        head_side = found.alignment_right if output else found.alignment_left
        stream_side = found.alignment_left if output else found.alignment_right
        assert float(head_side[h]) == pytest.approx(float((Ua * Ub).sum(0).abs().mean()))
        assert float(stream_side[h]) == pytest.approx(float((Va * Vb).sum(1).abs().mean()))
        assert float(found.rotation[h]) ** 2 == pytest.approx(1 - float((Va @ Vb.mT).square().sum()) / 4, abs=1e-9)
        assert float(found.relative_update[h]) == pytest.approx(float((b - a).norm() / a.norm()))
    assert float(found.rotation[1]) == 0
    assert float(found.alignment_left[1]) == float(found.alignment_right[1]) == 1
    assert float(found.update_share.sum()) == pytest.approx(1)


def test_rotation_does_not_see_a_rotation_inside_of_the_head():
    W = gaussian(8, 20, 3)
    T = torch.cat([orthonormal(4, 4, 1) @ W[:4], W[4:]])
    found = compare_heads(W, T, 2, False)
    assert float(found.rotation[0]) < 1e-6
    assert float(found.alignment_left[0]) < 0.99


@pytest.mark.parametrize(
    ("config", "role", "stack", "shape", "given", "heads"),
    [
        ({"num_attention_heads": 12}, "attention.query", "", (768, 768), None, 12),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, "attention.key", "", (1024, 4096), None, 8),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, "attention.output", "", (4096, 4096), None, 32),
        ({"n_head": 12}, "attention.value", "", (768, 768), None, 12),
        (
            {"decoder_attention_heads": 16, "encoder_attention_heads": 8},
            "cross_attention.key", "decoder", (64, 64), None, 16,
        ),
        (
            {"text_config": {"num_attention_heads": 8}, "vision_config": {"num_attention_heads": 12}},
            "attention.query", "vision", (768, 768), None, 12,
        ),
        (
            {
                "text_config": {"num_attention_heads": 8, "hidden_size": 512},
                "vision_config": {"num_attention_heads": 12, "hidden_size": 768},
            },
            "attention.query", "", (768, 768), None, 12,
        ),
        ({}, "attention.query", "", (128, 128), None, 0),
        ({}, "attention.query", "", (128, 128), 8, 8),
        ({"num_attention_heads": 12}, "ffn.up", "", (768, 768), None, 0),
        ({"num_attention_heads": 5}, "attention.query", "", (768, 768), None, 0),
        ({"num_heads": [3, 6]}, "attention.query", "", (96, 96), None, 0),
    ],
)  # fmt: skip
def test_the_number_of_heads(config, role, stack, shape, given, heads):
    assert head_count(config, role, stack, shape, given) == heads
