"""Every method: starts as its base, trains what it counts, comes back from disk bit for bit; and its equation."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from specbasis.core.errors import InputError  # noqa: E402
from specbasis.finetuning.methods import METHODS, attach, load, match_budget, parameters  # noqa: E402
from specbasis.finetuning.methods.kit import CHILD, additions  # noqa: E402
from specbasis.finetuning.methods.sites import sites  # noqa: E402
from specbasis.finetuning.methods.svft import PATTERNS, SVFT, compressed, sparse_mix  # noqa: E402

EPS = torch.finfo(torch.float32).eps
WIDTH, BLOCKS = 16, 3
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
ROUNDED = {"pissa", "dora"}  # methods whose start is the base up to rounding, as their notes say


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on configurations
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pico DeBERTa-v2 without task head: classifier and pooler are new in every classifier loaded from it."""
    path = tmp_path_factory.mktemp("base")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=20, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=16, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], share_att_key=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    transformers.DebertaV2Model(config).save_pretrained(path)
    return path


LOADED: dict = {}


def base(folder):
    """The classifier as `from_pretrained` gives it: read once, then copied, marks of loaded parameters included."""
    if folder not in LOADED:
        torch.manual_seed(1)  # the new head
        kind = transformers.AutoModelForSequenceClassification
        LOADED[folder] = kind.from_pretrained(folder, num_labels=3).eval()
    model = copy.deepcopy(LOADED[folder])
    for copied, read in zip(model.parameters(), LOADED[folder].parameters(), strict=True):
        copied._is_hf_initialized = getattr(read, "_is_hf_initialized", False)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def method_on(folder, name, model=None, **options):
    checkpoint = folder if name == "spectral-scratch" else None
    return attach(base(folder) if model is None else model, name, checkpoint=checkpoint, **options)


