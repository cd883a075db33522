"""Comparisons end to end, from where models are kept: the Hub, adapters, damaged and oddly named folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from specbasis import InputError, compare
from specbasis.comparison.compare import plan
from specbasis.comparison.comparison import Comparison
from tests.checkpoint.hub_server import COMMIT, HubServer, serve
from tests.helpers.patience import PATIENCE
from tests.pico import State, bert_state, finetuned, write

EPS = float(torch.finfo(torch.float32).eps)
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CONFIG = {"model_type": "bert", "num_attention_heads": 3, "hidden_size": 12}


def sharded(state: State, cuts: tuple[int, int], config: Any = CONFIG) -> dict[str, bytes]:
    """A repository's files: three shards, cut before these numbers of names, their index and a config."""
    shard = {name: SHARDS[sum(i >= cut for cut in cuts)] for i, name in enumerate(state)}
    files = {s: save({n: v for n, v in state.items() if shard[n] == s}) for s in SHARDS}
    index = {"metadata": {}, "weight_map": shard}
    return files | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": json.dumps(config).encode(),
    }


def on_disk(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def where(files: dict[str, bytes], name: str) -> str:
    shard: str = json.loads(files["model.safetensors.index.json"])["weight_map"][name]
    return shard


def frame(found: Comparison) -> pd.DataFrame:
    columns = ["matrix", "measure", "index", "value", "block", "role"]
    return found.to_pandas()[columns].sort_values(columns[:3]).reset_index(drop=True)


def same_rows(a: Comparison, b: Comparison) -> None:
    pd.testing.assert_frame_equal(frame(a), frame(b), check_exact=True)


# --- the Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, HubServer]]:
    pytest.importorskip("huggingface_hub")
    with serve() as (endpoint, server):
        yield endpoint, server


@pytest.fixture
def hub(running: tuple[str, HubServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A base of six blocks, two in each shard, and a finetune whose shards are cut elsewhere, inside of blocks."""
    from huggingface_hub import close_session, constants

    endpoint, server = running
    server.seen.clear()
    server.faults.clear()
    base = bert_state(blocks=6)
    per_block = (len(base) - 3) // 6
    server.repositories = {
        "org/base": sharded(base, (2 + 2 * per_block, 2 + 4 * per_block)),
        "org/tuned": sharded(finetuned(base), (2 + per_block + 3, 2 + 4 * per_block + 7)),
    }
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, constant in {
        "ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, constant)
    monkeypatch.setattr("specbasis.checkpoint.hub.FIRST_BYTES", FIRST_BYTES)
    close_session()
    return server


FIRST_BYTES = 300
"""So few bytes come with the first request for a header that no tensor is among them."""


def headers(files: dict[str, bytes]) -> dict[str, int]:
    """Bytes of the header of each shard: what opening a model costs."""
    return {shard: 8 + int.from_bytes(files[shard][:8], "little") for shard in SHARDS}


FILTERS: list[dict[str, Any]] = [
    {"blocks": [0]},
    {"blocks": [2, 3], "roles": ["ffn"]},
    {"roles": ["attention.query"], "blocks": [5]},
    {"roles": ["ffn.up"], "blocks": [4]},
    {"roles": ["embedding"]},
    {"roles": ["head"]},
    {"name": "*.1.attention.self.value*"},
    {"name": "encoder.layer.[03].output*", "roles": ["ffn"]},
]


@pytest.mark.parametrize("wanted", FILTERS)
@pytest.mark.parametrize("stream", [True, False])
def test_shards_that_hold_nothing_wanted_cost_their_header_and_no_tensor(
    hub: HubServer, tmp_path: Path, wanted: dict[str, Any], stream: bool
) -> None:
    found = compare("hub:org/base", "org/tuned@v1", tmp_path / "out", stream=stream, **wanted)
    matrices = found.manifest["pairs"][found.pairs[0]]["matrices"]
    assert matrices
    for repository in ("org/base", "org/tuned"):
        files = hub.repositories[repository]
        holding = {where(files, name) for name in matrices}
        assert len(holding) < 3
        for shard in set(SHARDS) - holding:
            assert hub.bodies(f"{repository}/.*{shard}") == headers(files)[shard]
        state = finetuned(bert_state(blocks=6))
        size = sum(state[name].numel() * 4 for name in matrices)
        whole = sum(len(files[s]) for s in holding)
        assert hub.bodies(f"{repository}/.*safetensors$") == sum(headers(files).values()) + (
            size if stream else whole
        )
    assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) is not stream
    local = compare(
        on_disk(tmp_path / "base", hub.repositories["org/base"]),
        on_disk(tmp_path / "tuned", hub.repositories["org/tuned"]),
        **wanted,
    )
    same_rows(found, local)


def test_the_manifest_records_commit_and_digests(hub: HubServer, tmp_path: Path) -> None:
    found = compare("org/base", "org/tuned", tmp_path / "out", stream=True, blocks=[1])
    (about,) = found.manifest["pairs"].values()
    for side, repository in ((found.manifest["base"], "org/base"), (about["tuned"], "org/tuned")):
        assert side["source"] == repository
        assert side["revision"] == COMMIT
        files = hub.repositories[repository]
        assert side["digests"] == {s: "sha256:" + hashlib.sha256(files[s]).hexdigest() for s in SHARDS}
    # The same call on the same folder asks for no tensor again.
    hub.seen.clear()
    again = compare("org/base", "org/tuned", tmp_path / "out", stream=True, blocks=[1])
    opened = sum(sum(headers(hub.repositories[name]).values()) for name in ("org/base", "org/tuned"))
    assert hub.bodies("safetensors$") == opened
    assert frame(again).equals(frame(found))


def test_worker_processes_stream_from_the_hub_too(hub: HubServer, tmp_path: Path) -> None:
    arguments = ["hub:org/base", "hub:org/tuned", "--out", str(tmp_path / "out"), "--stream", "--blocks", "2-3"]
    options = ["--roles", "attention", "--engine", "processes", "--workers", "2", "--no-report"]
    done = subprocess.run(
        [sys.executable, "-m", "specbasis", "compare", *arguments, *options],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 of 8 matrices" in done.stdout
    # Of the other shards each process asks for the first bytes, where the header is, and for nothing else.
    ranges = [seen.range for seen in hub.requests("org/.*0000[13]-of") if seen.host == "files"]
    assert all(asked.startswith("bytes=0-") for asked in ranges)
    # Each process resolves the branch, and reads the headers, for itself.
    assert len(hub.requests("api/models/org/base")) > 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_plan_of_a_stream_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    found = plan("hub:org/base", "hub:org/tuned", stream=True, blocks=[2], roles=["attention"])
    assert len(found.tasks) == 4
    assert hub.bodies("safetensors$") == sum(
        sum(headers(hub.repositories[n]).values()) for n in ("org/base", "org/tuned")
    )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_two_finetunes_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["org/other"] = sharded(finetuned(bert_state(blocks=6), seed=5), (8, 50))
    found = compare("org/base", ["org/tuned", "hub:org/other"], tmp_path / "out", stream=True, blocks=[0])
    assert len(found.pairs) == 2
    for name, others in {"org/base": SHARDS[1:], "org/other": SHARDS[2:]}.items():
        for shard in others:
            assert hub.bodies(f"{name}/.*{shard}") == headers(hub.repositories[name])[shard]


@pytest.mark.parametrize("targets", [["query", "output"], ["value"]])
def test_an_adapter_of_a_base_on_the_hub(hub: HubServer, tmp_path: Path, targets: list[str]) -> None:
    """It adapts every block; of the shards of those that are not asked for no tensor is read, on either side."""
    base = bert_state(blocks=6)
    generator = torch.Generator().manual_seed(3)
    wanted = {"query": "attention.self.query", "value": "attention.self.value", "output": "output.dense"}
    adapter: State = {}
    merged = dict(base)
    for n in range(6):
        for target in targets:
            name = f"encoder.layer.{n}.{wanted[target]}"
            out, inner = base[f"{name}.weight"].shape
            B, A = (torch.randn(*size, generator=generator) for size in ((out, 2), (2, inner)))
            stem = f"base_model.model.{name}.lora_"
            adapter |= {f"{stem}A.weight": A, f"{stem}B.weight": B}
            merged[f"{name}.weight"] = base[f"{name}.weight"] + 2 * B @ A
    hub.repositories["org/adapter"] = {
        "adapter_model.safetensors": save(adapter),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}).encode(),
    }
    found = compare(
        "org/base", "org/adapter", tmp_path / "out", stream=True, blocks=[0], roles=["attention", "ffn"]
    )
    for shard in SHARDS[1:]:
        assert hub.bodies(f"org/base/.*{shard}") == headers(hub.repositories["org/base"])[shard]
    tuned = next(iter(found.manifest["pairs"].values()))["tuned"]
    assert set(tuned["digests"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert tuned["revision"] == COMMIT
    want = frame(compare(base, merged, blocks=[0], roles=["attention", "ffn"]))
    both = frame(found).merge(want, on=["matrix", "measure", "index"])
    both = both[both.measure.isin(["singular_value_tuned", "singular_value_delta", "norm_delta"])]
    assert both.matrix.nunique() == 6
    assert (both.value_x - both.value_y).abs().max() <= 16 * EPS * both.value_y.max()


# --- adapters -----------------------------------------------------------------------------------------------------


def adapter_of(folder: Path, case: str) -> tuple[Path, Path, Path]:
    """Base, adapter and merged model on disk, the last two written by PEFT."""
    peft = pytest.importorskip("peft")
    from tests.checkpoint.test_peft import CASES, shake  # needs transformers

    make, config = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(type(model).from_pretrained(folder / "base"), config())
        shake(tuned)
        tuned.save_pretrained(folder / "adapter")
        whole = type(model).from_pretrained(folder / "base")
        merged = peft.PeftModel.from_pretrained(whole, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "adalora", "Conv1D", "Conv1D dora", "head"])
def test_an_adapter_gives_the_numbers_of_the_merged_model(tmp_path: Path, case: str) -> None:
    base, adapter, merged = adapter_of(tmp_path, case)
    found = compare(base, adapter, tmp_path / "out", workers=1)
    want = compare(base, merged, tmp_path / "want", workers=1)
    about = next(iter(found.manifest["pairs"].values()))
    assert about["matrices"] == next(iter(want.manifest["pairs"].values()))["matrices"]
    files = {Path(file["path"]).name: file["sha256"] for file in about["tuned"]["files"]}
    assert files == {
        name: hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }

    both = frame(found).merge(frame(want), on=["matrix", "measure", "index"], how="outer", suffixes=("", "_want"))
    # Only the vectors of an update beyond its rank are in one of them: noise in the merged model.
    alone = both[both.value.isna() != both.value_want.isna()]
    assert set(alone.measure) <= {"update_alignment_left", "update_alignment_right"}
    assert (alone.index_ if "index_" in alone else alone["index"]).min() >= 2 or alone.empty
    both = both[both.value.notna() & both.value_want.notna()]
    assert both.matrix.nunique() == len(about["matrices"])
    for _, rows in both.groupby("matrix"):
        value = {m: g.sort_values("index")["value"].to_numpy() for m, g in rows.groupby("measure")}
        rounding = 2 * EPS * float(value["norm_tuned"][0])
        delta = value["singular_value_delta"]
        delta = delta[delta > 100 * rounding]
        spectra = (value["singular_value_base"], value["singular_value_tuned"], delta)
        # Vectors turn by the perturbation over the gap, ratios by it over what they are divided by.
        gaps = [abs(s[:-1] - s[1:]).min() for s in spectra if len(s) > 1]
        smallest = min(*gaps, *(s.min() for s in spectra if len(s)), float(value["norm_base"][0]))
        for row in rows.itertuples():
            weights = row.measure.startswith(("singular_value_b", "singular_value_t", "singular_value_d", "norm_"))
            scale = 1.0 if weights else (1 + abs(row.value_want)) * (1 + 1 / value["singular_value_base"].min())
            bound = rounding if weights else rounding / smallest * scale
            assert abs(row.value - row.value_want) <= 4 * bound, (row.matrix, row.measure, row.index)


@pytest.mark.parametrize("case", ["lora", "dora", "adalora", "head"])
def test_what_an_adapter_leaves_alone_has_not_moved_at_all(tmp_path: Path, case: str) -> None:
    base, adapter, _ = adapter_of(tmp_path, case)
    rows = frame(compare(base, adapter, tmp_path / "out", workers=1))
    adapted = ("q_proj", "k_proj", "down_proj", "query", "value", "classifier")
    frozen = rows[[not any(part in name for part in adapted) for name in rows.matrix]]
    assert {"embedding", "attention.output", "ffn.up"} <= set(frozen.role)
    ones = frozen[
        frozen.measure.isin(["alignment_left", "alignment_right", "subspace_overlap_left", "weight_cosine"])
    ]
    zeros = frozen[frozen.measure.isin(["norm_delta", "relative_update", "rsd", "max_rc", "singular_value_delta"])]
    assert (ones.value == 1).all()
    assert (zeros.value == 0).all()
    moved = rows[~rows.matrix.isin(frozen.matrix) & (rows.measure == "norm_delta")]
    assert len(moved)
    assert (moved.value > 0).all()


@pytest.mark.parametrize("scale", ["none", "sigma"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_spectral_adapter_is_read_as_what_it_merges_to(tmp_path: Path, family: str, scale: str) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    from specbasis.adapter import SpectralConfig

    if family == "bert":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **shape))
        targets = ["intermediate.dense", "query"]
    else:
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
        targets = ["c_fc", "c_attn"]
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, SpectralConfig(interval=(2, 9), target_modules=targets, scale=scale))
    for name, parameter in tuned.named_parameters():
        if "spectral_M" in name:
            parameter.data.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = compare(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", workers=1)
    want = compare(tmp_path / "base", tmp_path / "merged", tmp_path / "want", workers=1)
    both = frame(found).merge(frame(want), on=["matrix", "measure", "index"], suffixes=("", "_want"))
    both = both[both.measure.isin(["singular_value_tuned", "singular_value_delta", "relative_update"])]
    assert (both.value - both.value_want).abs().max() < 32 * EPS * both.value.max()
    moved = frame(found)[lambda rows: (rows.measure == "norm_delta") & (rows.value > 0)]
    assert len(moved) == (4 if family == "bert" else 8)  # c_attn is three matrices

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.endswith(("spectral_U", "spectral_Vh"))}
    save_file(bare, tmp_path / "adapter" / "adapter_model.safetensors")
    again = compare(tmp_path / "base", tmp_path / "adapter", workers=1)  # the base is decomposed, and proven
    both = frame(again).merge(frame(found), on=["matrix", "measure", "index"], suffixes=("", "_want"))
    both = both[both.measure.isin(["singular_value_tuned", "singular_value_delta", "relative_update"])]
    assert len(both)
    assert (both.value - both.value_want).abs().max() < 32 * EPS * both.value.max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key != "seal"} | {"basis": "random"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="without its basis, which is not the base's own"):
        compare(tmp_path / "base", tmp_path / "adapter")


# --- names, configs and shards as they come -----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["bert.", "model.text_model.", "module.bert.", "_orig_mod.model.", "net.0."])
@pytest.mark.parametrize("config", [{}, {"model_type": "llama", "hidden_size": 999}, "[]", "{"])
def test_prefixes_and_wrong_configs_change_no_role_and_no_number(tmp_path: Path, prefix: str, config: Any) -> None:
    base = bert_state()
    write(tmp_path / "base" / "model.safetensors", base)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "base" / "config.json").write_text(text)
    write(tmp_path / "tuned.safetensors", {prefix + name: value for name, value in finetuned(base).items()})
    options: dict[str, Any] = {"roles": ["ffn.up", "attention.value"], "workers": 1}
    found = compare(tmp_path / "base", tmp_path / "tuned.safetensors", tmp_path / "out", **options)
    same_rows(found, compare(base, finetuned(base), **options))
    assert frame(found).groupby("role").matrix.nunique().to_dict() == {"attention.value": 2, "ffn.up": 2}


def broken(tmp_path: Path, change: str) -> Path:
    files = sharded(bert_state(), (8, 20))
    if change == "missing":
        del files[SHARDS[1]]
    elif change == "extra":
        files["model-00004-of-00003.safetensors"] = files[SHARDS[0]]
    elif change == "no index":
        del files["model.safetensors.index.json"], files[SHARDS[1]]
    elif change == "unlisted":
        index = json.loads(files["model.safetensors.index.json"])
        index["weight_map"].popitem()
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    elif change == "swapped":
        files[SHARDS[0]], files[SHARDS[1]] = files[SHARDS[1]], files[SHARDS[0]]
    elif change == "cut":
        files[SHARDS[2]] = files[SHARDS[2]][:-16]
    return on_disk(tmp_path / "broken", files)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "model-00002-of-00003.safetensors is missing"),
        ("extra", "model-00004-of-00003.safetensors is here"),
        ("no index", "2 of 3 shards"),
        ("unlisted", "does not list"),
        ("swapped", "does not hold it"),
        ("cut", "truncated or corrupted"),
    ],
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_shards_that_do_not_make_a_model_are_one_line(tmp_path: Path, change: str, said: str, side: str) -> None:
    folder = broken(tmp_path, change)
    good = on_disk(tmp_path / "good", sharded(bert_state(), (8, 20)))
    sources = (folder, good) if side == "base" else (good, folder)
    # Even what the filter excludes is checked where it costs nothing: a folder on disk.
    with pytest.raises(InputError, match=said) as caught:
        compare(*sources, tmp_path / "out", blocks=[0])
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_quick_comparison_takes_an_adapter_whose_update_is_a_product(tmp_path: Path, scale: float) -> None:
    torch.manual_seed(0)
    module, prefix = "bert.encoder.layer.0.intermediate.dense", "base_model.model."
    W, A, B = torch.randn(64, 32), torch.randn(8, 32), scale * torch.randn(64, 8)
    (tmp_path / "lora").mkdir()
    save_file({f"{module}.weight": W}, tmp_path / "base.safetensors")
    factors = {f"{prefix}{module}.lora_A.weight": A, f"{prefix}{module}.lora_B.weight": B}
    save_file(factors, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [module]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    rows = compare(tmp_path / "base.safetensors", tmp_path / "lora", quick=True).to_pandas()
    ratio = rows[rows["measure"] == "singular_value_ratio"].sort_values("index")
    values = [torch.linalg.svdvals(M.double()) for M in (B.double() @ A.double(), W)]
    resolved = ratio["resolved"].to_numpy(dtype=bool)
    assert resolved[:8].any()
    expected = (values[0] / values[1]).numpy()[: len(ratio)]
    assert ratio["value"].to_numpy()[resolved] == pytest.approx(expected[resolved], rel=1e-2, abs=1e-9)
