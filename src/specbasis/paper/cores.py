"""Many spectral adapters of one size, trained side by side on the last blocks of a frozen encoder.

W' = W + U_e M_e Vh_e in each feed-forward matrix of the last blocks, for experiments e = 1 … E that differ in
basis, seed and learning rate. The blocks below run once for each text; a step is one batched product for all
experiments. Every experiment has its own head, batches and Adam state, so it is what it would be alone
(tests/paper/test_cores.py compares with PEFT's model, one at a time). Without dropout: what is compared is the
basis.

The head stands on the mean of the last hidden states, [u, v, |u − v|, u·v] for two texts: what a sentence
encoder was pretrained for (Reimers & Gurevych 2019, §3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.finetuning.tasks import Task
from specbasis.paper.encoder import Encoder, Examples, batch, pooled, portions

CLIP = 1.0
"""Largest norm of an experiment's gradient, as in transformers' Trainer."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Frozen vectors of one matrix: U (out, r) and Vh (r, in)."""

    U: Float[Tensor, "out r"]
    Vh: Float[Tensor, "r in"]


@dataclass(frozen=True, eq=False)
class Experiment:
    """One adapter and its training.

    Attributes:
        bases: of each matrix.
        seed: of the head and the order of the examples.
        rate: learning rate of the cores at its peak.
    """

    bases: Mapping[str, Basis]
    seed: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    """What all trainings share: passes, examples a step, the heads' learning rate, the share of warm-up."""

    epochs: int
    batch: int = 16
    head_rate: float = 0.0064
    warmup: float = 0.06


# --- the model of all experiments ---------------------------------------------------------------------------------


class Adapted(nn.Module):
    """The outputs of one frozen matrix with E adapters on it, for inputs of which each E-th belongs to one."""

    def __init__(self, linear: nn.Linear, bases: Sequence[Basis], unit: Float[Tensor, "E 1 1"]) -> None:
        super().__init__()
        self.linear = linear
        self.U = torch.stack([basis.U for basis in bases])
        self.Vh = torch.stack([basis.Vh for basis in bases])
        r = self.Vh.shape[1]
        self.M = nn.Parameter(torch.zeros(len(bases), r, r, device=self.U.device))
        self.unit = unit

    @property
    def core(self) -> Tensor:
        """M of every adapter, (E, r, r)."""
        return self.unit * self.M

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of inputs whose first dimension is E times the examples."""
        z = x.reshape(len(self.M), -1, x.shape[-1])  # (E, tokens, in)
        z = torch.bmm(torch.bmm(z, self.Vh.mT), self.core.mT)
        outputs: Tensor = self.linear(x) + torch.bmm(z, self.U.mT).view(*x.shape[:-1], -1)
        return outputs


class Stack(nn.Module):
    """E adapters on the last blocks of one encoder, each with a head of its own.

    The cores are kept divided by their learning rates: Adam's step does not depend on the scale of a parameter, so
    one optimizer with rate 1 trains each experiment at its own.
    """

    def __init__(self, encoder: Encoder, experiments: Sequence[Experiment]) -> None:
        super().__init__()
        self.encoder, self.task = [encoder], encoder.task  # in a list: not a part of this module
        rates = torch.tensor([e.rate for e in experiments], device=encoder.device)[:, None, None]
        self.adapted = {
            name: Adapted(linear, [e.bases[name] for e in experiments], rates)
            for name, linear in encoder.matrices.items()
        }
        self.layers = nn.ModuleList(self.adapted.values())
        heads = [_head(encoder.width, encoder.task, e.seed) for e in experiments]
        self.head = nn.Parameter(torch.stack(heads).to(encoder.device))  # (E, features, classes)
        self.bias = nn.Parameter(torch.zeros(len(experiments), 1, self.head.shape[2], device=encoder.device))

    @property
    def cores(self) -> dict[str, Tensor]:
        """M of each matrix, (E, r, r)."""
        return {name: layer.core.detach() for name, layer in self.adapted.items()}

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Outputs (E, examples, classes) from hidden (E, examples, texts, tokens, width) and lengths."""
        n, size, texts, tokens, width = hidden.shape
        with self._in_place():
            means = pooled(self.encoder[0], hidden.reshape(-1, tokens, width), lengths.reshape(-1))
        return torch.baddbmm(self.bias, _features(means.view(n, size, texts, width)), self.head)

    def _in_place(self) -> ExitStack:
        stack = ExitStack()
        for name, layer in self.adapted.items():
            parent, _, leaf = name.rpartition(".")
            owner = self.encoder[0].model.get_submodule(parent)
            stack.callback(setattr, owner, leaf, layer.linear)
            setattr(owner, leaf, layer)
        return stack


def _features(means: Tensor) -> Tensor:
    """(E, examples, features) of (E, examples, texts, width)."""
    if means.shape[2] == 1:
        return means[:, :, 0]
    u, v = means.unbind(2)
    return torch.cat([u, v, (u - v).abs(), u * v], -1)


