"""What the verdict says of trainings whose history is known, and how often its test finds what it says it finds.

    python benchmarks/verdicts.py --out DIR [--families 30] [--seed 0]

trains families of small models on scikit-learn's digits (perceptrons and Transformers, of several widths): a base,
and nine others that are known to come from it, to share its start, or to have nothing to do with it. Each pair is
compared; DIR/trainings.csv gets a row a pair, as soon as it is known, and the same command continues it.
DIR/power.csv gets, for shapes and spectra, how often pairs of a constructed cosine are found. Both are printed as
tables with Clopper-Pearson intervals. About a minute of processor time a family.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import Tensor, nn
from which_base import append, read

import specbasis
from specbasis.comparison.verdict import least_cosine, threshold
from specbasis.core.entries import read_entries
from specbasis.jobs.environment import environment

State = dict[str, Tensor]
WIDTHS = (32, 48, 64, 96)
STEPS = 600
RATE = 2e-3


# --- trainings ----------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """The eight rows of an image as tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (batch, 64)."""
        return self.head(self.blocks(self.embed(x.reshape(-1, 8, 8))).mean(1))


def network(family: int, seed: int) -> nn.Module:
    """The network of a family, begun from a seed: its kind and width go with its number."""
    torch.manual_seed(seed)
    width = WIDTHS[family // 3 % len(WIDTHS)]
    if family % 3 == 0:
        return Transformer(width)
    act = nn.Tanh if family % 3 == 1 else nn.ReLU
    return nn.Sequential(
        nn.Linear(64, width),
        act(),
        nn.Linear(width, 2 * width),
        act(),
        nn.Linear(2 * width, width),
        act(),
        nn.Linear(width, 10),
    )


def data(task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and classes: the digits; the digits upside down and dark for light; or with other classes."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    if task == "turned":
        x = 1 - x.reshape(-1, 8, 8).flip(1).reshape(-1, 64)
    if task == "renamed":
        y = torch.randperm(10, generator=torch.Generator().manual_seed(1))[y]
    chosen = torch.randperm(len(x), generator=generator)[:1500]
    return x[chosen], y[chosen]


def trained(net: nn.Module, steps: int, seed: int, task: str = "digits", frozen: float = 0.0) -> State:
    """The state of a network after steps of Adam on batches by a seed; the first share of its tensors is frozen."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data(task, generator)
    parameters = list(net.parameters())
    free = parameters[int(frozen * len(parameters)) :]
    optimiser = torch.optim.Adam(free, lr=RATE)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@dataclass(frozen=True)
class Pair:
    """What a model is beside the base, and what may be said of it.

    Attributes:
        what: its history.
        make: from number of the family, seed and base to the model.
        right: verdicts that are right.
        weak: verdicts that say less than what is so, and nothing false.
    """

    what: str
    make: Callable[[int, int, State], State]
    right: tuple[str, ...]
    weak: tuple[str, ...]


def _onward(steps: int, task: str = "digits", frozen: float = 0.0) -> Callable[[int, int, State], State]:
    def make(family: int, seed: int, base: State) -> State:
        net = network(family, seed)
        net.load_state_dict(base)
        return trained(net, steps, seed + 1, task, frozen)

    return make


