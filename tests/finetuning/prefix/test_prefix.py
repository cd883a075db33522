"""The frozen-prefix cache: the model with a cached prefix is the model, and no wrong row is ever used."""

import errno
import os
import pickle
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn

from specbasis.adapter import SpectralConfig
from specbasis.core.errors import InputError
from specbasis.finetuning.methods import attach
from specbasis.finetuning.prefix import (
    Cut,
    NoPrefixError,
    PrefixCache,
    Uncut,
    cut as cutting,
    find_cut,
    narrowed,
    store,
)
from specbasis.finetuning.prefix.probe import record

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VIT = {**SMALL, "image_size": 16, "patch_size": 4}
BERT_FFN = r"layer\.2\.(intermediate|output)\.dense"
LLAMA_FFN = r"layers\.2\.mlp\.(gate|up|down)_proj"

# Model → configuration, class, the trained feed-forward layer, and what the cut keeps.
FAMILIES = {
    "bert": (transformers.BertConfig(**SMALL), "ForSequenceClassification", BERT_FFN, ["layer.2.attention"]),
    "roberta": (transformers.RobertaConfig(**SMALL), "ForSequenceClassification", BERT_FFN, ["layer.2.attention"]),
    "deberta_v2": (
        transformers.DebertaV2Config(**SMALL, **DEBERTA),
        "ForSequenceClassification",
        BERT_FFN,
        ["layer.2.attention"],
    ),
    "deberta_v2_tokens": (
        transformers.DebertaV2Config(**SMALL, **DEBERTA, conv_kernel_size=3),
        "ForTokenClassification",
        BERT_FFN,
        ["layer.2.attention"],
    ),
    "electra": (
        transformers.ElectraConfig(**SMALL, embedding_size=16),
        "ForSequenceClassification",
        BERT_FFN,
        ["layer.2.attention"],
    ),
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=60, dim=32, n_layers=3, n_heads=2, hidden_dim=48, max_position_embeddings=40
        ),
        "ForSequenceClassification",
        r"layer\.2\.ffn\.lin\d",
        ["layer.1", "layer.2.attention"],
    ),
    "vit": (
        transformers.ViTConfig(**VIT),
        "ForImageClassification",
        r"layers\.2\.mlp\.fc\d",
        ["layers.1", "layers.2.attention"],
    ),
    "llama": (
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0),
        "ForCausalLM",
        LLAMA_FFN,
        ["layers.1", "layers.2.self_attn"],
    ),
    "llama_classifier": (
        transformers.LlamaConfig(**SMALL, pad_token_id=0),
        "ForSequenceClassification",
        LLAMA_FFN,
        ["layers.1", "layers.2.self_attn"],
    ),
}


def make(family="bert", *, train=True):
    config, kind, pattern, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, type(config).__name__.removesuffix("Config") + kind)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if train and (re.search(pattern + "$", name) or name in ("classifier", "score")):
            module.requires_grad_(True)
    return model.eval()


