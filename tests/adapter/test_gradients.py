"""A basis from the loss gradient: closed forms, the head under it, the file, PEFT's conventions, refusals."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from specbasis.adapter import SpectralConfig, SpectralLinear, folder, initialize_gradient_basis  # noqa: E402
from specbasis.adapter.gradients import converged_head, summed_gradients  # noqa: E402
from specbasis.checkpoint import open_checkpoint, open_tuned  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import randomise  # noqa: E402

TARGETS = r".*layer\.[01]\.(intermediate|output)\.dense"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(place)
    return place


def classifier(base, labels=3):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)


def batches(labels=3, seed=0, sizes=(16, 16, 7)):
    """Batches of unequal size, whose label is in the first word; a number where there is one label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        ids = torch.randint(1, 40, (size, 9), generator=generator)
        y = ids[:, 1] % labels if labels > 1 else ids[:, 1] / 10
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y})
    return made


def adapted(base, *, labels=3, rank=4, seed=0, **options):
    config = SpectralConfig(rank=rank, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS", **options)
    model = get_peft_model(classifier(base, labels), config)
    return initialize_gradient_basis(model, batches(labels, seed)).eval()


class Softmax(nn.Module):
    """Logits W x of a linear model, whose gradient is known: (P − Y)ᵀ X."""

    def __init__(self, classes=5, features=8):
        super().__init__()
        torch.manual_seed(2)
        self.lin = nn.Linear(features, classes, bias=False)

    def forward(self, x):
        return self.lin(x)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"])


def points(count=40, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator), torch.randint(5, (count,), generator=generator)


def test_the_basis_of_a_linear_model_is_that_of_its_known_gradient():
    x, y = points()
    model = get_peft_model(Softmax(), SpectralConfig(interval=(1, 4), target_modules=["lin"], basis="gradient"))
    parts = [{"x": x[:32], "y": y[:32]}, {"x": x[32:], "y": y[32:]}]  # unequal: every example counts the same
    initialize_gradient_basis(model, iter(parts), forward_fn=cross_entropy)
    W = model.base_model.model.lin.base_layer.weight.detach()
    G = ((x @ W.mT).softmax(1) - functional.one_hot(y, 5)).double().mT @ x.double()
    U, _, Vh = torch.linalg.svd(G)
    layer = model.base_model.model.lin
    signs = U[:, 1:4].gather(0, U[:, 1:4].abs().argmax(0)[None]).sign()[0]
    assert torch.allclose(layer.spectral_U["default"].double(), U[:, 1:4] * signs, atol=1e-5)
    assert torch.allclose(layer.spectral_Vh["default"].double(), signs[:, None] * Vh[1:4], atol=1e-5)
    scale = torch.linalg.svdvals(W)[1:4]
    assert torch.allclose(layer.spectral_S["default"], scale, atol=1e-6), "the scale is that of the weight"


def test_a_gradient_with_fewer_directions_than_the_rank_is_refused_and_so_is_none():
    x, y = points()
    model = get_peft_model(Softmax(), SpectralConfig(rank=5, target_modules=["lin"], basis="gradient"))
    with pytest.raises(InputError, match=r"lin: its gradient .* has 4 directions, and interval \[0, 5\) wants 5"):
        initialize_gradient_basis(model, [{"x": x, "y": y}], forward_fn=cross_entropy)  # rows of P − Y sum to 0
    with pytest.raises(InputError, match="lin: its gradient over these examples is zero"):
        initialize_gradient_basis(model, [x], forward_fn=lambda model, x: (x * x).mean())
    with pytest.raises(InputError, match="lin: its gradient over these examples is zero"):
        initialize_gradient_basis(model, [x], forward_fn=lambda model, x: 0.0 * model(x).sum())
    with pytest.raises(InputError, match=r"gradient of lin"):
        initialize_gradient_basis(model, [x], forward_fn=lambda model, x: float("nan") * model(x).sum())


def test_gradients_are_those_of_autograd_for_every_layout_and_of_one_layer_where_a_weight_is_tied():
    torch.manual_seed(4)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    turned = transformers.pytorch_utils.Conv1D(7, 5)
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    x, image = torch.randn(9, 5), torch.randn(3, 4, 5, 5)
    before = first.weight

    def loss():
        return turned(second(first(x).tanh()).tanh()).square().sum() + conv(image).square().sum()

    modules = {"conv": conv, "turned": turned, "first": first, "second": second}
    found = summed_gradients(modules, (loss() for _ in range(2)))
    assert first.weight is second.weight is before, "tied as it was"
    assert all(p.grad is None for module in modules.values() for p in module.parameters())
    loss().backward()
    assert torch.allclose(found["conv"], 2 * conv.weight.grad, rtol=1e-5)
    assert torch.allclose(found["turned"], 2 * turned.weight.grad, rtol=1e-5)
    assert torch.allclose(found["first"] + found["second"], 2 * before.grad, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["first"], found["second"])
    half = nn.Linear(3, 3).to(torch.bfloat16)
    sums = summed_gradients({"half": half}, (half(torch.ones(1, 3).bfloat16()).sum() for _ in range(257)))
    assert float(sums["half"].max()) == 257, "bfloat16 alone would stop counting at 256"


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_the_gradient_is_taken_under_a_converged_head_and_the_model_is_left_as_it_was(base, labels):
    from sklearn.linear_model import LogisticRegression, Ridge

    data = batches(labels)
    model = get_peft_model(
        classifier(base, labels),
        SpectralConfig(rank=4, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS"),
    )
    model.train()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    initialize_gradient_basis(model, data)
    after = dict(model.named_parameters())
    assert all(
        torch.equal(after[n], t) and after[n].requires_grad == r for n, (t, r) in before.items() if n in after
    )
    assert before.keys() == after.keys()
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Linear))

    plain = classifier(base, labels).eval()
    ids, y = (torch.cat([batch[key] for batch in data]) for key in ("input_ids", "labels"))
    pooled = plain.bert(ids).pooler_output
    frozen = pooled.detach()
    unit = (frozen - frozen.mean(0)).square().mean().sqrt()
    x = ((pooled - frozen.mean(0)) / unit).double()
    head = Ridge() if labels == 1 else LogisticRegression(tol=1e-8, max_iter=10_000)
    head.fit(x.detach().numpy(), y.numpy())
    outputs = x @ torch.tensor(head.coef_).view(-1, 16).mT + torch.tensor(head.intercept_)
    if labels == 1:
        loss = (outputs[:, 0] - y).square().mean()
    elif labels == 2:
        loss = functional.binary_cross_entropy_with_logits(outputs[:, 0], y.double())
    else:
        loss = functional.cross_entropy(outputs, y)
    loss.backward()
    for name, layer in model.base_model.spectral_layers().items():
        U, _, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        overlap = (layer.spectral_U["default"].mT @ U[:, :4]).abs()
        assert torch.allclose(overlap, torch.eye(4), atol=5e-3), name
        assert torch.allclose((Vh[:4] @ layer.spectral_Vh["default"].mT).abs(), torch.eye(4), atol=5e-3), name