def _headed(family: int, seed: int, base: State) -> State:
    """With a new head, then trained: what a finetune on another task is."""
    fresh = network(family, seed + 7).state_dict()
    last = list(base)[-2:]
    net = network(family, seed)
    net.load_state_dict({name: fresh[name] if name in last else value for name, value in base.items()})
    return trained(net, STEPS // 2, seed + 1, "renamed")


FINETUNED = ("finetuned",), ("related", "undecided")
SHARED = ("related",), ("undecided",)
NONE = ("independent",), ("undecided",)
PAIRS = (
    Pair("finetuned, 100 steps, same task", _onward(100), *FINETUNED),
    Pair("finetuned, 100 steps, inputs turned", _onward(100, "turned"), *FINETUNED),
    Pair("finetuned, 600 steps, inputs turned", _onward(STEPS, "turned"), *FINETUNED),
    Pair("finetuned, first half frozen", _onward(STEPS // 2, "turned", 0.5), *FINETUNED),
    Pair("finetuned, new head", _headed, *FINETUNED),
    Pair(
        "another training of the same start",
        lambda f, s, _: trained(network(f, s), STEPS, s + 2, "turned"),
        *SHARED,
    ),
    Pair(
        "the start against the base",
        lambda f, s, _: network(f, s).state_dict(),
        ("related", "finetuned"),
        ("undecided",),
    ),
    Pair("independent, same task", lambda f, s, _: trained(network(f, s + 3), STEPS, s + 3), *NONE),
    Pair("independent, inputs turned", lambda f, s, _: trained(network(f, s + 4), STEPS, s + 4, "turned"), *NONE),
)


def run_trainings(path: Path, families: int, seed: int) -> list[dict[str, str]]:
    """The rows of all pairs; those that the file holds are not made again."""
    rows = read(path)
    done = {(int(row["family"]), row["what"]) for row in rows}
    for family in range(families):
        left = [pair for pair in PAIRS if (family, pair.what) not in done]
        if not left:
            continue
        start = 1000 * seed + 10 * family
        base = trained(network(family, start), STEPS, start)
        for pair in left:
            tuned = pair.make(family, start, base)
            verdict = specbasis.compare(base, tuned, workers=1).verdicts["state_dict"]
            grade = "right" if verdict.kind in pair.right else "weak" if verdict.kind in pair.weak else "wrong"
            rows.append(
                {
                    "family": str(family),
                    "what": pair.what,
                    "verdict": verdict.kind,
                    "grade": grade,
                    "least_cosine": f"{verdict.test['least_cosine']:.3f}",
                    "unrelated": ";".join(verdict.unrelated),
                }
            )
            append(path, rows[-1])
            print(*rows[-1].values(), flush=True)
    return rows


# --- power --------------------------------------------------------------------------------------------------------

SHAPES = ((8, 8), (16, 16), (16, 64), (64, 64), (64, 256), (128, 128), (256, 256))
COSINES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
DRAWS = 200


def run_power(path: Path, seed: int) -> list[dict[str, str]]:
    """How often a pair of a cosine is found, alone and as one of forty matrices, for flat and for steep spectra."""
    rows = read(path)
    done = {(row["shape"], row["decades"]) for row in rows}
    for out, width in SHAPES:
        for decades in (0, 2):
            if (f"{out}x{width}", str(decades)) in done:
                continue
            fall = torch.logspace(0, -decades, min(out, width), dtype=torch.float64)
            for cosine in COSINES:
                facts = [_fact(out, width, fall, cosine, seed + draw) for draw in range(DRAWS)]
                row = {"shape": f"{out}x{width}", "decades": str(decades), "cosine": str(cosine)}
                for tested in (1, 40):
                    found = sum(m["weight_cosine_z"] >= threshold(m, tested) for m in facts)
                    row[f"found_of_{tested}"] = str(found)
                    row[f"least_cosine_of_{tested}"] = f"{np.median([least_cosine(m, tested) for m in facts]):.3f}"
                rows.append(row)
                append(path, row)
    return rows


def _fact(out: int, width: int, fall: Tensor, cosine: float, seed: int) -> dict[str, float]:
    """What the test reads of two matrices of a spectrum with random vectors, at a cosine in the mean."""
    g = torch.Generator().manual_seed(seed)
    n = len(fall)

    def draw() -> Tensor:
        U, V = (torch.linalg.qr(torch.randn(side, n, generator=g, dtype=torch.float64)).Q for side in (out, width))
        return (U * fall) @ V.mT

    W, other = draw(), draw()
    T = cosine * W + math.sqrt(1 - cosine**2) * other
    return {"out": out, "in": width, "size": out * width, **read_entries(W, T).figures}


# --- tables -------------------------------------------------------------------------------------------------------


def share(hits: int, n: int) -> str:
    """A share with its 95 % interval."""
    ends = binomtest(hits, n).proportion_ci(method="exact")
    return f"{hits} of {n} [{ends.low:.2f}, {ends.high:.2f}]"


def table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """How the verdicts of each history are graded, in Markdown."""
    rows = list(rows)
    yield "| history | right | says less | wrong | verdicts |"
    yield "|---|---|---|---|---|"
    for pair in PAIRS:
        own = [row for row in rows if row["what"] == pair.what]
        if own:
            grades = [sum(row["grade"] == grade for row in own) for grade in ("right", "weak", "wrong")]
            kinds = {
                kind: sum(row["verdict"] == kind for row in own) for kind in sorted({r["verdict"] for r in own})
            }
            told = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
            yield f"| {pair.what} | {' | '.join(share(n, len(own)) for n in grades)} | {told} |"


def power_table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """The share of pairs found at each cosine, for one of forty matrices, in Markdown."""
    rows = list(rows)
    yield "| shape | decades | least cosine | " + " | ".join(str(c) for c in COSINES) + " |"
    yield "|---" * (3 + len(COSINES)) + "|"
    for shape, decades in dict.fromkeys((row["shape"], row["decades"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["decades"]) == (shape, decades)]
        shares = " | ".join(f"{int(row['found_of_40']) / DRAWS:.2f}" for row in own)
        yield f"| {shape} | {decades} | {own[0]['least_cosine_of_40']} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    about = json.dumps(environment(("sklearn",)), indent=1)
    (given.out / "manifest.json").write_text(about + "\n", encoding="utf-8")
    torch.set_num_threads(1)
    power = run_power(given.out / "power.csv", given.seed)
    rows = run_trainings(given.out / "trainings.csv", given.families, given.seed)
    print("", *table(rows), "", *power_table(power), sep="\n")


if __name__ == "__main__":
    main()