def examples(family="bert", count=7, seed=1):
    """Token lists of unequal length, or images, with labels; the last repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    kind = FAMILIES[family][1]
    if "Image" in kind:
        found = [
            {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2} for i in range(count)
        ]
    else:
        lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
        ids = [torch.randint(5, 60, (n,), generator=generator) for n in lengths]
        by_token = 2 if "Token" in kind else 60 if "LM" in kind else 0
        found = [{"input_ids": row, "labels": row % by_token if by_token else i % 2} for i, row in enumerate(ids)]
    return [*found[:-1], dict(found[0])]


def collate(items, *, left=False):
    if "pixel_values" in items[0]:
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }
    n = max(len(item["input_ids"]) for item in items)

    def pad(row, value):
        return nn.functional.pad(row, (n - len(row), 0) if left else (0, n - len(row)), value=value)

    labels = [item["labels"] for item in items]
    by_token = isinstance(labels[0], torch.Tensor)
    return {
        "input_ids": torch.stack([pad(item["input_ids"], 0) for item in items]),
        "attention_mask": torch.stack([pad(torch.ones_like(item["input_ids"]), 0) for item in items]),
        "labels": torch.stack([pad(row, -100) for row in labels]) if by_token else torch.tensor(labels),
    }


def collate_left(items):
    return collate(items, left=True)


def gradients(model, batch):
    """Logits at real positions, and the gradients of the loss."""
    result = model(**batch)
    grads = torch.autograd.grad(result.loss, [p for p in model.parameters() if p.requires_grad])
    logits = result.logits.detach()
    mask = batch.get("attention_mask")
    return (logits[mask.bool()] if mask is not None and logits.dim() == 3 else logits), grads


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def built(model, folder, family="bert", **options):
    cut = find_cut(model)
    assert isinstance(cut, Cut), cut
    return PrefixCache.build(model, cut, examples(family), collate, folder, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_prefix_gives_the_models_logits_and_gradients(family, tmp_path):
    model = make(family)
    cache = built(model, tmp_path, family)
    want = gradients(model, collate(examples(family)))
    batch = cache.collator(collate)(examples(family))
    with cache.suffix(model):
        got = gradients(model, batch)
        plain = gradients(model, collate(examples(family)))
        calls, _ = record(model, batch)
        spoiled = gradients(model, {**batch, "prefix_value_0": batch["prefix_value_0"].flip(-1)})
    ran = {call.module for call in calls}
    for found in (got, plain):
        assert close(found[0], want[0])
        assert all(close(a, b) for a, b in zip(found[1], want[1], strict=True))
    assert not close(spoiled[0], want[0])
    assert not any(re.search(r"layers?\.[01]\.\w+", name) for name in ran)
    assert not any(re.search(r"layers?\.2\.(attention|self_attn)\.", name) for name in ran)
    (kept,) = cache.cut.kept
    assert [re.sub(r"^.*?(?=layers?\.\d)", "", site.module) for site in kept.sites] == FAMILIES[family][3]
    assert len(cache) == 6
    for a, b in zip(want[1], gradients(model, collate(examples(family)))[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("trained", "before", "kept"),
    [
        (r"layer\.2\.output\.dense", "layer.2.intermediate", "layer.2.attention"),
        (r"layer\.2\.attention\.self\.value", "layer.2", "layer.1"),
        (r"layer\.1\.attention\.output\.LayerNorm", "layer.1.attention.output.dropout", "layer.0"),
        (r"pooler\.dense", "pooler", "encoder"),
        (r"^classifier", "dropout", "bert"),
    ],
)
def test_the_cut_lies_where_least_is_kept_before_the_first_trained_module(trained, before, kept, tmp_path):
    model = make(train=False)
    for name, module in model.named_modules():
        if re.search(trained + "$", name):
            module.requires_grad_(True)
    cache = built(model, tmp_path)
    assert cache.cut.before.endswith(before)
    assert cache.cut.kept[0].sites[0].module.endswith(kept)
    want = gradients(model, collate(examples()))
    with cache.suffix(model):
        got = gradients(model, cache.collator(collate)(examples()))
    assert close(got[0], want[0])
    assert all(close(a, b) for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize(
    "config",
    [
        SpectralConfig(rank=8, target_modules=f".*{BERT_FFN}", modules_to_save=["classifier"]),
        peft.LoraConfig(r=2, target_modules=f".*{BERT_FFN}", use_dora=True, init_lora_weights=False),
        peft.LoraConfig(
            r=2, target_modules=r".*layer\.2\..*(query|value)", lora_dropout=0.3, init_lora_weights=False
        ),
    ],
    ids=["spectral", "dora", "lora-attention"],
)
def test_adapters_of_peft_train_on_a_cached_prefix(config, tmp_path):
    bare = find_cut(make())
    model = peft.get_peft_model(make(train=False), config).eval()
    for name, parameter in model.named_parameters():
        if "spectral_M" in name:
            nn.init.normal_(parameter, std=0.1)
    names = list(model.state_dict())
    cache = built(model, tmp_path)
    want = gradients(model, collate(examples()))
    with cache.suffix(model):
        got = gradients(model, cache.collator(collate)(examples()))
        assert list(model.state_dict()) == names
    assert close(got[0], want[0])
    assert all(close(a, b, 1e-4) for a, b in zip(got[1], want[1], strict=True))
    if BERT_FFN in config.target_modules:  # the same prefix: methods share its rows
        assert cache.cut.digest == bare.digest


@pytest.mark.parametrize(
    "method",
    ["svft", "svft-banded", "svft-random", "svft-top-k", "speclora", "lora-xs", "psoft", "houlsby", "pfeiffer"],
)
def test_methods_of_the_laboratory_train_on_a_cached_prefix(method, tmp_path):
    roles = ["ffn.up", "ffn.down"] if method != "pfeiffer" else ["ffn.down"]
    model = attach(make(train=False), method, roles=roles, blocks=[2]).model.eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:  # they start at zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    cache = built(model, tmp_path)
    want = gradients(model, collate(examples()))
    batch = cache.collator(collate)(examples())
    with cache.suffix(model):
        got = gradients(model, batch)
        calls, _ = record(model, batch)
    assert close(got[0], want[0])
    assert all(close(a, b, 1e-4) for a, b in zip(got[1], want[1], strict=True))
    assert not close(got[0], gradients(make(), collate(examples()))[0])  # the method does something
    assert not any(re.search(r"layer\.[01]\.\w+", call.module) for call in calls)


def test_trainer_trains_saves_and_evaluates_on_a_cached_prefix(tmp_path):
    def train(cached):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            make(train=False),
            SpectralConfig(rank=8, target_modules=f".*{BERT_FFN}", modules_to_save=["classifier"]),
        )
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        cache = built(model, tmp_path / "cache")
        arguments = transformers.TrainingArguments(
            str(tmp_path / f"out-{cached}"),
            per_device_train_batch_size=3,
            num_train_epochs=2,
            eval_strategy="epoch",
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=True,
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            data_collator=cache.collator(collate) if cached else collate,
            train_dataset=examples(),
            eval_dataset=examples(),
        )
        if cached:
            with cache.suffix(model):
                trainer.train()
                trainer.save_model()
        else:
            trainer.train()
            trainer.save_model()
        return model, trainer.state.log_history

    model, log = train(cached=True)
    _, log_other = train(cached=False)
    losses = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in (log, log_other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]
    saved = [(tmp_path / f"out-{cached}" / "adapter_model.safetensors") for cached in (True, False)]
    tensors = [peft.utils.load_peft_weights(str(path.parent)) for path in saved]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(close(tensors[0][name].float(), tensors[1][name].float(), 1e-3) for name in tensors[0])
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert getattr(module, "gradient_checkpointing", None) in (None, True)
    for a, b in zip(make(train=False).parameters(), model.get_base_model().bert.parameters(), strict=False):
        assert torch.equal(a, b)
        break


def test_the_prefixs_dropout_is_off_and_the_suffixs_is_on(tmp_path):
    model = make()
    cache = built(model, tmp_path)
    batch = cache.collator(collate)(examples())
    want = gradients(model, collate(examples()))[0]
    model.train()
    with cache.suffix(model):
        assert not close(gradients(model, batch)[0], want)
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0 if re.search(r"layer\.2\.output|^dropout$", name) else 0.9
        assert close(gradients(model, batch)[0], want)
    assert "off" in cache.manifest()["prefix_dropout"]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.requires_grad_(False), "no parameter of the model is trained"),
        (
            lambda m: m.bert.embeddings.requires_grad_(True),
            "embeddings.word_embeddings is trained, and 0% of the work",
        ),
        (lambda m: m.bert.embeddings.LayerNorm.requires_grad_(True), "too little to keep"),
        (
            lambda m: setattr(m, "forward", lambda **_: 1 / 0),
            "does not run on a batch of random inputs .ZeroDivision",
        ),
    ],
)
def test_a_model_without_a_frozen_prefix_is_told_why(prepare, reason):
    model = make()
    prepare(model)
    found = find_cut(model)
    assert isinstance(found, Uncut)
    assert re.search(reason, found.reason)


def test_shared_blocks_that_are_trained_cannot_be_cut():
    torch.manual_seed(0)
    model = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**SMALL, embedding_size=16))
    model.requires_grad_(False)
    model.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.requires_grad_(True)
    found = find_cut(model)
    assert isinstance(found, Uncut)
    assert "attention runs both before and after it" in found.reason


# --- the rows on disk ---------------------------------------------------------------------------------------------


class Count:
    """Counts the examples that pass through a model's first block."""

    def __init__(self, model):
        self.rows = 0
        model.bert.encoder.layer[0].register_forward_pre_hook(self)

    def __call__(self, _, args):
        self.rows += len(args[0])


