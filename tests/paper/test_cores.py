"""Many adapters side by side against each alone: transformers' whole model, weights W + U M Vh, torch's Adam."""

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from specbasis.core.errors import InputError
from specbasis.core.svd import decompose
from specbasis.finetuning.tasks import GLUE, Split
from specbasis.paper import cores
from specbasis.paper.cores import Basis, Experiment, Recipe, score, train
from specbasis.paper.encoder import encode, load_encoder, mean_gradients
from tests.finetuning import lab
from tests.helpers.matrices import orthonormal

K, SEEDS, RATES = 3, (1, 1, 2), (0.003, 0.02, 0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(lab.pico_bert(tmp_path_factory.mktemp("cores") / "base"))


def split(task, count=34):
    rows = lab.sentiment(count)
    if len(GLUE[task].layout.texts) == 1:
        return Split([(text,) for text, _ in rows], [float(label) for _, label in rows])
    return Split([(text, f"a {text}") for text, _ in rows], [1.5 + label for _, label in rows])


def experiments(encoder):
    """Three adapters that differ in basis, seed and rate."""
    return [
        Experiment(
            {
                name: Basis(
                    orthonormal(m.out_features, K, e).float(), orthonormal(m.in_features, K, e + 9).mT.float()
                )
                for name, m in encoder.matrices.items()
            },
            seed,
            rate,
        )
        for e, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True))
    ]


def features(encoder, weights, inputs):
    """What the head stands on in the whole model, its matrices replaced: means over tokens, or the pooler's."""
    means = []
    for texts in zip(*inputs, strict=True):
        batch = encoder.tokenizer(list(texts), padding=True, return_tensors="pt")
        outputs = functional_call(encoder.model, weights, (), dict(batch))
        if encoder.first:
            return outputs.pooler_output
        states = outputs.last_hidden_state
        mask = batch["attention_mask"][..., None]
        means.append((states * mask).sum(1) / mask.sum(1))
    if len(means) == 1:
        return means[0]
    u, v = means
    return torch.cat([u, v, (u - v).abs(), u * v], 1)


def alone(encoder, data, experiment, orders, recipe, head):
    """One experiment's core after training by itself, with its mean loss."""
    M = {name: torch.zeros(K, K, requires_grad=True) for name in encoder.matrices}
    bias = torch.zeros(head.shape[1], requires_grad=True)
    head = head.clone().requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": list(M.values()), "lr": experiment.rate}, {"params": [head, bias], "lr": recipe.head_rate}],
        eps=1e-12,
    )
    total = len(orders)
    warm = max(1, round(recipe.warmup * total))

    def loss(rows):
        weights = {
            f"{name}.weight": m.weight + experiment.bases[name].U @ M[name] @ experiment.bases[name].Vh
            for name, m in encoder.matrices.items()
        }
        outputs = features(encoder, weights, [data.inputs[i] for i in rows]) @ head + bias
        labels = torch.tensor([data.labels[i] for i in rows])
        if encoder.task.regression:
            return functional.mse_loss(outputs[:, 0], labels.float())
        return functional.cross_entropy(outputs, labels.long())

    for step, rows in enumerate(orders):
        for group, rate in zip(optimizer.param_groups, (experiment.rate, recipe.head_rate), strict=True):
            group["lr"] = rate * min((step + 1) / warm, (total - step) / max(1, total - warm))
        optimizer.zero_grad()
        loss(rows).backward()
        torch.nn.utils.clip_grad_norm_([*M.values(), head, bias], cores.CLIP)
        optimizer.step()
    with torch.no_grad():
        return {name: core.detach() for name, core in M.items()}, float(loss(range(len(data))))


@pytest.mark.parametrize(("task", "on"), [("sst2", "mean"), ("sst2", "first"), ("stsb", "mean")])
def test_every_experiment_is_what_it_would_be_alone(base, task, on):
    encoder, data, recipe = load_encoder(base, GLUE[task], "cpu", head=on), split(task), Recipe(epochs=3, batch=8)
    examples = encode(encoder, data)
    stack_of = experiments(encoder)
    orders = list(cores._orders(examples, stack_of, recipe))
    stack = train(encoder, examples, stack_of, recipe)
    found = score(stack, examples, at_once=30)
    for e, experiment in enumerate(stack_of):
        head = cores._head(16, GLUE[task], experiment.seed)
        M, loss = alone(encoder, data, experiment, [rows[e] for rows in orders], recipe, head)
        assert found.loss[e] == pytest.approx(loss, rel=2e-3)
        for name, core in stack.cores.items():
            assert float(M[name].norm()) > 0, "it learned"
            assert torch.allclose(core[e], M[name], atol=0.02 * float(M[name].abs().max())), (name, e)
    assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters()), (
        "the encoder stays as it was"
    )


def test_experiments_of_one_seed_meet_the_same_batches_and_every_epoch_all_examples(base):
    encoder = load_encoder(base, GLUE["sst2"], "cpu")
    examples, recipe = encode(encoder, split("sst2", 32)), Recipe(epochs=2, batch=8)
    orders = np.stack(list(cores._orders(examples, experiments(encoder), recipe)))  # (steps, E, batch)
    assert (orders[:, 0] == orders[:, 1]).all()
    assert (orders[:, 0] != orders[:, 2]).any()
    for epoch in (orders[:4], orders[4:]):
        for e in range(3):
            assert sorted(epoch[:, e].ravel()) == list(range(32))


@pytest.mark.parametrize(("on", "share"), [("mean", 1e-3), ("first", 5e-3)])  # pooled states differ by 2e-3 alone
def test_the_gradients_are_those_of_the_whole_model(base, on, share):
    from sklearn.linear_model import LogisticRegression

    encoder, data = load_encoder(base, GLUE["sst2"], "cpu", head=on), split("sst2")
    examples = encode(encoder, data)
    found = mean_gradients(encoder, examples, examples.labels)
    weights = {f"{name}.weight": m.weight.detach().clone().requires_grad_() for name, m in encoder.matrices.items()}
    x = features(encoder, weights, data.inputs)
    x, frozen = x.double(), x.detach().double()
    z = (x - frozen.mean(0)) / (frozen - frozen.mean(0)).square().mean().sqrt()
    head = LogisticRegression(tol=1e-8, max_iter=10_000).fit(z.detach().numpy(), examples.labels.numpy())
    logit = z @ torch.tensor(head.coef_[0]) + float(head.intercept_[0])
    functional.binary_cross_entropy_with_logits(logit, examples.labels.double()).backward()
    for name, G in found.items():
        expected = weights[f"{name}.weight"].grad
        assert torch.allclose(G, expected, atol=share * float(expected.abs().max()))
        assert float(decompose(G).S[0]) > 0


def test_a_model_without_such_blocks_is_refused(base, monkeypatch):
    with pytest.raises(InputError, match="an encoder of BERT's kind"):
        load_encoder(base, GLUE["sst2"], "cpu", blocks=9)