def test_the_head_does_not_depend_on_the_units_of_the_features():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    for y, outputs in ((torch.arange(30) % 3, 3), (torch.arange(30) % 2, 2), (x[:, 0], 1)):
        fitted = converged_head(x, y, outputs)(x)
        small = 1e-4 * x + 5
        torch.testing.assert_close(converged_head(small, y, outputs)(small), fitted, rtol=0, atol=1e-4)
        without = converged_head(x, y, outputs, bias=False)
        assert torch.equal(without(torch.zeros(1, 4)), torch.zeros(1, outputs))


def test_a_class_without_examples_has_probability_zero_and_a_single_class_is_refused():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    p = converged_head(x, torch.arange(30) % 2 * 2, 4)(x).softmax(1)
    assert torch.equal(p[:, [1, 3]], torch.zeros(30, 2))
    with pytest.raises(InputError, match="NaN or Inf"):
        converged_head(x.where(x < 1, torch.nan), torch.arange(30) % 2, 2)
    with pytest.raises(InputError, match="30 examples of one class"):
        converged_head(x, torch.ones(30, dtype=torch.int64), 2)


def test_without_a_fitted_head_the_gradient_is_that_under_the_head_as_it_is(base):
    model = get_peft_model(
        classifier(base), SpectralConfig(rank=2, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS")
    )
    initialize_gradient_basis(model, batches(), fit_head=False)
    plain = classifier(base).eval()
    sum(len(batch["labels"]) * plain(**batch).loss for batch in batches()).backward()
    for name, layer in model.base_model.spectral_layers().items():
        U, _, _ = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        assert torch.allclose((layer.spectral_U["default"].mT @ U[:, :2]).abs(), torch.eye(2), atol=1e-3)


def test_saving_loading_merging_and_exporting_give_the_same_model(base, tmp_path):
    model = adapted(base)
    randomise(model)
    ids = batches()[0]["input_ids"]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(classifier(base), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)
    layers, loaded = (m.base_model.spectral_layers() for m in (model, again))
    for name, layer in layers.items():
        for part in ("U", "Vh", "S", "M"):
            stored = getattr(loaded[name], f"spectral_{part}")["default"]
            assert torch.equal(getattr(layer, f"spectral_{part}")["default"], stored), (name, part)
    assert {row["basis"] for row in folder.verify(tmp_path / "adapter", base)} == {"stored with the adapter"}
    folder.export_lora(tmp_path / "adapter", tmp_path / "lora", base)
    lora = PeftModel.from_pretrained(classifier(base), tmp_path / "lora").eval()
    assert torch.allclose(lora(ids).logits, expected, atol=1e-5)
    folder.merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    live = {n: m.merged_weight(["default"]) for n, m in layers.items()}
    assert all(torch.equal(merged.get_submodule(name).weight, W) for name, W in live.items())
    tuned = open_tuned(tmp_path / "adapter", open_checkpoint(base))
    assert all(torch.allclose(tuned[f"{n.removeprefix('bert.')}.weight"], W, atol=1e-6) for n, W in live.items())


@pytest.mark.parametrize("part", ["spectral_U", "spectral_Vh"])
def test_one_changed_bit_of_a_stored_vector_is_refused_at_every_door(base, tmp_path, part):
    adapted(base).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    for door in (
        lambda: PeftModel.from_pretrained(classifier(base), tmp_path),
        lambda: classifier(base).load_adapter(tmp_path),
        lambda: folder.verify(tmp_path, base),
        lambda: folder.export_lora(tmp_path, tmp_path / "lora"),
        lambda: open_tuned(tmp_path, open_checkpoint(base)),
    ):
        with pytest.raises(InputError, match=r"other (numbers|coefficients) than were saved"):
            door()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "basis": "random"}))
    with pytest.raises(InputError, match="says basis = 'random', the coefficients were saved with 'gradient'"):
        folder.verify(tmp_path, base)