def rebuilt(folder, monkeypatch, **options):
    """A second opening: how many rows it computed, and whether the values are right."""
    model = make()
    cut = find_cut(model)
    count = Count(model)
    monkeypatch.setattr(store, "check_apart", lambda *_: None)
    cache = PrefixCache.build(model, cut, examples(), collate, folder, **options)
    computed = count.rows
    with cache.suffix(model):
        got = gradients(model, cache.collator(collate)(examples()))[0]
    assert close(got, gradients(model, collate(examples()))[0])
    return computed


def test_a_stopped_run_goes_on_and_a_whole_cache_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 3)
    model = make()

    def stop(done, total):
        assert total == 7
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(model, tmp_path, progress=stop)
    assert rebuilt(tmp_path, monkeypatch) == 0  # the seventh example repeats the first
    more = PrefixCache.build(make(), find_cut(make()), [examples(), examples(seed=2)], collate, tmp_path)
    assert len(more) == 12
    assert rebuilt(tmp_path, monkeypatch) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "index", "lost", "grown", "other"])
def test_a_damaged_file_is_never_used(damage, tmp_path, monkeypatch):
    cache = built(make(), tmp_path)
    (rows,), (index,) = cache.folder.glob("*.rows"), cache.folder.glob("*.index")
    data, head = bytearray(rows.read_bytes()), bytearray(index.read_bytes())
    if damage == "flip":
        data[100] ^= 1
    elif damage == "cut":
        del data[-4:]
    elif damage == "grown":
        data += bytes(4)
    elif damage == "index":
        head[-3] ^= 1
    elif damage == "other":
        head = head.replace(cache.cut.digest.encode(), b"0" * 64)
    rows.write_bytes(data)
    index.write_bytes(head)
    if damage == "lost":
        rows.unlink()
    assert rebuilt(tmp_path, monkeypatch) == 6
    assert rebuilt(tmp_path, monkeypatch) == 0


