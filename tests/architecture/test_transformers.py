"""Every matrix of every block of small models that transformers builds: found once, right role, (out, in), block.

The oracle is the model itself: the weight of the module that computes a role, found by walking its modules. Both
the files that `save_pretrained` writes (the published names) and the state dict in memory (the module names, which
differ from version 5 on) are mapped, and matrices are compared by their values.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specbasis.architecture.recognise import ModelMap, coverage, model_map
from specbasis.checkpoint import Checkpoint, open_checkpoint

transformers = pytest.importorskip("transformers")

QUERY, KEY, VALUE, OUT = (f"attention.{part}" for part in ("query", "key", "value", "output"))
Roles = dict[str, str]


def attention(prefix: str, names: str, kind: str = "attention") -> Roles:
    """Role → module, for four names in the order query, key, value, output."""
    parts = ("query", "key", "value", "output")
    return {f"{kind}.{part}": prefix + name for part, name in zip(parts, names.split(), strict=True)}


@dataclass(frozen=True)
class Case:
    """A small model and where its roles live.

    Attributes:
        model: its class in transformers.
        config: arguments of its configuration; sub-configurations as dictionaries.
        blocks: (stack, path of the list of blocks, role → module in a block); a path with * counts on over stages.
        left: roles of the whole map that a block's modules do not give, e.g. heads.
    """

    model: str
    config: dict[str, Any]
    blocks: list[tuple[str, str, Roles]]


D, FF, HEADS = 24, 40, 3
SMALL = {"hidden_size": D, "intermediate_size": FF, "num_attention_heads": HEADS, "num_hidden_layers": 3}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 32}
GQA = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4}
ENC_DEC = {
    "d_model": D, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": FF, "decoder_ffn_dim": FF,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip

BERT = attention("attention.", "self.query self.key self.value output.dense") | {
    "ffn.up": "intermediate.dense", "ffn.down": "output.dense"}  # fmt: skip
CROSS = attention("crossattention.", "self.query self.key self.value output.dense", "cross_attention")
DEBERTA2 = BERT | attention("attention.", "self.query_proj self.key_proj self.value_proj output.dense")
BART = attention("self_attn.", "q_proj k_proj v_proj out_proj") | {"ffn.up": "fc1", "ffn.down": "fc2"}
BART_CROSS = BART | attention("encoder_attn.", "q_proj k_proj v_proj out_proj", "cross_attention")
CLIP = BART | {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"}
VIT = attention("attention.", "q_proj k_proj v_proj o_proj") | {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"}
LLAMA = attention("self_attn.", "q_proj k_proj v_proj o_proj")
GATED = LLAMA | {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
CONVNEXT = {"conv": "dwconv", "ffn.up": "pwconv1", "ffn.down": "pwconv2"}
T5_ENC = attention("layer.0.SelfAttention.", "q k v o") | {
    "ffn.up": "layer.1.DenseReluDense.wi", "ffn.down": "layer.1.DenseReluDense.wo"}  # fmt: skip
T5_DEC = (
    attention("layer.0.SelfAttention.", "q k v o")
    | attention("layer.1.EncDecAttention.", "q k v o", "cross_attention")
    | {"ffn.gate": "layer.2.DenseReluDense.wi_0", "ffn.up": "layer.2.DenseReluDense.wi_1",
       "ffn.down": "layer.2.DenseReluDense.wo"}
)  # fmt: skip
T5_GATED = {role: name.replace("layer.2", "layer.1") for role, name in T5_DEC.items() if "cross" not in role}
SPEECH = attention("attention.", "q_proj k_proj v_proj out_proj") | {
    "ffn.up": "feed_forward.intermediate_dense", "ffn.down": "feed_forward.output_dense"}  # fmt: skip
T5 = {
    "d_model": D,
    "d_kv": 8,
    "d_ff": FF,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": HEADS,
    "vocab_size": 50,
}

CASES = {
    "bert": Case("BertForMaskedLM", TEXT, [("", "bert.encoder.layer", BERT)]),
    "bert decoder": Case("BertLMHeadModel", TEXT | {"is_decoder": True, "add_cross_attention": True},
                         [("", "bert.encoder.layer", BERT | CROSS)]),
    "roberta": Case("RobertaForSequenceClassification", TEXT, [("", "roberta.encoder.layer", BERT)]),
    "xlm-roberta": Case("XLMRobertaForMaskedLM", TEXT, [("", "roberta.encoder.layer", BERT)]),
    "electra": Case("ElectraForPreTraining", TEXT | {"embedding_size": 16}, [("", "electra.encoder.layer", BERT)]),
    "bigbird": Case("BigBirdForMaskedLM", TEXT | {"attention_type": "original_full"},
                    [("", "bert.encoder.layer", BERT)]),
    "distilbert": Case("DistilBertForSequenceClassification",
                       {"dim": D, "hidden_dim": FF, "n_heads": HEADS, "n_layers": 3, "vocab_size": 50},
                       [("", "distilbert.transformer.layer", attention("attention.", "q_lin k_lin v_lin out_lin")
                         | {"ffn.up": "ffn.lin1", "ffn.down": "ffn.lin2"})]),
    "albert": Case("AlbertForMaskedLM", TEXT | {"embedding_size": 16},
                   [("", "albert.encoder.albert_layer_groups.0.albert_layers",
                     attention("attention.", "query key value dense")
                     | {"ffn.up": "ffn", "ffn.down": "ffn_output"})]),
    "bart": Case("BartForSequenceClassification", ENC_DEC,
                 [("encoder", "model.encoder.layers", BART), ("decoder", "model.decoder.layers", BART_CROSS)]),
    "deberta-v2": Case("DebertaV2ForMaskedLM",
                       TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
                               "share_att_key": True, "norm_rel_ebd": "layer_norm"},
                       [("", "deberta.encoder.layer", DEBERTA2)]),
    "deberta-v2 own positions": Case("DebertaV2Model",
                                     TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
                                     [("", "encoder.layer", DEBERTA2)]),
    "opt": Case("OPTForCausalLM", {"hidden_size": D, "ffn_dim": FF, "num_attention_heads": HEADS, "vocab_size": 50,
                                   "num_hidden_layers": 3, "word_embed_proj_dim": 16},
                [("decoder", "model.decoder.layers", BART)]),
    "whisper": Case("WhisperForConditionalGeneration",
                    ENC_DEC | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
                               "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
                    [("encoder", "model.encoder.layers", BART), ("decoder", "model.decoder.layers", BART_CROSS)]),
    "wav2vec2": Case("Wav2Vec2ForCTC",
                     SMALL | {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "vocab_size": 9,
                              "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
                     [("encoder", "wav2vec2.encoder.layers", SPEECH)]),
    "clip": Case("CLIPModel", {"text_config": TEXT, "vision_config": SMALL | IMAGE | {"num_hidden_layers": 2}},
                 [("text_model", "text_model.encoder.layers", CLIP),
                  ("vision_model", "vision_model.encoder.layers", CLIP)]),
    "vit": Case("ViTForImageClassification", SMALL | IMAGE, [("*", "vit.layers", VIT)]),
    "vit-mae": Case("ViTMAEForPreTraining",
                    SMALL | IMAGE | {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 2,
                                     "decoder_num_attention_heads": 3, "decoder_intermediate_size": 20},
                    [("*", "vit.layers", VIT), ("decoder", "decoder.decoder_layers", VIT)]),
    "swin": Case("SwinForImageClassification",
                 {"embed_dim": 12, "depths": [2, 1, 3], "num_heads": [2, 3, 4], "window_size": 2, "image_size": 16,
                  "patch_size": 2},
                 [("*", "swin.encoder.layers.*.blocks", VIT)]),
    "convnext": Case("ConvNextForImageClassification", {"hidden_sizes": [8, 12], "depths": [2, 3], "num_stages": 2},
                     [("", "convnext.encoder.stages.*.layers", CONVNEXT)]),
    "convnextv2": Case("ConvNextV2Model", {"hidden_sizes": [8, 12], "depths": [2, 3], "num_stages": 2},
                       [("", "encoder.stages.*.layers", CONVNEXT)]),
    "mobilebert": Case("MobileBertForSequenceClassification",
                       TEXT | {"intra_bottleneck_size": 12, "embedding_size": 16, "num_feedforward_networks": 3},
                       [("", "mobilebert.encoder.layer", BERT | {
                           "ffn.up": "ffn.0.intermediate.dense|ffn.1.intermediate.dense|intermediate.dense",
                           "ffn.down": "ffn.0.output.dense|ffn.1.output.dense|output.dense"})]),
    "llama": Case("LlamaForCausalLM", GQA, [("", "model.layers", GATED)]),
    "mistral": Case("MistralForCausalLM", GQA, [("", "model.layers", GATED)]),
    "qwen2": Case("Qwen2ForCausalLM", GQA | {"tie_word_embeddings": True}, [("", "model.layers", GATED)]),
    "qwen3": Case("Qwen3ForCausalLM", GQA, [("", "model.layers", GATED)]),
    "gemma": Case("GemmaForCausalLM", GQA, [("", "model.layers", GATED)]),
    "gemma2": Case("Gemma2ForCausalLM", GQA, [("", "model.layers", GATED)]),
    "phi": Case("PhiForCausalLM", TEXT, [("", "model.layers", LLAMA | {
        OUT: "self_attn.dense", "ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"})]),
    "starcoder2": Case("Starcoder2ForCausalLM", GQA, [("", "model.layers", LLAMA | {
        "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})]),
    "gpt-neo": Case("GPTNeoForCausalLM", {"hidden_size": D, "intermediate_size": FF, "num_heads": HEADS,
                                          "num_layers": 2, "vocab_size": 50,
                                          "attention_types": [[["global", "local"], 1]],
                                          "max_position_embeddings": 32},
                    [("", "transformer.h", attention("attn.attention.", "q_proj k_proj v_proj out_proj")
                      | {"ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})]),
    "gpt-j": Case("GPTJForCausalLM", {"n_embd": D, "n_inner": FF, "n_head": HEADS, "n_layer": 2, "vocab_size": 50,
                                      "rotary_dim": 4},
                  [("", "transformer.h", attention("attn.", "q_proj k_proj v_proj out_proj")
                    | {"ffn.up": "mlp.fc_in", "ffn.down": "mlp.fc_out"})]),
    "t5": Case("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 2},
               [("encoder", "encoder.block", T5_ENC),
                ("decoder", "decoder.block", {**{k: v for k, v in T5_DEC.items() if "ffn" not in k},
                 "ffn.up": "layer.2.DenseReluDense.wi", "ffn.down": "layer.2.DenseReluDense.wo"})]),
    "t5 gated": Case("T5ForConditionalGeneration",
                     T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
                     [("encoder", "encoder.block", T5_GATED), ("decoder", "decoder.block", T5_DEC)]),
    "nystromformer": Case("NystromformerModel", TEXT | {"num_landmarks": 4, "segment_means_seq_len": 8},
                          [("", "encoder.layer", BERT)]),
}  # fmt: skip


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, case.model)
    model: nn.Module = cls(cls.config_class(**case.config)).eval()
    for parameter in model.parameters():  # distinct values, also where the library starts with zeros or ones
        nn.init.normal_(parameter, std=0.3)
    return model


def two_ways(model: Any, folder: Path) -> Iterator[tuple[str, Checkpoint]]:
    """The model as it is stored, and as it is in memory."""
    model.save_pretrained(folder)
    yield "stored", open_checkpoint(folder)
    config = open_checkpoint(folder).config
    memory = open_checkpoint(dict(model.state_dict()))
    yield "in memory", Checkpoint(memory.source, memory.entries, (), config)


def lists_of_blocks(model: nn.Module, path: str) -> Iterator[tuple[int, nn.Module]]:
    """Number and module of every block below a path; * runs over stages and counts on."""
    before, star, after = path.partition(".*.")
    parents = (
        [model.get_submodule(before)] if not star else [m.get_submodule(after) for m in model.get_submodule(before)]
    )
    yield from enumerate(block for parent in parents for block in parent)  # type: ignore[union-attr]


def expected(model: nn.Module, case: Case) -> dict[tuple[str, int, str], list[Tensor]]:
    return {
        (stack, number, role): [block.get_submodule(name).weight.detach() for name in names.split("|")]
        for stack, path, roles in case.blocks
        for number, block in lists_of_blocks(model, path)
        for role, names in roles.items()
    }


def in_blocks(mapped: ModelMap, checkpoint: Checkpoint) -> dict[tuple[str, int, str], list[Tensor]]:
    found: dict[tuple[str, int, str], list[Tensor]] = {}
    for ref in mapped.matrices:
        role = ref.key.role
        if role.startswith(("attention", "cross_attention", "ffn")) or (
            role == "conv" and ref.key.block is not None
        ):
            assert ref.key.block is not None, ref
            W = ref.read(checkpoint)
            assert tuple(W.shape) == ref.shape
            found.setdefault((ref.key.stack, ref.key.block, role), []).append(W)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_of_every_block_is_found_once(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = build(case)
    want = expected(model, case)
    convolutions = any(role == "conv" for _, _, role in want)
    for way, checkpoint in two_ways(model, tmp_path):
        mapped = model_map(checkpoint)
        got = {k: v for k, v in in_blocks(mapped, checkpoint).items() if convolutions or k[2] != "conv"}
        anonymous = {key[0] for key in want} & {"*"}
        if anonymous:  # the stack's label follows the file's names, which differ between the two ways
            labelled = {key[0] for key in want} - {"*"}
            got = {(s if s in labelled else "*", b, r): v for (s, b, r), v in got.items()}
        assert got.keys() == want.keys(), (way, mapped.family.name, got.keys() ^ want.keys())
        for key, weights in want.items():
            assert len(got[key]) == len(weights), (way, key)
            flat = [W.flatten(1) for W in weights]
            assert all(any(G.shape == W.shape and torch.equal(G, W) for G in got[key]) for W in flat), (way, key)
        assert not mapped.unnamed, (way, mapped.unnamed)
        everything = Counter(ref.key.name for ref in mapped.matrices)
        assert max(everything.values()) == 1


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_accounted_for_once(name: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    for _, checkpoint in two_ways(model, tmp_path):
        mapped = model_map(checkpoint)
        in_matrices = {ref.parameter for ref in mapped.matrices}
        left_out = {item.name for item in mapped.skipped}
        assert in_matrices | left_out == set(checkpoint)
        assert not in_matrices & left_out
        counted = coverage(mapped, checkpoint)
        assert counted.total == sum(counted.by_role.values()) + counted.skipped
        assert counted.unnamed == 0


def test_a_block_that_is_used_many_times_is_counted_once_and_said_so(tmp_path: Path) -> None:
    model = build(CASES["albert"])
    _, checkpoint = next(two_ways(model, tmp_path))
    mapped = model_map(checkpoint)
    assert {ref.key.block for ref in mapped.matrices} == {0, None}
    assert any("run through 3 times" in note for note in mapped.notes)


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    model = build(CASES["bert"])
    checkpoint = open_checkpoint(dict(model.state_dict()))
    mapped = model_map(checkpoint)
    assert list(mapped.shared.values()) == ["bert.embeddings.word_embeddings.weight"]
    assert "cls.predictions.decoder.weight" not in {ref.parameter for ref in mapped.matrices}
    assert any(item.name == "cls.predictions.decoder.weight" and "tied" in item.reason for item in mapped.skipped)


# --- XLNet: three axes ------------------------------------------------------------------------------------------


def test_xlnet_projections_are_the_linear_maps_of_its_einsums(tmp_path: Path) -> None:
    case = Case("XLNetModel", {"d_model": D, "n_layer": 2, "n_head": HEADS, "d_inner": FF, "vocab_size": 50}, [])
    model = build(case)
    for _, checkpoint in two_ways(model, tmp_path):
        found = in_blocks(model_map(checkpoint), checkpoint)
        roles = (QUERY, KEY, VALUE, OUT, "ffn.up", "ffn.down")
        assert set(found) == {("", b, role) for b in (0, 1) for role in roles}
        layer = model.layer[1].rel_attn
        x = torch.randn(5, 2, D)
        for role, weight in ((QUERY, layer.q), (KEY, layer.k), (VALUE, layer.v)):
            want = torch.einsum("ibh,hnd->ibnd", x, weight)  # as XLNet's own forward pass has it
            torch.testing.assert_close((x @ found["", 1, role][0].T).unflatten(-1, (HEADS, -1)), want)
        heads = torch.randn(5, 2, HEADS, D // HEADS)
        want = torch.einsum("ibnd,hnd->ibh", heads, layer.o)
        torch.testing.assert_close(heads.flatten(2) @ found["", 1, OUT][0].T, want)


# --- fused weights: by a forward pass ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A model with fused query, key and value, and how to run one block's attention alone.

    Attributes:
        path: its attention module.
        run: (module, x) → output (batch, tokens, width).
        causal: whether a token attends to the tokens before it only.
    """

    model: str
    config: dict[str, Any]
    path: str
    run: Callable[[Any, Tensor], Tensor]
    heads: tuple[int, int] = (HEADS, HEADS)
    causal: bool = True