def test_adapters_of_two_tasks_stand_side_by_side_and_mix_in_a_batch(base):
    model = adapted(base)
    config = SpectralConfig(rank=4, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS")
    model.add_adapter("other", config)
    model.set_adapter("other")
    ids = batches()[0]["input_ids"]
    with pytest.raises(InputError, match=r"call specbasis\.adapter\.initialize_gradient_basis"):
        model(ids)  # it must not take the first adapter's vectors
    randomise(model, adapter="default")
    initialize_gradient_basis(model, batches(seed=9), adapter_name="other")
    randomise(model, seed=5, adapter="other")
    layer = next(iter(model.base_model.spectral_layers().values()))
    assert not torch.allclose(layer.spectral_U["default"], layer.spectral_U["other"])
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.eval()(ids).logits
    names = ["default", "other", "__base__"] * 5 + ["other"]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name != "__base__":
            assert torch.allclose(mixed[row], alone[name][row], atol=1e-5)
    with pytest.raises(InputError, match="bases from other data are in other vectors"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert "sum" not in model.peft_config
    model.add_weighted_adapter(["other"], [2.0], "twice")
    assert torch.equal(layer.spectral_U["twice"], layer.spectral_U["other"])
    assert torch.allclose(layer.get_delta_weight("twice"), 2 * layer.get_delta_weight("other"), atol=1e-6)


def test_the_gradient_of_a_language_model_needs_no_head():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape))
    model = get_peft_model(llama, SpectralConfig(rank=3, target_modules=["up_proj", "down_proj"], basis="gradient"))
    ids = torch.randint(32, (6, 10))
    initialize_gradient_basis(model, [{"input_ids": ids, "labels": ids}])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(float(m.grad.norm()) > 0 for n, m in model.named_parameters() if "spectral_M" in n)