def move(model, seed=0, std=0.1):
    """Give everything in training other values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * std)


LIVES = [name for name in METHODS if name not in ("spectral-middle", "spectral-tail", "spectral-scratch")]


@pytest.mark.parametrize("name", LIVES)  # those left out differ from "spectral" by their frozen vectors alone
def test_a_method_from_attaching_to_loading(folder, tmp_path, name):
    plain = base(folder)
    start, size = logits(plain), sum(p.numel() for p in plain.parameters())
    attached = method_on(folder, name)
    model = attached.model.eval()

    # It starts as its base.
    if name in ROUNDED:
        torch.testing.assert_close(logits(model), start, rtol=0, atol=64 * EPS * float(start.abs().max() + 1))
    else:
        assert torch.equal(logits(model), start)

    # It trains what it counts: its own parameters, the head, the pooler that the checkpoint lacks.
    counts = attached.counts
    assert counts.head == (WIDTH * WIDTH + WIDTH) + (3 * WIDTH + 3)
    assert counts.adapter + counts.head == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.total == size + (counts.adapter if METHODS[name].adds else 0)
    if name != "adalora":  # which is counted with the rank that remains
        assert counts.adapter == parameters(name, base(folder))

    # Gradients reach all of it, and nothing else.
    move(model)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    for key, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, key
        assert p.grad is None or p.ndim < 2 or bool(p.grad.any()), key
    model.zero_grad(set_to_none=True)

    # It can be copied, and used in bfloat16 autocast.
    trained = logits(model)
    assert not torch.equal(trained, start)
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(input_ids=IDS, labels=torch.tensor([0, 2]))
    half.loss.backward()
    torch.testing.assert_close(half.logits.float(), trained, rtol=0.1, atol=0.1)

    # It comes back from disk, bit for bit, and merges where it is linear.
    attached.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", base(folder))
    assert torch.equal(logits(loaded.model.eval()), trained)
    assert (loaded.counts, loaded.method) == (counts, attached.method)
    if name in ("houlsby", "pfeiffer"):
        with pytest.raises(InputError, match="no linear update"):
            loaded.merged()
        return
    merged = loaded.merged()
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in plain.named_parameters()}
    torch.testing.assert_close(logits(merged.eval()), trained, rtol=0, atol=256 * EPS)


# The equations, transcribed.


def dense(W, U, S, Vh, name, p, r):
    """W' of a method in float64, from the values p of its parameters; U, S, Vh of LAPACK."""
    if name in ("lora", "lora-gaussian"):
        return W + 2 * p["lora_B"] @ p["lora_A"]
    if name == "pissa":
        return W - (U[:, :r] * S[:r]) @ Vh[:r] + p["lora_B"] @ p["lora_A"]
    if name == "dora":
        moved = W + 2 * p["lora_B"] @ p["lora_A"]
        return p["lora_magnitude_vector"][:, None] * moved / moved.norm(dim=1, keepdim=True)
    if name == "adalora":
        start = -(-3 * r // 2)  # PEFT divides by the starting rank
        return W + 2 * r / start * p["lora_B"] @ (p["lora_E"] * p["lora_A"])
    if name in ("lora-xs", "psoft"):
        R = p["spectral_M"] if name == "lora-xs" else p["psoft_R"] - torch.eye(r)
        if name == "psoft":  # in the signs of LAPACK's single precision, as PEFT takes them
            U, _, Vh = (factor.double() for factor in torch.linalg.svd(W.float(), full_matrices=False))
        return W + U[:, :r] @ torch.diag(S[:r]) @ R @ Vh[:r]
    if name == "spectral":
        return W + U[:, :r] @ p["spectral_M"] @ Vh[:r]
    if name == "speclora":
        d = torch.zeros_like(S)
        d[: len(p["d"])] = p["d"]
        return U @ torch.diag((1 + d) * S) @ Vh + 2 * p["B"] @ p["A"]
    n = len(S)
    M = torch.zeros(n, n, dtype=torch.float64)
    for i, j, m in zip(p["rows"].long().tolist(), p["columns"].long().tolist(), p["M"], strict=True):
        M[i, j] += m
    return U @ (torch.diag(S) + M) @ Vh


EQUATIONS = [name for name, method in METHODS.items() if method.adds and name not in ("houlsby", "pfeiffer")]
EQUATIONS = [name for name in EQUATIONS if not name.startswith("spectral-")]  # those differ by basis alone


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_method_computes_its_equation(folder, name):
    rank = None if name == "svft" else 3
    model = base(folder)
    site = sites(model, ["ffn.up"], [-1])[0]
    W = model.get_submodule(site.name).weight.detach().double()
    bias = model.get_submodule(site.name).bias.detach().double()
    attached = attach(model, name, rank=rank, target_modules=[site.name])
    move(attached.model)
    layer = next(m for key, m in attached.model.named_modules() if key.endswith(site.name))
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    words = ("default", "weight", CHILD)
    values = {".".join(w for w in key.split(".") if w not in words): t.detach().double() for key, t in held.items()}
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # the project's sign rule
    U, Vh = U * sign, Vh * sign.mT
    expected = dense(W, U, S, Vh, name, values, rank)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = layer(x).double()
    scale = float(expected.norm() * x.norm() + bias.norm())
    torch.testing.assert_close(y, x.double() @ expected.mT + bias, rtol=0, atol=16 * EPS * scale)


def test_lora_xs_is_the_spectral_method_in_units_of_singular_values_and_psoft_with_a_free_core(folder):
    spectral, xs, psoft = (
        attach(base(folder), "spectral", interval=(0, 4), options={"scale": "sigma"}).model.eval(),
        attach(base(folder), "lora-xs", rank=4).model.eval(),
        attach(base(folder), "psoft", rank=4).model.eval(),
    )
    R = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    others = [m for m in psoft.modules() if hasattr(m, "psoft_R")]
    for ours, theirs in zip(cores(spectral), others, strict=True):
        ours.spectral_M["default"].data.copy_(R)
        # PEFT's vectors have the signs of its own decomposition
        sign = (theirs._psoft_A_cache["default"] * ours.spectral_Vh["default"]).sum(1).sign()
        theirs.psoft_R["default"].weight.data.copy_(torch.eye(4) + sign[:, None] * R * sign)
    for layer in cores(xs):
        layer.spectral_M["default"].data.copy_(R)
    found = logits(spectral)
    assert torch.equal(found, logits(xs))
    assert (found - logits(base(folder))).abs().max() > 0.01
    torch.testing.assert_close(found, logits(psoft), rtol=0, atol=64 * EPS)


def test_sparse_mixing_and_its_gradients_are_those_of_the_dense_matrix():
    g = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.tensor([0, 0, 1, 3, 3, 3]),
        torch.tensor([2, 3, 1, 0, 2, 3]),
    )  # one row and one column empty
    crow, order, ccol, by_column = compressed(rows, columns, 5)
    index = (crow, columns, order, ccol, by_column)
    z = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    m = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    M = torch.zeros(5, 5, dtype=torch.float64).index_put((rows, columns), m.detach())
    torch.testing.assert_close(sparse_mix(z, m, *index).detach(), z.detach() @ M.mT)
    assert torch.autograd.gradcheck(lambda z, m: sparse_mix(z, m, *index), (z, m))


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_patterns_of_svft(shape):
    layer = nn.Linear(shape[1], shape[0])
    n = min(shape)
    found = {pattern: SVFT(layer, pattern, 2, "layer") for pattern in PATTERNS}
    for pattern, update in found.items():
        at = set(zip(update.rows.tolist(), update.columns.tolist(), strict=True))
        assert len(at) == len(update.M) == (n if pattern == "plain" else n * 5 - 6)
        if pattern in ("plain", "banded"):
            band = 0 if pattern == "plain" else 2
            assert at == {(i, j) for i in range(n) for j in range(n) if abs(i - j) <= band}
    U, Vh = (found["top-k"].frozen[key] for key in ("U", "Vh"))
    product = (Vh @ U).mT if shape[0] == shape[1] else U if shape[0] == n else Vh
    chosen = torch.zeros(n, n, dtype=torch.bool)
    chosen[found["top-k"].rows, found["top-k"].columns] = True
    assert product.abs()[chosen].min() >= product.abs()[~chosen].max()