def mask(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), -1e9).triu(1)[None, None]


def rotary(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, (batch, tokens, size of a head)."""
    angles = torch.arange(x.shape[1])[:, None] / torch.logspace(0, 2, size // 2)[None]
    both = torch.cat([angles, angles], -1)[None].expand(x.shape[0], -1, -1)
    return both.cos(), both.sin()


def falcon(**options: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50,
            "ffn_hidden_size": FF, "alibi": False, "bias": False, **options}  # fmt: skip


def run_falcon(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module(x, alibi=None, attention_mask=mask(x.shape[1]), position_embeddings=rotary(x, 8))[0]
    return out


GPT2 = {"n_embd": D, "n_inner": FF, "n_head": HEADS, "n_layer": 2, "vocab_size": 50, "n_positions": 32}
FUSED = {
    "gpt2": Fused("GPT2LMHeadModel", GPT2, "transformer.h.1.attn",
                  lambda m, x: m(x, attention_mask=mask(x.shape[1]))[0]),
    "gpt-bigcode": Fused("GPTBigCodeForCausalLM", GPT2 | {"multi_query": True}, "transformer.h.1.attn",
                         lambda m, x: m(x, attention_mask=mask(x.shape[1]))[0], heads=(HEADS, 1)),
    "gpt-bigcode by head": Fused("GPTBigCodeForCausalLM", GPT2 | {"multi_query": False}, "transformer.h.1.attn",
                                 lambda m, x: m(x, attention_mask=mask(x.shape[1]))[0]),
    "gpt-neox": Fused("GPTNeoXForCausalLM", TEXT, "gpt_neox.layers.1.attention",
                      lambda m, x: m(x, attention_mask=mask(x.shape[1]), position_embeddings=rotary(x, 2))[0]),
    "bloom": Fused("BloomForCausalLM", {"hidden_size": D, "n_head": HEADS, "n_layer": 2, "vocab_size": 50},
                   "transformer.h.1.self_attention",
                   lambda m, x: m(x, residual=torch.zeros_like(x), alibi=torch.zeros(2 * HEADS, 1, x.shape[1]),
                                  attention_mask=mask(x.shape[1]))[0]),
    "falcon multi-query": Fused("FalconForCausalLM", falcon(multi_query=True, new_decoder_architecture=False),
                                "transformer.h.1.self_attention", run_falcon, heads=(4, 1)),
    "falcon grouped": Fused("FalconForCausalLM", falcon(new_decoder_architecture=True, num_kv_heads=2),
                            "transformer.h.1.self_attention", run_falcon, heads=(4, 2)),
    "falcon by head": Fused("FalconForCausalLM", falcon(multi_query=False, new_decoder_architecture=False),
                            "transformer.h.1.self_attention", run_falcon, heads=(4, 4)),
    "phi3": Fused("Phi3ForCausalLM", GQA, "model.layers.1.self_attn",
                  lambda m, x: m(x, attention_mask=mask(x.shape[1]), position_embeddings=rotary(x, D // 4))[0],
                  heads=(4, 2)),
    "codegen": Fused("CodeGenForCausalLM", {"n_embd": 32, "n_inner": FF, "n_head": 4, "n_layer": 2,
                                            "vocab_size": 50, "rotary_dim": 4},
                     "transformer.h.1.attn",
                     lambda m, x: m(x, layer_past=None, attention_mask=mask(x.shape[1]),
                                    position_ids=torch.arange(x.shape[1])[None].expand(2, -1))[0],
                     heads=(4, 4)),
    "mpt": Fused("MptForCausalLM", {"d_model": D, "n_heads": HEADS, "n_layers": 2, "vocab_size": 50,
                                    "expansion_ratio": 2},
                 "transformer.blocks.1.attn",
                 lambda m, x: m(x, position_bias=torch.zeros(HEADS, 1, x.shape[1]),
                                attention_mask=mask(x.shape[1]) < 0)[0]),
    "deberta": Fused("DebertaModel", TEXT | {"relative_attention": False, "num_hidden_layers": 2},
                     "encoder.layer.1.attention.self",
                     lambda m, x: m(x, attention_mask=torch.ones(x.shape[0], 1, x.shape[1], x.shape[1]).bool())[0],
                     causal=False),
    "modernbert": Fused("ModernBertModel", TEXT | {"global_attn_every_n_layers": 1, "pad_token_id": 0},
                        "layers.1.attn", lambda m, x: m(x, position_embeddings=rotary(x, 8))[0], causal=False),
}  # fmt: skip


def without_biases(case: Fused) -> Any:
    model = build(Case(case.model, case.config, []))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_gives_the_modules_output(name: str, tmp_path: Path) -> None:
    """A query that is zero at one token makes its attention uniform: the output is O · mean(V x), whatever the key.

    This tells query from key (a zero key at that token would not do it), and value and output by their values, head
    by head, through the module's own forward pass, positions and scaling included.
    """
    case = FUSED[name]
    model = without_biases(case)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    mapped = model_map(checkpoint)
    refs = {ref.key.role: ref for ref in mapped.matrices if ref.key.block == 1}
    assert {QUERY, KEY, VALUE, OUT} <= set(refs), (mapped.family.name, mapped.notes)
    W = {role: ref.read(checkpoint) for role, ref in refs.items()}
    heads, kv_heads = case.heads
    assert W[KEY].shape == W[VALUE].shape
    assert W[QUERY].shape[0] * kv_heads == W[KEY].shape[0] * heads

    x = torch.randn(2, 5, W[QUERY].shape[1])
    last = x[:, -1]
    module = model.get_submodule(case.path)
    fused = dict(model.named_parameters())[_module_name(refs[QUERY].parameter, model)]
    kept = fused.clone()

    def output(role: str) -> Tensor:
        """The module's output with one role blind to what the last token holds."""
        fused.copy_(kept)
        # Both samples' last tokens are projected out of the rows of that matrix.
        Q, _ = torch.linalg.qr(last.T)
        refs[role].write(fused.data, W[role] - W[role] @ Q @ Q.T)
        return case.run(module, x)

    mixed = (x @ W[VALUE].T).unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, -2).flatten(-2)
    want = mixed.mean(1) if case.path.endswith("self") else mixed.mean(1) @ W[OUT].T
    torch.testing.assert_close(output(QUERY)[:, -1], want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(KEY)[:, -1], want, rtol=1e-2, atol=1e-3)
    fused.copy_(kept)
    assert not torch.allclose(case.run(module, x)[:, -1], want, rtol=1e-2, atol=1e-3)


