"""What `compare` returns: rows, a manifest, and what they add up to."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.comparison.check import Finding, thresholds
from specbasis.comparison.facts import Facts, by_pair
from specbasis.comparison.findings import find
from specbasis.comparison.headline import headline
from specbasis.comparison.summary import RoleSummary, own_means, summarise
from specbasis.comparison.verdict import Verdict, judge
from specbasis.core.brief import WIDTH, clipped
from specbasis.core.extras import require
from specbasis.core.text import number_of
from specbasis.jobs import results as store
from specbasis.jobs.folder import plain
from specbasis.jobs.results import Kept

if TYPE_CHECKING:
    import pandas as pd


class Comparison(Kept):
    """What `compare` returns: rows, a manifest, and what they add up to."""

    @cached_property
    def pairs(self) -> list[str]:
        """The labels of the tuned checkpoints that have rows."""
        present = set(self.rows["pair"].unique().to_pylist())
        return [label for label in self.manifest["pairs"] if label in present]

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """For each pair: its rows and what they say of each matrix, read once for all that follows."""
        facts = by_pair(self.rows, self.pairs, self.failed, self.skipped)
        others = {label: self.manifest["pairs"][label].get("other_base", "") for label in facts}
        return {label: replace(of, other_base=others[label]) for label, of in facts.items()}

    @cached_property
    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """For each pair what was not compared (name, side, reason), and what should have rows and has none."""
        reason = "without rows: the comparison was not finished, or they were lost; run it again"
        failed = {(failure["pair"], failure["matrix"]) for failure in self.failed}
        return {
            label: [
                *about["skipped"],
                *(
                    {"name": name, "side": "both", "reason": reason}
                    for name in about["matrices"]
                    if (label, name) not in failed and not self.results.part(label, name).exists()
                ),
            ]
            for label, about in self.manifest["pairs"].items()
        }

    @cached_property
    def summaries(self) -> dict[str, list[RoleSummary]]:
        """For each pair: one line per role, and one over all matrices."""
        return {label: summarise(facts) for label, facts in self.facts.items()}

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """For each pair: what it is, with the evidence; see `specbasis.comparison.verdict.judge`."""
        return {label: judge(facts) for label, facts in self.facts.items()}

    @cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """For each pair: what a user of it should know, problems first; see `specbasis.comparison.findings`."""
        return {label: find(facts, self.verdicts[label]) for label, facts in self.facts.items()}

    @cached_property
    def headlines(self) -> dict[str, str]:
        """For each pair: what it is, how far it moved, and whether anything is wrong, in one line."""
        facts = self.facts.items()
        return {label: headline(of, self.verdicts[label], self.findings[label]) for label, of in facts}

    @cached_property
    def own(self) -> dict[str, list[dict[str, Any]]]:
        """For each pair: a user's own measures by role; empty without any. See `summary.own_means`."""
        names = [measure["name"] for measure in self.manifest.get("measures", [])]
        return {label: own_means(facts, names) for label, facts in self.facts.items()}

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Matrices that could not be decomposed: pair, matrix, error."""
        return list(self.manifest["failed"])

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a pandas DataFrame (needs the extra ``report``)."""
        require("pandas", purpose="to_pandas needs")
        frame: pd.DataFrame = self.rows.to_pandas()
        return frame

    def summary(self) -> dict[str, Any]:
        """Verdicts, findings and summaries as plain data for JSON; null for what is not a finite number.

        Keys: thresholds (as of `specbasis.comparison.check.thresholds`), base, folder, failed, and pairs, which has
        for each label verdict, findings and summaries with the fields of `Verdict`, `Finding` and `RoleSummary`,
        not_compared (name, side, reason, size), and own, the user's own measures by role.
        """
        pairs = {
            label: {
                "tuned": self.manifest["pairs"][label]["tuned"]["source"],
                "verdict": asdict(self.verdicts[label]),
                "not_compared": self.skipped[label],
                "findings": [asdict(finding) for finding in self.findings[label]],
                "summaries": [asdict(line) for line in self.summaries[label]],
                "own": self.own[label],
            }
            for label in self.pairs
        }
        whole = {"base": self.manifest["base"]["source"], "folder": str(self.folder), "failed": self.failed}
        content: dict[str, Any] = plain({"thresholds": thresholds()} | whole | {"pairs": pairs})
        return content

    def report(self, path: str | Path | None = None, *, figures: bool = True) -> Path:
        """Write the page, and the same figures as PNG and SVG beside it; returns the page's path.

        Args:
            path: the page's file; default `report.html` in the results folder.
            figures: False writes the page alone, which is several times as fast.
        """
        # A value knows no view: this and the next are the only late imports of a room further down.
        from specbasis.figures import write_report

        return write_report(self, Path(path) if path else self.folder / "report.html", figures=figures)

    def __repr__(self) -> str:
        finetunes = number_of(len(self.pairs), "finetune")
        of = f"Comparison of {self.manifest['base']['source']} with {finetunes}, in {self.folder}"
        lines = [f"{label}: {self.headlines[label]}" for label in self.pairs[:4]]
        return clipped("\n".join(textwrap.shorten(line, WIDTH, placeholder=" …") for line in (of, *lines)))

    def _repr_html_(self) -> str:
        from specbasis.figures.summary import summary_html

        return summary_html(self)


def load(folder: str | Path) -> Comparison:
    """Open the results that an earlier `compare` left in a folder.

    Raises:
        InputError: the folder holds no results, or damaged ones; what `extract`, `repair` and `merge` wrote is read
            by `Extraction.load`, `Repair.load` and `Merging.load`.
    """
    results = store.load(Path(folder))
    return Comparison(results, results.rows())