def test_a_file_that_is_cut_off_while_it_is_used_is_one_line(tmp_path):
    cache = built(make(), tmp_path)
    batch = collate(examples()[:2])
    assert cache.values(batch)
    (rows,) = cache.folder.glob("*.rows")
    os.truncate(rows, 8)
    with pytest.raises(InputError, match=r"\.rows: was cut off while it was used"):
        cache.values(batch)
    rows.unlink()
    with pytest.raises(InputError, match=r"\.rows: cannot be read"):
        cache.values(batch)


def test_the_digest_follows_what_lies_below_the_cut_and_nothing_else():
    digest = find_cut(make()).digest
    above, below = ("classifier", "bert.encoder.layer.2.output"), ("bert.encoder.layer.0.output", "bert.embeddings")
    for change, same in [*((name, True) for name in above), *((name, False) for name in below)]:
        model = make()
        next(model.get_submodule(change).parameters()).data += 1e-3
        assert (find_cut(model).digest == digest) is same, change
    model = make()
    model.config.layer_norm_eps = 1e-3
    assert find_cut(model).digest != digest


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match=r"needs about 0 MB more for 7 examples, and 1 MB are free; want"):
        built(make(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_disk_that_fills_up_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 3)
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"the disk is full; what this run had written of the prefix cache is removed"
    ):
        built(make(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_examples_that_change_are_refused(tmp_path):
    model = make()
    cut = find_cut(model)

    class Augmented(list):
        def __getitem__(self, i):
            return {"input_ids": torch.randint(5, 60, (6,)), "labels": 0}

    def masked(items):
        batch = collate(items)
        batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 4, batch["input_ids"])
        return batch

    for data, collator in [(Augmented(examples()), collate), (examples(), masked)]:
        with pytest.raises(NoPrefixError, match=r"the same example twice|the same of an example each time"):
            PrefixCache.build(model, cut, data, collator, tmp_path)
    with pytest.raises(NoPrefixError, match="needs a dataset with a length"):
        PrefixCache.build(model, cut, iter(examples()), collate, tmp_path)
    with pytest.raises(NoPrefixError, match="depends on the rest of its batch"):
        PrefixCache.build(model, cut, examples(), collate_left, tmp_path)
    cache = PrefixCache.build(model, cut, examples(), collate, tmp_path)
    with pytest.raises(InputError, match="7 of 7 examples are not in the prefix cache"):
        cache.collator(collate)(examples(seed=3))
    with pytest.raises(InputError, match="want the model in which the cut was found"), cut.suffix(make("llama")):
        pass


def test_half_the_numbers_in_bfloat16(tmp_path):
    model = make()
    exact, rounded = built(model, tmp_path), built(model, tmp_path, dtype="bfloat16")
    assert rounded.size * 2 == exact.size
    with rounded.suffix(model):
        got = gradients(model, rounded.collator(collate)(examples()))[0]
    want = gradients(model, collate(examples()))[0]
    assert close(got, want, 0.05)
    assert not close(got, want)
    with pytest.raises(InputError, match="want 'float32' or 'bfloat16'"):
        built(model, tmp_path, dtype="int8")


def test_the_collator_goes_to_worker_processes(tmp_path):
    cache = built(make(), tmp_path)
    collator = pickle.loads(pickle.dumps(cache.collator(collate)))
    a, b = collator(examples()), cache.collator(collate)(examples())
    assert torch.equal(a["prefix_value_0"], b["prefix_value_0"])


def test_weights_below_the_cut_are_parked_and_come_back(tmp_path):
    model = make()
    cache = built(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with cache.suffix(model):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
        gradients(model, cache.collator(collate)(examples()))
        moved = {name for name, p in model.named_parameters() if p.data_ptr() != pointers[name]}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    frozen = r"embeddings\.|layer\.[01]\.|layer\.2\.attention\."
    assert moved == {name for name in pointers if re.search(frozen, name)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_attention_above_the_cut_keeps_no_scores_with_relative_positions(tmp_path, monkeypatch):
    model = make("deberta_v2", train=False)
    for name, module in model.named_modules():
        if re.search(r"layer\.1\.output\.dense$|^classifier$", name):
            module.requires_grad_(True)
    cache = built(model, tmp_path, "deberta_v2")
    want = gradients(model, collate(examples("deberta_v2")))
    batch = cache.collator(collate)(examples("deberta_v2"))

    def saved(context):
        """Shapes that are kept for the backward pass, and what comes out."""
        shapes = []

        def pack(tensor):
            shapes.append(tuple(tensor.shape))
            return tensor

        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return shapes, gradients(model, batch)

    length, positions = batch["input_ids"].shape[1], 2 * DEBERTA["position_buckets"]
    scores = (7 * SMALL["num_attention_heads"], length, positions)
    lean, got = saved(cache.suffix(model))
    monkeypatch.setattr(cutting, "LeanGather", nullcontext)
    plain, again = saved(cache.suffix(model))
    assert plain.count(scores) == lean.count(scores) + 2  # of content with position, and of position with content
    for found in (got, again):
        assert close(found[0], want[0])
        assert all(close(a, b) for a, b in zip(found[1], want[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got[1], again[1], strict=True))


# --- the first position -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "deberta_v2", "vit", "llama_classifier", "deberta_v2_tokens"])
def test_narrowed_models_work_on_the_first_position_only_where_no_other_is_read(family):
    model = make(family)
    batch = collate(examples(family))
    want = gradients(model, batch)
    with narrowed(model):
        got = gradients(model, batch)
        calls, _ = record(model, batch)
    assert close(got[0], want[0])
    assert all(close(a, b) for a, b in zip(got[1], want[1], strict=True))
    last = [c for c in calls if re.search(r"(intermediate\.dense|fc1|up_proj)$", c.module)][-1]
    width = {call.module: call.leaves[0].shape[1] for call in calls if call.leaves and call.leaves[0].dim() == 3}
    assert (width[last.module] == 1) is (family in ("bert", "deberta_v2", "vit"))
    assert not any(module._forward_hooks for module in model.modules())