def _module_name(stored: str, model: nn.Module) -> str:
    """The parameter in the model that a stored name means (a prefix may differ)."""
    names = [name for name, _ in model.named_parameters() if name.endswith(stored) or stored.endswith(name)]
    assert len(names) == 1
    return names[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "config", "path"),
    [
        ("Phi3ForCausalLM", GQA, "model.layers.1.mlp"),
        ("GlmForCausalLM", GQA, "model.layers.1.mlp"),
        ("ModernBertModel", TEXT | {"pad_token_id": 0}, "layers.1.mlp"),
        ("LlamaForCausalLM", GQA, "model.layers.1.mlp"),
    ],
)
def test_gated_feed_forward_gives_the_modules_output(
    model: str, config: Mapping[str, Any], path: str, tmp_path: Path
) -> None:
    built: Any = without_biases(Fused(model, dict(config), path, lambda m, x: m(x)))
    built.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    W = {ref.key.role: ref.read(checkpoint) for ref in model_map(checkpoint).matrices if ref.key.block == 1}
    x = torch.randn(2, 5, D)
    module = built.get_submodule(path)
    act = next(m for n, m in module.named_modules() if "act" in n.rpartition(".")[2])
    got = (act(x @ W["ffn.gate"].T) * (x @ W["ffn.up"].T)) @ W["ffn.down"].T
    torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)


