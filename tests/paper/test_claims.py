"""The page of claims: verdicts follow from intervals, numbers are found by other means, the command writes it."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from typer.testing import CliRunner

from specbasis.cli import app
from specbasis.paper.claims import Measurement, Verdict, claims, markdown, measurements
from specbasis.paper.evidence import NUMBERS, Effect, Results

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "findings" / "claims.md"
TEXT = PAGE.read_text(encoding="utf-8")


def rows_of(name):
    return [json.loads(line) for line in (RESULTS / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(measured, column=2):
    """Number and interval in the line of the page that begins so."""
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {measured} |"))
    return [float(word) for word in re.findall(r"[+-]?\d+\.\d+", re.split(r"(?<!\\)\|", line)[column])]


def student(values):
    values = np.asarray(values, float)
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return [values.mean(), values.mean() - half, values.mean() + half]


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    ran = CliRunner().invoke(
        app, ["reproduce", "claims", "--results", str(RESULTS), "--out", str(tmp_path / "c.md")]
    )
    assert ran.exit_code == 0, ran.output
    written = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert written == TEXT, "docs/findings/claims.md is out of date: run `specbasis reproduce claims`"


def test_every_link_of_the_page_leads_somewhere():
    headings = {
        "".join(c for c in line[4:].lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in TEXT.splitlines()
        if line.startswith("### ")
    }
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 100
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (PAGE.parent / link).is_file(), link


def test_every_claim_is_whole_and_names_what_exists():
    every = claims()["claim"]
    assert len({claim["id"] for claim in every}) == len(every)
    verbs = CliRunner().invoke(app, ["reproduce", "--help"], env={"COLUMNS": "200"}).output
    for claim in every:
        assert all(claim[key] for key in ("title", "where", "states", "refuted")), claim["id"]
        assert claim["part"] in claims()["part"]
        assert "command" in claim or "open" in claim or "test" not in claim or claim["id"] == "share"
        assert "test" in claim or "open" in claim, f"{claim['id']}: neither rows nor how to get some"
        for text in (claim.get("command", ""), claim.get("open", "")):
            for verb in re.findall(r"specbasis reproduce (\w+)", text):
                assert f" {verb} " in verbs, (claim["id"], verb)
        for entry in claim.get("test", ()):
            named = [entry["number"], *(need["number"] for need in entry.get("needs", ()))]
            assert all(number["of"] in NUMBERS for number in named)


def test_without_rows_every_measurement_stands_as_an_empty_cell(tmp_path):
    text = markdown(tmp_path).partition("## Are the leading vectors stable?")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert len(lines) > 200
    for line in lines:
        assert "no rows" in line or "as the paper prints it" in line or "| counted |" in line, line
        assert "no rows" not in line or re.search(r"\| – \| – \|", line), line


# --- verdicts -----------------------------------------------------------------------------------------------------


def measurement(low, high, region, beyond=None, margin=0.0, unmet=""):
    effect = Effect((low + high) / 2, low, high, "")
    return Measurement(
        "", "", "g", region, effect, None if beyond is None else Effect(0, *beyond, ""), margin, unmet
    )


ENDS = st.tuples(st.floats(-10, 10), st.floats(-10, 10)).map(sorted)
REGIONS = st.one_of(ENDS, ENDS.map(lambda e: (e[0], math.inf)), ENDS.map(lambda e: (-math.inf, e[1])))


@given(ENDS, REGIONS, st.none() | ENDS, st.floats(0, 1))
def test_a_verdict_says_no_more_than_the_interval_allows(ends, region, beyond, margin):
    low, high = ends
    verdict, why = measurement(low, high, region, beyond, margin).verdict
    inside, outside = region[0] <= low and high <= region[1], high < region[0] or low > region[1]
    assert (verdict is Verdict.CONTRADICTED) == outside
    if verdict in (Verdict.SUPPORTED, Verdict.SIZE):
        assert inside
    if verdict is Verdict.SUPPORTED and beyond:
        assert beyond[0] > 0, "more than size, and the interval says so"
    if verdict is Verdict.SIZE:
        assert beyond[0] <= 0 < margin - beyond[1]
    assert bool(why) == (verdict is Verdict.UNTESTED)
    # A longer interval never turns what is undecided into a verdict.
    wider = measurement(low - 1, high + 1, region, beyond and (beyond[0] - 1, beyond[1] + 1), margin).verdict[0]
    assert verdict is not Verdict.UNTESTED or wider is Verdict.UNTESTED


def test_what_cannot_speak_gets_no_verdict():
    assert measurement(5, 6, (0, 1), unmet="nothing transferred").verdict == (
        Verdict.UNTESTED,
        "nothing transferred",
    )
    assert measurement(math.nan, math.nan, (0, 1)).verdict[0] is Verdict.UNTESTED
    assert Measurement("", "", "g", (0, 1), None, None, 0, "").verdict == (Verdict.UNTESTED, "no rows")
    # A region is met by the ends themselves; by one finetune alone it is not.
    assert measurement(0, 1, (0, 1)).verdict[0] is Verdict.SUPPORTED
    assert measurement(-math.inf, math.inf, (0, math.inf)).verdict[0] is Verdict.UNTESTED


def test_only_what_did_not_run_has_no_rows():
    """A number that is misnamed would stand as an empty cell, too."""
    tables = TEXT.partition("## Are the leading vectors stable?")[2].splitlines()
    empty = [line.split("|")[1].strip() for line in tables if line.endswith("no rows |")]
    assert sorted(empty) == sorted(["–", "–", "–", "MiniLM, CoLA, K = 150: leading − random basis"])
    cells = [
        [cell.strip() for cell in line[2:-2].split(" | ")]
        for line in tables
        if line.endswith("** |") or "**:" in line
    ]
    controlled = [line for line in cells if len(line) == 6]
    assert len(controlled) > 30
    without = [line[0] for line in controlled if line[4] == "–"]
    assert [text[:22] for text in without] == ["MiniLM, six finetunes "]


def test_a_claim_that_is_not_decided_says_how_it_could_be():
    sections = re.split(r"\n### ", TEXT)[1:]
    assert len(sections) == len(claims()["claim"])
    for section in sections:
        assert "**not testable here**" not in section or "\n- To test it: " in section, section[:80]


def test_formation_has_no_verdict_on_alignment_where_nothing_transferred():
    results = Results(RESULTS)
    for claim in claims()["claim"]:
        if claim["id"] in ("scale", "random-labels", "review-scratch"):
            for test in measurements(claim, results):
                assert test.verdict[0] is Verdict.UNTESTED
                assert "pretraining did not" in test.verdict[1]


# --- numbers, by other means --------------------------------------------------------------------------------------


def test_alignment_beside_a_random_update_of_equal_size():
    rows = pd.read_csv(RESULTS / "population" / "published" / "nulls.csv")
    tcr = rows[rows.pair.str.startswith("tcr_4_2") & (rows.ranks == "1-10")]
    of_matrix = tcr.groupby("matrix")[["alignment", "gaussian"]].mean()
    measured = "ANARCII antibody_4_2 → tcr, all matrices, mean of ranks 1–10"
    assert shown(measured) == pytest.approx(student(of_matrix.alignment), abs=6e-5)
    assert shown(measured, 5) == pytest.approx(student(of_matrix.alignment - of_matrix.gaussian), abs=6e-5)


def test_attention_less_feed_forward_layers():
    parts = pd.read_csv(RESULTS / "population" / "finetunes" / "parts.csv")
    parts = parts[parts.pair.isin(["full-sst2", "full-stsb", "full-cola", "full-rte", "sst2", "model_weights"])]
    parts = parts.assign(top=parts[["top30_left", "top30_right"]].mean(axis=1)).pivot_table("top", "pair", "part")
    moved = parts["attention.output"] - parts[["ffn.up", "ffn.down"]].mean(axis=1)
    measured = "MiniLM, six finetunes, leading 30 ranks: attention's output − mean of the feed-forward matrices"
    assert shown(measured) == pytest.approx(student(moved), abs=6e-5)


def test_share_of_the_update_in_the_leading_block():
    of_task = {}
    for row in rows_of("anatomy"):
        up = [m for name, m in row["values"]["matrices"].items() if name.endswith("intermediate.dense")]
        of_task.setdefault(row["cell"]["task"], []).append(np.mean([m["150"]["leading"] for m in up]))
    assert {len(seeds) for seeds in of_task.values()} == {3}
    shares = [np.mean(seeds) for seeds in of_task.values()]
    measured = (
        "twelve full finetunes of MiniLM on GLUE, FFN up: share of ‖Δ‖² in the leading 150 × 150 block (of 384)"
    )
    assert shown(measured) == pytest.approx(student(shares), abs=6e-4)


def test_scores_of_edited_finetunes():
    scores = [
        row["values"]["scores"]["base vectors"] for row in rows_of("anatomy") if row["cell"]["task"] == "stsb"
    ]
    wanted = [np.mean([s["difference"] for s in scores]), min(s["interval"][0] for s in scores)]
    wanted = [100 * x for x in (*wanted, max(s["interval"][1] for s in scores))]
    assert shown("MiniLM, STS-B, 36 matrices: the base's vectors, the tuned values") == pytest.approx(
        wanted, abs=0.06
    )


def test_swaps_less_noise_of_the_same_norm():
    cells = [
        row
        for row in rows_of("interventions/minilm")
        if (row["cell"].get("tuned"), row["cell"].get("roles"), row["cell"].get("ranks")) == ("stsb", "ffn", 30)
    ]
    swap = next(r["values"] for r in cells if r["cell"]["kind"] == "swap" and r["cell"]["source"] == "base")
    noise = [r["values"] for r in cells if r["cell"]["kind"] == "noise"]
    assert len(noise) == 3
    measured = "MiniLM, STS-B, feed-forward, 30 of 384 ranks"
    wanted = [100 * swap[f"pearson.{end}"] for end in ("change", "change_low", "change_high")]
    assert shown(measured) == pytest.approx(wanted, abs=0.006)
    least = swap["pearson.change_low"] - max(n["pearson.change_high"] for n in noise)
    assert shown(measured, 5)[1] == pytest.approx(100 * least, abs=0.006)


def test_rise_of_the_alignment_with_the_pretraining_set():
    final = {}
    for row in rows_of("formation"):
        cell = row["cell"]
        if cell["phase"] == "post" and cell["task"] == "same_task":
            inside = [m for m in row["values"]["matrices"].values() if m["block"] == 5 and "ffn" in m["role"]]
            final[cell["seed"], cell["images"]] = np.mean([m["first"][-1] for m in inside])
    slopes = [(final[seed, 16_000] - final[seed, 1_000]) / 4 for seed in (0, 1, 2)]
    measured = (
        "1 000 and 16 000 images, 300 steps, then same task, held-out images: "
        "final FFN, rise of the final alignment per doubling"
    )
    assert shown(measured) == pytest.approx(student(slopes), abs=6e-4)


def test_methods_of_table_1_and_their_training_losses():
    runs = {}
    for row in rows_of("table1"):
        cell = row["cell"]
        if (
            cell["task"] == "sst2"
            and cell.get("examples") == 8000
            and not {"interval", "blocks", "rank"} & set(cell)
        ):
            runs.setdefault(cell["method"], {})[cell["seed"]] = row["values"]
    assert set(runs["full"]) == set(runs["spectral"]) == {42, 43, 44}
    moved = [runs["spectral"][seed]["score"] - runs["full"][seed]["score"] for seed in (42, 43, 44)]
    mean, low, high = shown("MiniLM, SST-2, K = 150 (90 000 parameters) − full finetuning")
    assert mean == pytest.approx(100 * np.mean(moved), abs=0.006)
    over_seeds = [100 * end for end in student(moved)]
    assert low <= over_seeds[1] + 0.006, "the wider interval at either end"
    assert high >= over_seeds[2] - 0.006
    losses = [
        runs["spectral-middle"][seed]["train_loss"][-1] - runs["spectral"][seed]["train_loss"][-1]
        for seed in (42, 43, 44)
    ]
    measured = "MiniLM, SST-2, K = 150, loss on the 8 000 training sentences, epoch 2: middle ranks − leading ranks"
    assert shown(measured) == pytest.approx(student(losses), abs=6e-5)


def test_bases_on_held_out_sentences():
    row = next(
        r for r in rows_of("basis") if r["cell"] == {**r["cell"], "task": "sst2", "size": 8, "stage": "runs"}
    )
    of = {name: [a["score"] for a in row["values"]["arms"] if a["basis"] == name] for name in ("leading", "random")}
    assert shown("MiniLM, SST-2, K = 8: leading − random basis")[0] == pytest.approx(
        100 * (np.mean(of["leading"]) - np.mean(of["random"])), abs=0.006
    )


def test_size_against_alignment():
    with (RESULTS / "population" / "published" / "fig19.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["rank"] == "1" and row["side"] == "right"]
    rho = stats.spearmanr([float(p["ratio"]) for p in points], [float(p["alignment"]) for p in points]).statistic
    measured = (
        "feed-forward matrices of five published finetunes (four bases), right vectors at rank 1: "
        "Spearman's correlation"
    )
    assert shown(measured)[0] == pytest.approx(rho, abs=0.006)
