"""What an intervention costs beside the judging of it, and what a grid of 200 edits holds in memory.

    python benchmarks/interventions.py TUNED BASE [--sentences 300] [--edits 200] [--turns 5]

TUNED and BASE are folders of a BERT-like encoder, such as a sentence encoder and its finetune. Judging is a forward
pass over sentences of 32 tokens. An edit is made, measured (its size is in every row) and taken back. Processor
time is compared, in turns of one judging and one edit, so that what other programs on the machine do hits both.
Memory is the growth of what the process holds for itself (anonymous pages: files that are mapped, which the kernel
can drop at any time, do not count), the largest value seen while the grid runs, its live model included, over what
there was before it. A model was loaded, judged and dropped before, so that libraries do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from specbasis import Edit, Subject, edited, intervene, matrix_edits
from specbasis.checkpoint import open_checkpoint
from specbasis.interventions.live import state
from specbasis.interventions.stage import Setting, Size, Stage, admitted
from specbasis.jobs.cache import Cache

EDITS = (
    *(Edit("swap", ranks) for ranks in (1, 30, 200, "all")),
    *(Edit(kind, ranks) for kind in ("random", "random_complement", "zero") for ranks in (30, 200)),
    Edit("random", "all"),
    Edit("noise", 30),
    Edit("noise", "all"),
)


def anonymous() -> int:
    """Bytes of anonymous resident pages of this process (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon")


class Peak(threading.Thread):
    """The largest value of `anonymous` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.going = 0, True

    def run(self) -> None:
        """Look every two milliseconds."""
        while self.going:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)


def load(source: str) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(source).eval()


class Judge:
    """Cosines of sentences with the first of their batch: one score a sentence."""

    def __init__(self, sentences: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, 20000, (sentences, 32), generator=generator)

    def __call__(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The cosine of every sentence."""
        with torch.inference_mode():
            out = torch.cat([model(input_ids=ids).last_hidden_state.mean(1) for ids in self.ids.split(32)])
        return {"cosine": torch.cosine_similarity(out, out[:1])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tuned")
    parser.add_argument("base")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cost(given, folder)
        memory(given, folder)


def cost(given: argparse.Namespace, folder: str) -> None:
    judge = Judge(given.sentences)
    subject = Subject(given.tuned, judge, load)
    stage = Stage(Setting(given.base, {"tuned": subject}, Cache(Path(folder) / "factors", 10**11), 0), "tuned")
    base = open_checkpoint(given.base)
    print(f"judging {given.sentences} sentences of 32 tokens; medians of {given.turns} turns of processor time")
    for roles in ("ffn", "attention"):
        for edit in EDITS:
            places = matrix_edits(edit, state(stage.model), base, admits=admitted(roles, ""), factors=stage.factors)
            edits = {ref: Size().of(one) for ref, one in places.items()}  # as a grid does
            with edited(stage.model, edits, originals=stage.originals):
                pass  # decomposes
            shares = []
            for _ in range(given.turns):
                started = time.process_time()
                judge(stage.model)
                judged = time.process_time()
                with edited(stage.model, edits, originals=stage.originals):
                    pass
                shares.append(((time.process_time() - judged) / (judged - started), judged - started))
            share, judging = (statistics.median(one) for one in zip(*shares, strict=True))
            print(
                f"{roles:9} {edit.kind:17} {edit.ranks!s:3}: {len(edits)} matrices, {share:5.1%} of {judging:.2f} s"
            )


def memory(given: argparse.Namespace, folder: str) -> None:
    judge = Judge(8)
    model = load(given.tuned)
    judge(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(
        (p.shape for p in model.parameters() if p.ndim == 2 and p.shape[0] < 20000), key=lambda s: s[0] * s[1]
    )
    factors = 8 * (sum(largest) * min(largest))
    del model
    # Decompositions are made before: they are the same whatever is edited later, and made once.
    kept = Cache(Path(folder) / "factors", 10**11)
    for source in (given.base, given.tuned):
        checkpoint = open_checkpoint(source)
        for name, entry in checkpoint.entries.items():
            if len(entry.shape) == 2 and ".layer." in name:
                kept.decompose(checkpoint[name])
    sizes = [n + 1 for n in range(given.edits // 2 - 1)]
    subject = Subject(given.tuned, judge, load)
    before = anonymous()
    peak = Peak()
    peak.start()
    rows = intervene(
        given.base, {"tuned": subject}, f"{folder}/grid", kinds=("swap",), ranks=sizes, roles=("ffn",), seeds=0,
        cache=kept.folder, cache_size="100GB", resamples=0,
    )  # fmt: skip
    peak.going = False
    peak.join()
    assert all(row.error is None for row in rows), rows[-1].error
    found = {
        "edits": len(rows) - 1,
        "model_MB": round(weights / 1e6, 1),
        "factors_of_the_largest_matrix_MB": round(factors / 1e6, 1),
        "growth_MB": round((peak.most - before) / 1e6, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