# --- experts ----------------------------------------------------------------------------------------------------

MOE = GQA | {"moe_intermediate_size": 20, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 3}


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("MixtralForCausalLM", "model.layers.1.mlp"),
        ("Qwen2MoeForCausalLM", "model.layers.1.mlp"),
        ("Qwen3MoeForCausalLM", "model.layers.1.mlp"),
        ("OlmoeForCausalLM", "model.layers.1.mlp"),
        ("GptOssForCausalLM", "model.layers.1.mlp"),
    ],
)
def test_experts_give_the_modules_output(model: str, path: str, tmp_path: Path) -> None:
    """Σ over experts of router weight · down(act(gate x) · up x), against the module, as stored and in memory."""
    built: Any = without_biases(Fused(model, MOE, path, lambda m, x: m(x)))
    module = built.get_submodule(path)
    x = torch.randn(1, 4, D)
    calls: dict[str, Any] = {}
    handle = module.experts.register_forward_hook(lambda m, args, kw, out: calls.update(args=args, kw=kw, out=out),
                                                  with_kwargs=True)  # fmt: skip
    module(x)
    handle.remove()
    given = [*calls["args"], *calls["kw"].values()]
    tokens, index, weights = given[0].reshape(-1, D), *given[1:3]
    if index.is_floating_point():
        index, weights = weights, index
    for way, checkpoint in two_ways(built, tmp_path):
        W: dict[tuple[str, int], Tensor] = {}
        for ref in model_map(checkpoint).matrices:
            if ref.key.block == 1 and ref.key.role.startswith("ffn") and "shared" not in ref.parameter:
                expert = (
                    ref.expert if ref.expert is not None else int(ref.parameter.split("experts.")[1].split(".")[0])
                )
                assert (ref.key.role, expert) not in W
                W[ref.key.role, expert] = ref.read(checkpoint)
        assert set(W) == {(role, e) for role in ("ffn.gate", "ffn.up", "ffn.down") for e in range(3)}, way
        got = torch.zeros_like(tokens)
        for t, token in enumerate(tokens):
            for e, weight in zip(index[t].tolist(), weights[t], strict=True):
                hidden = activate(model, token @ W["ffn.gate", e].T, token @ W["ffn.up", e].T)
                got[t] += weight * (hidden @ W["ffn.down", e].T)
        torch.testing.assert_close(got, calls["out"].reshape(-1, D), rtol=1e-4, atol=1e-5)


def activate(model: str, gate: Tensor, up: Tensor) -> Tensor:
    if model.startswith("GptOss"):  # its own clipped gate
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return nn.functional.silu(gate) * up
