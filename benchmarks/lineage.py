"""What lineage says of 37 mixed checkpoints whose history is known, and how long it takes.

    python benchmarks/lineage.py --models DIR [--seed 0] [--out rows.csv]

Three families of small models, trained on scikit-learn's digits (`verdicts.py`): a base, finetunes of it, a
finetune of a finetune, a copy in bfloat16, a merge, and another training of the same start; the real families of
the packages that `which_base.py` fetches into DIR; and models that are related to none. An edge is *wrong* where it
is claimed and not so, *right* where it is so, *open* where lineage says that it is unresolved.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from verdicts import STEPS, State, network, trained
from which_base import mixed, models

from specbasis.lineage.tree import lineage

REAL = {
    "antibody-4-2": "anarcii==2.0.8/anarcii/models/antibody/antibody_4_2_128_512.pt",
    "tcr-4-2": "anarcii==2.0.8/anarcii/models/tcr/tcr_4_2_128_512.pt",
    "shark-4-2": "anarcii==2.0.8/anarcii/models/shark/shark_4_2_128_512.pt",
    "antibody-4-1": "anarcii==2.0.8/anarcii/models/antibody/antibody_4_1_128_512.pt",
    "tcr-4-1": "anarcii==2.0.8/anarcii/models/tcr/tcr_4_1_128_512.pt",
    "chgnet-0.3": "chgnet==0.4.2/chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar#model.state_dict",
    "chgnet-r2scan": "chgnet==0.4.2/chgnet/pretrained/r2scan/"
    "chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar#model.state_dict",
    "chgnet-0.2": "chgnet==0.4.2/chgnet/pretrained/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar#model.state_dict",
}
PARENTS = {
    "tcr-4-2": {"antibody-4-2"},
    "shark-4-2": {"antibody-4-2"},
    "tcr-4-1": {"antibody-4-1"},
    "chgnet-r2scan": {"chgnet-0.3"},
}
"""Of the real ones."""

ALONE = ("silero-16k", "crepe-tiny", "resemblyzer", "batdetect2", "minilm-l6")


def family(number: int, seed: int) -> tuple[dict[str, State], dict[str, set[str]]]:
    """A family of eight: name → weights, and name → the names of what it was made from."""

    def onward(state: State, steps: int, task: str, order: int) -> State:
        net = network(number, seed)
        net.load_state_dict(state)
        return trained(net, steps, seed + order, task)

    base = trained(network(number, seed), STEPS, seed)
    made = {"base": base, "sibling": trained(network(number, seed), STEPS, seed + 9, "turned")}
    made["a"] = onward(base, 200, "turned", 1)
    made["b"] = onward(base, 200, "renamed", 2)
    made["c"] = onward(base, 100, "digits", 3)
    made["a-onward"] = onward(made["a"], 200, "renamed", 4)
    made["bfloat16"] = {name: tensor.bfloat16() for name, tensor in base.items()}
    made["merge"] = mixed(made["a"], made["b"], 0.4)
    parents = {
        "a": {"base"},
        "b": {"base"},
        "c": {"base"},
        "a-onward": {"a"},
        "bfloat16": {"base"},
        "merge": {"a", "b"},
    }
    of = f"f{number}-{{}}".format
    return {of(n): s for n, s in made.items()}, {of(n): set(map(of, p)) for n, p in parents.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    packages = dict(models(given.models))
    sources = {name: str(given.models / path) for name, path in REAL.items()} | {n: packages[n] for n in ALONE}
    parents = dict(PARENTS)
    clusters = [
        {"antibody-4-2", "tcr-4-2", "shark-4-2"},
        {"antibody-4-1", "tcr-4-1"},
        {"chgnet-0.3", "chgnet-r2scan"},
    ]
    with TemporaryDirectory() as folder:
        for number in range(3):
            states, of_family = family(number, 1000 * given.seed + 100 * number)
            parents |= of_family
            clusters.append(set(states))
            for name, state in states.items():
                sources[name] = str(Path(folder, f"{name}.safetensors"))
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, sources[name])
        start = time.perf_counter()
        found = lineage([f"{name}={path}" for name, path in sources.items()])
        seconds = time.perf_counter() - start
    print(found.as_text(), end="\n\n")
    together = {frozenset(tree.members) for tree in found.trees}
    alone = set(sources) - set().union(*clusters)
    wanted = {frozenset(members) for members in (*clusters, *({name} for name in alone))}
    rows = [row for tree in found.trees for row in graded(tree.edges, parents)]
    grades = {grade: sum(row[-1] == grade for row in rows) for grade in ("right", "open", "wrong")}
    print(
        f"{len(sources)} checkpoints in {seconds:.1f} s; {len(together & wanted)} of {len(wanted)} clusters right"
    )
    print("edges:", ", ".join(f"{n} {grade}" for grade, n in grades.items()))
    if given.out:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("parent", "child", "direction", "grade"), *rows])


def graded(edges: tuple, parents: dict[str, set[str]]) -> list[tuple[str, str, str, str]]:
    """Parent, child, what is said of the direction, and the grade of each edge."""
    near = {frozenset((child, parent)) for child, made_from in parents.items() for parent in made_from}
    near |= {frozenset(pair) for made_from in parents.values() for pair in itertools.combinations(made_from, 2)}
    rows = []
    for edge in edges:
        if edge.direction == "unresolved":
            grade = "open"
        elif edge.direction in ("unknown", "vocabulary"):
            grade = "right" if frozenset((edge.parent, edge.child)) in near else "wrong"
        else:
            grade = "right" if edge.parent in parents.get(edge.child, ()) else "wrong"
        rows.append((edge.parent, edge.child, edge.direction, grade))
    return rows


if __name__ == "__main__":
    main()