# Controls, placement, seeds.


def cores(model):
    return [m for m in model.modules() if hasattr(m, "spectral_M")]


def test_controls_differ_in_interval_or_basis(folder):
    by_name = {name: cores(method_on(folder, name, rank=4).model)[0] for name in METHODS if "spectral" in name}
    n = WIDTH
    intervals = {name: layer.adapters["default"].interval for name, layer in by_name.items()}
    assert intervals["spectral-tail"] == (n - 4, n)
    assert intervals["spectral-middle"] == ((n - 4) // 2, (n - 4) // 2 + 4)
    assert intervals["spectral"] == intervals["spectral-shuffled"] == (0, 4)
    factors = {
        name: (m.spectral_U["default"].double(), m.spectral_Vh["default"].double()) for name, m in by_name.items()
    }
    W = by_name["spectral"].weight_matrix().double()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    for name, (u, vh) in factors.items():
        for frame in (u, vh.mT):
            torch.testing.assert_close(frame.mT @ frame, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
        left, right = (U.mT @ u).abs(), (Vh @ vh.mT).abs()
        if name == "spectral-random":
            assert left.max() < 0.95
            assert right.max() < 0.95
        if name == "spectral-shuffled":  # every vector is a singular vector; the right ones are the leading four
            assert torch.allclose(left.max(0).values, torch.ones(4, dtype=torch.float64), atol=1e-5)
            assert right.argmax(0).tolist() == [0, 1, 2, 3] != left.argmax(0).tolist()
    torch.testing.assert_close(factors["spectral-scratch"], factors["spectral"])  # here it is the base itself


@pytest.mark.parametrize("name", ["lora", "lora-gaussian", "adalora", "houlsby", "svft-random", "spectral-random"])
def test_the_seed_decides_and_nothing_else_is_touched(folder, name):
    before = torch.random.get_rng_state()
    drawn = [method_on(folder, name, base(folder), seed=seed).model.state_dict() for seed in (7, 7, 8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    assert any(not torch.equal(drawn[0][key], drawn[2][key]) for key in drawn[0])


def pico(kind, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16} | sizes
    config = transformers.AutoConfig.for_model(kind, **sizes)
    image = "image_size" in sizes
    auto = (
        transformers.AutoModelForImageClassification if image else transformers.AutoModelForSequenceClassification
    )
    model = auto.from_config(config).eval()
    return model, {"pixel_values": torch.rand(2, 3, 4, 4)} if image else {"input_ids": IDS[:, :4]}


ARCHITECTURES = {
    "bert": {"vocab_size": 20},
    "roberta": {"vocab_size": 20, "max_position_embeddings": 20},
    "electra": {"vocab_size": 20, "embedding_size": 8},
    "distilbert": {"vocab_size": 20, "dim": 8, "hidden_dim": 16, "n_heads": 2, "n_layers": 2},
    "vit": {"image_size": 4, "patch_size": 2},
    "llama": {"vocab_size": 20, "num_key_value_heads": 1, "pad_token_id": 0},
    "gpt2": {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 16, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures(kind):
    """Placement by role finds the modules; a method of each builder starts as the base and trains."""
    sizes = ARCHITECTURES[kind]
    model, inputs = pico(kind, **sizes)
    with torch.no_grad():
        start = model(**inputs).logits
    for name in ("spectral", "houlsby", "pfeiffer", "svft-banded"):
        attached = attach(pico(kind, **sizes)[0], name, rank=2)
        found = attached.model.eval()(**inputs).logits
        assert torch.equal(found, start), name
        blocks = {site.block for site in attached.request.sites}
        assert blocks == {0, 1}
        found.sum().backward()
        assert attached.counts.adapter == parameters(name, pico(kind, **sizes)[0], rank=2), name


def test_placement_by_role_and_block(folder):
    model = base(folder)
    assert [(s.block, s.roles) for s in sites(model, ["ffn.down"], [-1])] == [(BLOCKS - 1, ("ffn.down",))]
    assert len(sites(model, ["attention.query", "ffn.up"])) == 2 * BLOCKS
    own = attach(base(folder), "spectral", rank=2).request.sites
    assert {site.block for site in own} == {1, 2}
    assert {r for s in own for r in s.roles} == {"ffn.up", "ffn.down"}
    everywhere = attach(base(folder), "lora").request.sites
    assert len(everywhere) == 6 * BLOCKS
    assert attach(base(folder), "full", roles=["ffn.up"], blocks=[0]).counts.adapter == 2 * WIDTH * (WIDTH + 1)
    assert attach(base(folder), "bitfit", blocks=[0]).counts.adapter == 4 * WIDTH + 2 * WIDTH + WIDTH
    assert {s.roles for s in attach(base(folder), "houlsby", roles=["ffn.up", "ffn.down"]).request.sites} == {
        ("ffn.down",)
    }
    fused, _ = pico("gpt2", **ARCHITECTURES["gpt2"])
    with pytest.raises(InputError, match=r"holds attention\.query, attention\.key, attention\.value"):
        sites(fused, ["attention.query"])


# Budgets.


def test_budgets_of_the_paper_on_the_shapes_of_deberta_v3_base():
    """Yu et al. 2026, Tab. 1: 0.36 M, LoRA 1.33 M at rank 8, BitFit 0.1 M, 184 M in all."""
    config = transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=512, type_vocab_size=0, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(config)
    assert parameters("spectral", model) == parameters("spectral", model, rank=300) == 4 * 300**2
    assert parameters("lora", model) == 1_327_104
    assert parameters("bitfit", model) == 102_912
    assert round(parameters("full", model) / 1e6) == 184
    assert (parameters("houlsby", model), parameters("pfeiffer", model)) == (1_198_848, 1_189_632)
    matched = match_budget(model)
    for name in ("lora", "dora", "pfeiffer", "svft-banded", "speclora"):
        size = matched[name]
        assert size.parameters == parameters(name, model, rank=size.rank)
        steps = [parameters(name, model, rank=size.rank + step) for step in (-1, 1) if size.rank + step > 0]
        assert all(abs(size.parameters - 360_000) <= abs(other - 360_000) for other in steps)
    assert matched["lora"].rank == 2
    assert matched["lora-xs"].rank == 300
    assert matched["pfeiffer"].rank == 19
    near = match_budget(model, methods=["lora"], roles=["ffn.up", "ffn.down"], blocks=[-2, -1])["lora"]
    assert near.rank == 23
    assert near.parameters == 23 * 4 * 3840
    attached = attach(model, "spectral")  # on shapes alone
    assert attached.counts.adapter == 360_000
    assert attached.counts.head == 768 * 768 + 768 + 2 * 768 + 2


def test_the_page_on_methods_names_them_all():
    page = (Path(__file__).parents[3] / "docs/methods.md").read_text()
    missing = [
        name for name in METHODS if f"`{name}`" not in page and f"`{name.removeprefix('spectral')}`" not in page
    ]
    assert missing == []


# Training with transformers' Trainer.


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 20, (5,), generator=g)
        return {"input_ids": ids, "labels": int(ids[0]) % 3}


def trained(attached, folder, steps):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        attached.model, arguments, train_dataset=Examples(), callbacks=list(attached.callbacks)
    )
    trainer.train()
    return attached


@pytest.mark.parametrize("name", ["spectral", "svft-random", "pfeiffer"])
def test_the_trainer_trains_a_method(folder, tmp_path, name):
    attached = method_on(folder, name)
    before = {key: p.detach().clone() for key, p in attached.model.named_parameters()}
    trained(attached, tmp_path, 3)
    changed = {key for key, p in attached.model.named_parameters() if not torch.equal(p.detach(), before[key])}
    assert changed == {key for key, p in attached.model.named_parameters() if p.requires_grad}


def test_adalora_prunes_to_its_budget_and_comes_back(folder, tmp_path):
    attached = method_on(folder, "adalora", rank=2)
    trained(attached, tmp_path, 12)
    model = attached.model.eval()
    kept = [int((p != 0).sum()) for key, p in model.named_parameters() if "lora_E" in key]
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1
    expected = logits(model)
    attached.save(tmp_path / "saved")
    found = logits(load(tmp_path / "saved", base(folder)).model.eval())
    # Pruned triplets are dropped from the file: the same sums, with other terms skipped.
    torch.testing.assert_close(found, expected, rtol=0, atol=32 * EPS)


# Bad input.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lola", {}, "want one of spectral, lora-xs"),
        ("lora", {"rank": 0}, "want rank >= 1"),
        ("bitfit", {"rank": 3}, "no size"),
        ("lora", {"interval": (0, 3)}, "takes rank only"),
        ("spectral", {"interval": (0, 3), "rank": 3}, "one of the two"),
        ("spectral", {"rank": WIDTH + 1}, f"has {WIDTH} singular values"),
        ("spectral", {"interval": (3, 3)}, "want 0 <= k < m"),
        ("svft-banded", {"rank": WIDTH}, f"want 0 … {WIDTH - 1}"),
        ("lora", {"roles": ["ffn.sideways"]}, "want some of attention.query"),
        ("lora", {"roles": ["ffn.gate"]}, "known roles are"),
        ("lora", {"blocks": [BLOCKS]}, f"want some of −{BLOCKS} … {BLOCKS - 1}"),
        ("lora", {"target_modules": ["nowhere"]}, "no module with a matrix"),
        ("lora", {"target_modules": ["dense"], "blocks": [0]}, "one of the two"),
        ("lora", {"options": {"alpha": 3}}, "no option 'alpha'"),
        ("svft", {"options": {"lora_alpha": 3}}, "no option 'lora_alpha'"),
        ("spectral", {"options": {"basis": "fourier"}}, "got basis"),
        ("spectral", {"checkpoint": "somewhere"}, "leave checkpoint out"),
        ("spectral-scratch", {}, "want the checkpoint of a model"),
        ("houlsby", {"roles": ["ffn.up"]}, "adapts attention.output and ffn.down only"),
        ("houlsby", {"options": {"activation": "step"}}, "want a name that transformers knows"),
    ],
)
def test_bad_arguments_get_one_clear_line(folder, name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        attach(base(folder), name, **options)
    assert "\n" not in str(caught.value)


def test_bad_folders_get_one_clear_line(folder, tmp_path):
    with pytest.raises(InputError, match=r"no method\.json"):
        load(tmp_path, base(folder))
    attached = method_on(folder, "svft")
    move(attached.model)
    attached.save(tmp_path / "a")
    other = base(folder)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.01 * torch.randn_like(p))
    with pytest.raises(InputError, match="the base weight is another one"):
        load(tmp_path / "a", copy.deepcopy(other))
    method_on(folder, "lora").save(tmp_path / "lora")
    with pytest.warns(UserWarning, match="does not hold the weights that lora was trained on"):
        load(tmp_path / "lora", other)
    narrow, _ = pico("deberta-v2", vocab_size=20)
    with pytest.raises(InputError, match=r"no module with a matrix|does not fit this base"):
        load(tmp_path / "lora", narrow)
    (tmp_path / "lora/adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="the folder is incomplete"):
        load(tmp_path / "lora", base(folder))
    with pytest.raises(InputError, match="has adapters already"):
        attach(method_on(folder, "lora").model, "lora")
    with pytest.raises(InputError, match="has adapters already"):
        attach(method_on(folder, "svft").model, "lora")
    described = json.loads((tmp_path / "a/method.json").read_text())
    (tmp_path / "a/method.json").write_text(json.dumps({**described, "format": 2}))
    with pytest.raises(InputError, match="want format 1"):
        load(tmp_path / "a", base(folder))
    (tmp_path / "a/method.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "a", base(folder))


def test_a_signed_basis_is_found_again_by_its_sketch(folder, tmp_path):
    """Where the decomposition returns other joint signs, loading turns them back: M belongs to the trained ones."""
    attached = method_on(folder, "svft-banded")
    for update in additions(attached.model).values():  # as if another driver had returned these vectors
        sign = torch.ones(len(update.M.new_zeros(len(update.frozen["S"]))))
        sign[::2] = -1
        update.frozen["U"].mul_(sign)
        update.frozen["Vh"].mul_(sign[:, None])
        update.proof["U"].mul_(sign[:, None])
        update.proof["V"].mul_(sign[:, None])
    move(attached.model)
    attached.save(tmp_path)
    assert torch.equal(logits(load(tmp_path, base(folder)).model.eval()), logits(attached.model.eval()))


# Where to change: a method is one file.

NEW_METHOD = """
import torch
from torch import nn
from specbasis.finetuning.methods.kit import AddedMethod, Added, register

class Shift(Added):
    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def join(self, layer, x, output):
        return output + self.shift

class Shifts(AddedMethod):
    def added(self, layer, site, request):
        return Shift(site.shape[0])

register(Shifts(name="shift", title="Shift", trains="a vector added to each output", source="this test"))
"""


def test_a_method_is_one_file(folder, tmp_path, monkeypatch):
    """Dropped beside the others it is attached, counted, sized, saved and loaded; nothing else changes."""
    import sys

    from specbasis.finetuning import methods
    from specbasis.finetuning.methods import kit

    (tmp_path / "shift.py").write_text(NEW_METHOD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        methods.import_methods()
        attached = attach(base(folder), "shift")
        per_block = 4 * WIDTH + 2 * WIDTH + WIDTH
        assert attached.counts.adapter == parameters("shift", base(folder)) == BLOCKS * per_block
        assert match_budget(base(folder), 100, ["shift"])["shift"].rank is None
        move(attached.model)
        trained = logits(attached.model.eval())
        attached.save(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved", base(folder)).model.eval()), trained)
        assert METHODS["shift"].recipe("sst2") == (10, 5e-4)
        with pytest.raises(InputError, match=r"want one of .*, shift"):
            attach(base(folder), "shaft")
    finally:
        kit._METHODS.pop("shift", None)
        sys.modules.pop("specbasis.finetuning.methods.shift", None)