class Tailed(nn.Module):
    """A classifier of transformers' form whose outputs come from no linear layer, or that has no logits."""

    def __init__(self, logits=True):
        super().__init__()
        torch.manual_seed(5)
        self.lin, self.tail = nn.Linear(8, 6), nn.Conv1d(6, 3, 1)
        self.logits = logits

    def forward(self, x, labels=None):
        logits = self.tail(self.lin(x)[..., None])[..., 0]
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss, logits if self.logits else None)


def test_a_head_that_cannot_be_fitted_is_told_and_one_that_is_none_is_taken_as_it_is():
    x, y = points()
    config = SpectralConfig(rank=2, target_modules=["lin"], basis="gradient")
    model = get_peft_model(Tailed(), config)
    with pytest.raises(InputError, match=r"Tailed.*: its task head does not end in a linear layer.*fit_head=False"):
        initialize_gradient_basis(model.base_model.model, [{"x": x, "labels": y % 3}])
    initialize_gradient_basis(model, [{"x": x, "labels": y % 3}], fit_head=False)
    initialize_gradient_basis(get_peft_model(Tailed(logits=False), config), [{"x": x, "labels": y % 3}])


def test_a_model_of_several_methods_takes_the_basis_too(base):
    model = peft.get_peft_model(
        classifier(base), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), mixed=True
    )
    model.add_adapter("other", SpectralConfig(rank=2, target_modules=TARGETS, basis="gradient"))
    initialize_gradient_basis(model, batches(), adapter_name="other")
    layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    assert layer.adapters["other"].settled


def test_what_cannot_be_is_refused_in_one_line(base, tmp_path):
    config = SpectralConfig(rank=4, target_modules=TARGETS, basis="gradient", task_type="SEQ_CLS")
    model = get_peft_model(classifier(base), config)
    with pytest.raises(InputError, match=r"call specbasis\.adapter\.initialize_gradient_basis"):
        model(batches()[0]["input_ids"])
    with pytest.raises(InputError, match=r"call specbasis\.adapter\.initialize_gradient_basis"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="got no batches"):
        initialize_gradient_basis(model, [])
    with pytest.raises(InputError, match="'absent': got no layer with it"):
        initialize_gradient_basis(model, batches(), adapter_name="absent")
    initialize_gradient_basis(model, batches())
    initialize_gradient_basis(model, batches(seed=1))  # before training it may be made anew
    randomise(model)
    with pytest.raises(InputError, match="coefficients are not zero, and in a new basis"):
        initialize_gradient_basis(model, batches())
    other = get_peft_model(classifier(base), SpectralConfig(rank=4, target_modules=TARGETS, task_type="SEQ_CLS"))
    with pytest.raises(InputError, match="got basis = 'pretrained'; want one of SpectralConfig"):
        initialize_gradient_basis(other, batches())
    with pytest.raises(InputError, match="save_basis = False"):
        SpectralConfig(basis="gradient", save_basis=False)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="packed: a quantised"):
        summed_gradients({"packed": packed}, [])
    with pytest.raises(InputError, match=r"call specbasis\.adapter\.initialize_gradient_basis"):
        SpectralLinear(nn.Linear(4, 4), interval=(0, 2), basis="gradient")(torch.ones(1, 4))