def _head(width: int, task: Task, seed: int) -> Tensor:
    texts = 1 if task.layout is None else len(task.layout.texts)
    features = width if texts == 1 else 4 * width
    classes = 1 if task.regression else len(task.labels)
    return 0.02 * torch.randn(features, classes, generator=torch.Generator().manual_seed(seed))


def losses(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example: cross-entropy, or the squared error; (E, examples)."""
    if task.regression:
        return (outputs[..., 0] - labels).square()
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


# --- training and scoring -----------------------------------------------------------------------------------------


def train(
    encoder: Encoder,
    examples: Examples,
    experiments: Sequence[Experiment],
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
) -> Stack:
    """Train all experiments, with Adam, warm-up and linear decay.

    Batches hold texts of like length; their order is the same for all experiments, their content follows the seed.
    What does not fill a batch at the end of an epoch is left out.
    """
    stack = Stack(encoder, experiments)
    cores = [layer.M for layer in stack.adapted.values()]
    heads = [stack.head, stack.bias]
    groups = [{"params": cores, "lr": 1.0}, {"params": heads, "lr": recipe.head_rate}]
    total = recipe.epochs * (len(examples) // recipe.batch)
    warm = max(1, round(recipe.warmup * total))
    # The cores' gradients are those of M times the rate, 1e-5 … 1e-1 of them: Adam's ε has to be as much smaller.
    optimizer = torch.optim.Adam(groups, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    for step, rows in enumerate(_orders(examples, experiments, recipe)):
        hidden, lengths, labels = batch(examples, rows)
        optimizer.zero_grad(set_to_none=True)
        losses(stack.task, stack(hidden, lengths), labels).mean(1).sum().backward()  # type: ignore[no-untyped-call]
        _clip(stack)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, total)
    return stack


def _orders(examples: Examples, experiments: Sequence[Experiment], recipe: Recipe) -> Iterator[np.ndarray]:
    """The examples of every step, (E, batch)."""
    longest, count = examples.longest, len(examples) // recipe.batch
    seeds = [e.seed for e in experiments]
    for epoch in range(recipe.epochs):
        of_seed = {}
        for seed in dict.fromkeys(seeds):
            random = np.random.default_rng((seed, epoch))
            rows = random.permutation(len(examples))[: count * recipe.batch]
            # Lengths that differ by less than two may change places, else equal seeds would always meet.
            jitter = longest[rows] + 2 * random.random(len(rows))
            of_seed[seed] = rows[np.argsort(jitter)].reshape(count, recipe.batch)
        for step in np.random.default_rng(epoch).permutation(count):
            yield np.stack([of_seed[seed][step] for seed in seeds])


def _clip(stack: Stack) -> None:
    """Scale each experiment's gradient to a norm of at most `CLIP`, as if it were alone."""
    layers = stack.adapted.values()
    # The gradient of M / rate, which is the parameter, is the rate times that of M.
    of_cores = [layer.M.grad / layer.unit for layer in layers if layer.M.grad is not None]
    of_heads = [p.grad for p in (stack.head, stack.bias) if p.grad is not None]
    squares = [gradient.square().flatten(1).sum(1) for gradient in (*of_cores, *of_heads)]
    factor = (CLIP / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)[:, None, None]
    for parameter in (*(layer.M for layer in layers), stack.head, stack.bias):
        if parameter.grad is not None:
            parameter.grad *= factor


@dataclass(frozen=True, eq=False)
class Scored:
    """What trained experiments say of some examples: mean loss (E,), and outputs' class or value (E, examples)."""

    loss: np.ndarray
    predicted: np.ndarray


@torch.no_grad()
def score(stack: Stack, examples: Examples, at_once: int | None = None) -> Scored:
    """Losses and predictions of all experiments on the same examples, at most ``at_once`` texts of all together.

    By default 4096, or 256 on a CPU, whose cache they fill: twice as fast there.
    """
    count = len(stack.head)
    at_once = at_once or (256 if stack.head.device.type == "cpu" else 4096)
    predicted = np.empty((count, len(examples)), dtype=np.float32)
    total = torch.zeros(count, dtype=torch.float64, device=stack.head.device)
    for rows in portions(np.argsort(examples.longest, kind="stable"), max(1, at_once // count)):
        hidden, lengths, labels = batch(examples, rows[None])
        outputs = stack(hidden.expand(count, *hidden.shape[1:]), lengths.expand(count, *lengths.shape[1:]))
        labels = labels.expand(count, -1)
        total += losses(stack.task, outputs, labels).sum(1, dtype=torch.float64)
        shown = outputs[..., 0] if stack.task.regression else outputs.argmax(-1)
        predicted[:, rows] = shown.cpu().numpy()
    return Scored((total / len(examples)).cpu().numpy(), predicted)
