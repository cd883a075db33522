"""Reference outputs of bottleneck adapters by the library `adapters`, for test_bottleneck.py.

Run as a script by a Python that has `adapters` (1.3 wants transformers 4.57), it prints JSON: for each architecture
and kind of adapter the hidden states of a pico model, the number of adapter parameters, and the names and shapes
of the model's tensors. All weights follow from names by `values`, so that another version of transformers can build
the same model.
"""

import json
import sys
import zlib

import torch

CONFIGS = {
    "bert": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 12},
    "roberta": {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 12},
    "electra": {
        "hidden_size": 8, "embedding_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 12,
    },
    "deberta-v2": {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 12,
        "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "distilbert": {"dim": 8, "hidden_dim": 16, "n_heads": 2, "vocab_size": 12, "n_layers": 2},
    "vit": {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 4, "patch_size": 2,
    },
    "llama": {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 12,
    },
}  # fmt: skip
BLOCKS = 2
BOTTLENECK = 4
KINDS = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn"}


def config_of(kind):
    from transformers import AutoConfig

    sizes = dict(CONFIGS[kind])
    if kind != "distilbert":
        sizes |= {"num_hidden_layers": BLOCKS, "max_position_embeddings": 16}
    if kind == "vit":
        del sizes["max_position_embeddings"]
    return AutoConfig.for_model(kind, attn_implementation="eager", **sizes)


def values(name, shape):
    """Numbers that follow from a name: no generator, so the same everywhere."""
    n = 1
    for size in shape:
        n *= size
    start = zlib.crc32(name.encode()) % 1000
    wave = 0.4 * torch.sin(torch.arange(n, dtype=torch.float64) * 0.7 + start)
    return (wave + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0)).reshape(shape).float()


def inputs_of(kind):
    if kind == "vit":
        return {"pixel_values": values("pixels", (1, 3, 4, 4))}
    return {"input_ids": torch.tensor([[1, 5, 7, 3, 2]])}


def fill(bottleneck, block, place):
    """Weights of one bottleneck, given its two linear layers (down, up), its block and its place."""
    with torch.no_grad():
        for part, linear in zip(("down", "up"), bottleneck, strict=True):
            for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
                tensor.copy_(values(f"{block}.{place}.{part}.{kind}", tuple(tensor.shape)) * 0.5)


def reference(kind, adapter):
    import adapters
    from adapters import AdapterConfig
    from transformers import AutoModel

    model = AutoModel.from_config(config_of(kind)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.load_state_dict({name: values(name, shape) for name, shape in shapes.items()}, strict=False)
    adapters.init(model)
    model.add_adapter("x", config=AdapterConfig.load(KINDS[adapter], reduction_factor=8 / BOTTLENECK))
    model.set_active_adapters("x")
    count = 0
    for block, places in model.get_adapter("x").items():
        for place, module in places.items():
            fill((module.adapter_down[0], module.adapter_up), block, place)
            count += sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        hidden = model(**inputs_of(kind)).last_hidden_state
    return {"hidden": hidden[0].double().tolist(), "parameters": count, "shapes": shapes}


if __name__ == "__main__":
    import adapters
    import transformers

    found = {kind: {adapter: reference(kind, adapter) for adapter in KINDS} for kind in CONFIGS}
    for of_kind in found.values():
        of_kind["shapes"] = of_kind["houlsby"].pop("shapes")
        del of_kind["pfeiffer"]["shapes"]
        for adapter in KINDS:
            of_kind[adapter]["hidden"] = [[round(x, 7) for x in row] for row in of_kind[adapter]["hidden"]]
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    sys.stdout.write(json.dumps({"versions": versions, "models": found}) + "\n")
