"""The Hub path, driven end to end against a server on 127.0.0.1 that speaks the endpoints the client uses."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save, save_file

from specbasis.architecture.pair import pair
from specbasis.checkpoint import (
    ABSENT,
    content_sha256,
    hub as hub_of_checkpoints,
    open_checkpoint,
    open_tuned,
    regular,
)
from specbasis.checkpoint.formats.safetensors import _parse_header
from specbasis.checkpoint.hub import Address, parse_address
from specbasis.checkpoint.patience import RETRIES
from specbasis.core.errors import InputError
from tests.helpers.patience import PATIENCE

pytest.importorskip("huggingface_hub")

from huggingface_hub import close_session, constants

from .hub_server import COMMIT, Fault, serve

NAMES = [f"layer.{i}.weight" for i in range(6)]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(20, 10, generator=generator) for name in NAMES}


def header_bytes(content):
    return 8 + int.from_bytes(content[:8], "little")


def sharded(want):
    """Three shards of two tensors each, with an index, as files of a repository."""
    shard = {name: f"model-0000{i // 2 + 1}-of-00003.safetensors" for i, name in enumerate(want)}
    files = {s: save({n: want[n] for n in want if shard[n] == s}) for s in sorted(set(shard.values()))}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shard}).encode()
    return files


@pytest.fixture(scope="module")
def running():
    with serve() as (endpoint, server):
        yield endpoint, server


@pytest.fixture
def hub(running, tmp_path, monkeypatch):
    """A fresh Hub with one sharded and one small model, an empty cache, and a clock that does not wait."""
    endpoint, server = running
    server.repositories.clear()
    server.seen.clear()
    server.faults.clear()
    server.listed.clear()
    server.repositories["org/big"] = {**sharded(tensors()), "config.json": b'{"model_type": "bert"}'}
    server.repositories["org/small"] = {"model.safetensors": save(tensors(1)), "config.json": b"{}"}
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    server.waits = []
    monkeypatch.setattr(time, "sleep", server.waits.append)
    server.cache = tmp_path / "cache"
    close_session()
    return server


def same(checkpoint, want):
    assert list(checkpoint) == list(want)
    for name, tensor in want.items():
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint[name], tensor)


def read_all(source, **options):
    checkpoint = open_checkpoint(source, **options)
    return {name: checkpoint[name] for name in checkpoint}


def refused(source, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        read_all(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is fetched ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("source", ["hub:org/big", "org/big", "hub:org/big@v1", "hub:org/big@refs/pr/1",
                                    f"hub:org/big@{COMMIT}"])  # fmt: skip
def test_every_form_of_address_gives_the_model_at_its_commit(hub, source, stream):
    checkpoint = open_checkpoint(source, stream=stream)
    same(checkpoint, tensors())
    assert checkpoint.revision == COMMIT
    assert checkpoint.config == {"model_type": "bert"}
    assert checkpoint.source == source
    assert content_sha256(checkpoint) == content_sha256(open_checkpoint(tensors()))
    # After the branch is resolved, every file is asked for by commit: it cannot move under a running comparison.
    assert all(f"/resolve/{COMMIT}/" in seen.path for seen in hub.requests("/resolve/"))


@pytest.fixture
def first_bytes(monkeypatch):
    """So many bytes of a shard come with its header that the header is among them, and no tensor whole."""
    monkeypatch.setattr(hub_of_checkpoints, "FIRST_BYTES", 300)
    return 300


def test_opening_asks_for_the_header_of_each_shard_once_and_for_all_at_once(hub, first_bytes, monkeypatch):
    together = threading.Barrier(3, timeout=PATIENCE)  # breaks unless three requests are under way at the same time
    read_range = hub_of_checkpoints._read_range
    monkeypatch.setattr(hub_of_checkpoints, "_read_range", lambda *given: (together.wait(), read_range(*given))[1])
    checkpoint = open_checkpoint("org/big")
    assert [checkpoint.entries[name].shape for name in checkpoint] == [(20, 10)] * 6
    assert list(checkpoint) == NAMES
    ranges = [seen.range for seen in hub.requests("safetensors$") if seen.host == "files"]
    assert ranges == ["bytes=0-299"] * 3
    assert hub.bodies("safetensors$") == 3 * first_bytes


def test_a_header_longer_than_the_first_bytes_costs_a_second_request(hub, monkeypatch):
    monkeypatch.setattr(hub_of_checkpoints, "FIRST_BYTES", 50)
    same(open_checkpoint("org/small", stream=True), tensors(1))
    stop = header_bytes(hub.repositories["org/small"]["model.safetensors"])
    ranges = [seen.range for seen in hub.requests("safetensors$") if seen.host == "files"]
    assert ranges[:2] == ["bytes=0-49", f"bytes=50-{stop - 1}"]


def test_streaming_fetches_the_wanted_tensors_and_no_other(hub, first_bytes):
    checkpoint = open_checkpoint("hub:org/big", stream=True)
    hub.seen.clear()
    assert torch.equal(checkpoint["layer.2.weight"], tensors()["layer.2.weight"])
    wanted = "model-00002-of-00003.safetensors"
    assert not hub.requests("00001-of|00003-of")
    start = header_bytes(hub.repositories["org/big"][wanted])
    assert [seen.range for seen in hub.requests(wanted) if seen.host == "files"] == [f"bytes={start}-{start + 799}"]
    assert not list(hub.cache.rglob("*"))


def test_a_part_of_a_tensor_is_its_own_byte_range(hub, first_bytes):
    checkpoint = open_checkpoint("hub:org/big", stream=True)
    hub.seen.clear()
    part = checkpoint.entries["layer.3.weight"].part(30, 70)
    assert torch.equal(part, tensors()["layer.3.weight"].flatten()[30:70])
    wanted = "model-00002-of-00003.safetensors"
    start = header_bytes(hub.repositories["org/big"][wanted]) + 800 + 4 * 30
    assert [seen.range for seen in hub.requests(wanted) if seen.host == "files"] == [f"bytes={start}-{start + 159}"]
    assert open_checkpoint("hub:org/small").entries["layer.0.weight"].part is None


def test_without_streaming_only_the_wanted_shard_is_downloaded(hub, first_bytes):
    checkpoint = open_checkpoint("hub:org/big")
    wanted = "model-00002-of-00003.safetensors"
    for name in ("layer.2.weight", "layer.3.weight"):
        assert torch.equal(checkpoint[name], tensors()[name])
    assert hub.bodies(wanted) == first_bytes + len(hub.repositories["org/big"][wanted])
    assert hub.bodies("00001-of|00003-of") == 2 * first_bytes


def test_a_filter_downloads_the_shards_of_what_it_admits(hub, first_bytes):
    pairing = pair(open_checkpoint("org/big"), open_checkpoint(tensors(1)), admits=lambda key: key.block == 2)
    (matched,) = pairing.matched
    assert torch.equal(matched.base.read(open_checkpoint("org/big")), tensors()["layer.2.weight"])
    assert hub.bodies("00001-of") == 2 * first_bytes


def test_a_second_run_takes_everything_from_the_cache(hub):
    same(open_checkpoint("hub:org/big"), tensors())
    hub.seen.clear()
    same(open_checkpoint("hub:org/big"), tensors())
    assert not hub.requests("/files/|/resolve/")


def test_streaming_uses_what_is_in_the_cache(hub):
    same(open_checkpoint("hub:org/big"), tensors())
    hub.seen.clear()
    same(open_checkpoint("hub:org/big", stream=True), tensors())
    assert not hub.requests("/files/|/resolve/")


def test_safetensors_are_preferred_and_the_rest_is_not_touched(hub):
    hub.repositories["org/small"]["pytorch_model.bin"] = b"\x80 not asked for"
    hub.repositories["org/small"]["tf_model.h5"] = b"\x89HDF not asked for"
    same(open_checkpoint("org/small"), tensors(1))
    assert not hub.requests("bin$|h5$")


def test_a_repository_of_torch_files(hub, tmp_path):
    torch.save({"model": tensors(), "ema": tensors(1)}, tmp_path / "x.bin")
    hub.repositories["org/old"] = {"pytorch_model.bin": (tmp_path / "x.bin").read_bytes()}
    same(open_checkpoint("hub:org/old#ema"), tensors(1))
    hub.repositories["org/old2"] = hub.repositories["org/old"]
    refused("hub:org/old2#ema", "cannot be streamed", stream=True)


def test_a_repository_of_another_framework_is_refused_before_it_is_downloaded(hub):
    hub.repositories["org/tf"] = {
        "tf_model.h5": bytes(10_000), "config.json": b'{"architectures": ["TFBertModel"]}'
    }  # fmt: skip
    refused("org/tf", "TensorFlow.*transformers.BertModel.from_pretrained.*from_tf=True")
    assert not hub.requests("h5")


@pytest.mark.parametrize("stream", [False, True])
def test_a_configuration_too_large_to_be_one_is_refused_before_it_is_fetched(hub, monkeypatch, stream):
    monkeypatch.setattr(regular.small, "__defaults__", (10_000,))
    hub.repositories["org/large"] = {**hub.repositories["org/small"], "config.json": b"{" + b" " * 20_000 + b"}"}
    refused("org/large", "config.json: has 20002 bytes; want a file of at most 10000", stream=stream)
    assert not hub.requests("large.*config.json")


def test_subfolders_and_single_files(hub):
    files = hub.repositories["org/pipe"] = {
        f"unet/{name}": content for name, content in hub.repositories["org/big"].items()
    }
    files |= {
        "extra/a.safetensors": save(tensors(2)),
        "extra/b.safetensors": save(tensors(3)),
        "model_index.json": b"{}",
    }
    same(open_checkpoint("hub:org/pipe/unet"), tensors())
    same(open_checkpoint("hub:org/pipe@main/unet", stream=True), tensors())
    same(open_checkpoint("hub:org/pipe@main/extra/b.safetensors", stream=True), tensors(3))
    refused("hub:org/pipe/extra", "several weights files")
    assert "extra, unet" in refused("hub:org/pipe", "no weights in this folder")
    refused("hub:org/pipe/none", "no file or folder none")


def test_a_timm_name(hub):
    hub.repositories["timm/tiny.tag_in1k"] = hub.repositories["org/small"]
    same(open_checkpoint("timm:tiny.tag_in1k"), tensors(1))
    assert "timm" not in sys.modules
    refused("timm:tiny", "pretrained tag")


def test_a_local_path_wins(hub, tmp_path):
    (tmp_path / "org").mkdir()
    save_file(tensors(5), tmp_path / "org" / "small")
    same(open_checkpoint("org/small"), tensors(5))
    assert not hub.seen
    refused("org/missing.safetensors", "no such file")
    assert not hub.seen


def test_provenance_comes_from_the_hub(hub):
    files = hub.repositories["org/big"]
    shards = [name for name in files if name.endswith(".safetensors")]
    for stream in (True, False):
        checkpoint = open_checkpoint("org/big", stream=stream)
        assert checkpoint.files == ()
        assert checkpoint.digests == {name: "sha256:" + hashlib.sha256(files[name]).hexdigest() for name in shards}


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_goes_to_the_hub_and_not_to_the_file_host(hub, monkeypatch, stream):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    same(open_checkpoint("org/small", stream=stream), tensors(1))
    assert {seen.token for seen in hub.seen if seen.host == "hub"} == {"Bearer hf_secret"}
    assert {seen.token for seen in hub.seen if seen.host == "files"} == {""}


def test_an_adapter_on_the_hub(hub, first_bytes):
    torch.manual_seed(0)
    B, A = torch.randn(20, 2), torch.randn(2, 10)
    prefix = "base_model.model.layer.1.lora_"
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2}
    hub.repositories["org/adapter"] = {
        "adapter_model.safetensors": save({prefix + "A.weight": A, prefix + "B.weight": B}),
        "adapter_config.json": json.dumps(config).encode(),
    }
    base = open_checkpoint("org/big", stream=True)
    tuned = open_tuned("hub:org/adapter", base, stream=True)
    assert torch.allclose(tuned["layer.1.weight"], tensors()["layer.1.weight"] + 2 * B @ A, atol=1e-5)
    assert hub.bodies("00002-of|00003-of") == 2 * first_bytes
    assert list(tuned) == list(base)
    assert tuned.revision == COMMIT
    assert set(tuned.digests) == {"adapter_model.safetensors", "adapter_config.json"}  # its scale is in the config
    refused("hub:org/adapter", "does not name its base")


# --- offline ------------------------------------------------------------------------------------------------------


def test_offline_reads_the_cache_and_only_the_cache(hub, monkeypatch):
    open_checkpoint("org/big")["layer.2.weight"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    for source in ("org/big", "hub:org/big@main", f"hub:org/big@{COMMIT}"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.revision == COMMIT
        assert torch.equal(checkpoint["layer.3.weight"], tensors()["layer.3.weight"])
        assert checkpoint.entries["layer.0.weight"].dtype == ABSENT
        with pytest.raises(InputError, match=r"00001-of-00003.*not in the cache and HF_HUB_OFFLINE is set"):
            checkpoint["layer.0.weight"]
        pairing = pair(checkpoint, open_checkpoint(tensors(1)))
        assert [m.key.name for m in pairing.matched] == ["layer.2.weight", "layer.3.weight"]
        assert {"in a file that is not in the cache" in s.reason for s in pairing.skipped} == {True}
    refused("org/small", "HF_HUB_OFFLINE is set and org/small at main is not in the cache")
    refused("org/big", "nothing can be streamed", stream=True)
    assert not hub.seen


# --- failures -----------------------------------------------------------------------------------------------------


def test_what_is_not_there(hub):
    refused("hub:org/none", "no repository org/none.*HF_TOKEN")
    refused("org/none", "no such local path")
    refused("hub:org/big@gone", "org/big has no revision gone")
    del hub.repositories["org/big"]["model-00002-of-00003.safetensors"]
    refused("org/big", "model-00002-of-00003.safetensors is missing from org/big")


def test_access_that_is_not_given(hub):
    hub.faults = [Fault("api/models/org/big", 403, {"X-Error-Code": "GatedRepo"})]
    refused("org/big", "org/big is gated.*hf auth login.*HF_TOKEN")
    # The listing of a gated repository is public; its files are not.
    hub.faults = [Fault("resolve/.*safetensors$", 403, {"X-Error-Code": "GatedRepo"})]
    refused("org/big", "org/big is gated")
    refused("org/big", "org/big is gated", stream=True)
    hub.faults = [Fault("resolve/.*safetensors$", 403)]
    refused("org/big", "forbidden to this token")
    hub.faults = [Fault("api/models", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})]
    refused("org/big", "no repository.*log in")
    assert not hub.waits


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["hub/api/models", "files/files/.*00002-of"])
@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_what_can_pass_is_tried_again_after_eight_seconds_and_more(hub, where, status, stream):
    hub.faults = [Fault(where, status, times=2)]
    same(open_checkpoint("org/big", stream=stream), tensors())
    assert [wait for wait in hub.waits if wait >= 8][:2] == [8, 16]


def test_the_wait_that_the_server_asks_for_wins(hub):
    hub.faults = [Fault("hub/api", 429, {"Retry-After": "3"}, times=1), Fault("hub/api", 429, times=1)]
    same(open_checkpoint("org/small", stream=True), tensors(1))
    assert hub.waits == [3, 16]


def test_a_limit_that_stays_is_reported_after_five_retries(hub):
    hub.faults = [Fault("hub/api", 429)]
    refused("org/big", "limits the rate.*HF_TOKEN")
    assert hub.waits == [8, 16, 32, 64, 128]
    assert len(hub.requests("api")) == RETRIES + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_is_cut_once(hub, stream):
    hub.faults = [Fault("files/files/.*00002-of", cut=100, times=1)]
    same(open_checkpoint("org/big", stream=stream), tensors())


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_is_always_cut(hub, stream):
    hub.faults = [Fault("files/files/.*00002-of", cut=5)]
    refused("org/big", "00002-of-00003.safetensors of org/big could not be read.*5 retries", stream=stream)


def test_a_download_that_is_cut_once_and_one_that_always_is(hub):
    checkpoint = open_checkpoint("org/small")
    assert checkpoint.entries["layer.0.weight"].shape == (20, 10)
    hub.faults = [Fault("files/files", cut=1000, times=1)]
    same(checkpoint, tensors(1))
    checkpoint = open_checkpoint("org/big")
    assert checkpoint.entries["layer.0.weight"].shape == (20, 10)
    hub.faults = [Fault("files/files", cut=0)]
    with pytest.raises(InputError, match=r"00001-of-00003.safetensors of org/big could not be read.*5 retries"):
        checkpoint["layer.0.weight"]
    # The client's own waits, of up to 8 seconds, come on top.
    assert [wait for wait in hub.waits if wait > 8] == [16, 32, 64, 128]


@pytest.mark.parametrize("fault", [{"extra": 3}, {"missing": 3}, {"shift": 1}])
def test_a_body_of_another_length_or_place_is_not_taken(hub, fault):
    hub.faults = [Fault("files/files", **fault)]
    refused("org/small", "could not be read", stream=True)


def test_a_server_without_ranges_cannot_be_streamed_from(hub):
    hub.faults = [Fault("files/files", ignore_range=True)]
    refused("org/small", "does not send parts.*without streaming", stream=True)


@pytest.mark.parametrize("change", ["short", "long", "other"])
def test_a_download_that_is_not_the_listed_file_is_refused(hub, change):
    name = "model.safetensors"
    content = hub.repositories["org/small"][name]
    hub.listed[name] = content
    hub.repositories["org/small"][name] = {
        "short": content[:-8], "long": content + bytes(8), "other": content[:-8] + bytes(8)
    }[change]  # fmt: skip
    refused("org/small", "could not be read|is not the file that org/small lists|truncated")


def test_a_file_changed_in_the_cache_is_refused(hub):
    same(open_checkpoint("org/small"), tensors(1))
    (blob,) = hub.cache.glob("models--org--small/blobs/" + "?" * 64)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    refused("org/small", "is not the file that org/small lists.*delete")


def test_nobody_answers(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("org/small", "could not be read.*check the connection.*HF_HUB_OFFLINE=1")
    assert hub.waits == [8, 16, 32, 64, 128]


def test_an_endpoint_that_is_no_hub(hub):
    hub.faults = [Fault("api/models", 200, body=b"<html>hello</html>")]
    refused("org/small", "org/small")
    hub.faults = [Fault("api/models", 200, body=b'{"id": "org/small"}')]
    refused("org/small", "without a commit")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"short", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"{}" + bytes(5),
        struct.pack("<Q", 2) + b"[]", save(tensors())[:-4], struct.pack("<Q", 40) + b'{"a":' + b"[" * 35,
    ],
)  # fmt: skip
def test_damaged_files_on_the_hub(hub, content, stream):
    hub.repositories["org/small"]["model.safetensors"] = content
    refused("org/small", "corrupted|no safetensors file|holds no tensors", stream=stream)


def test_an_index_on_the_hub_cannot_lead_out(hub):
    for shard in ("../../org/small/resolve/main/model.safetensors", "/etc/passwd", "a\x1b.safetensors"):
        index = {"weight_map": {"layer.0.weight": shard}}
        hub.repositories["org/big"]["model.safetensors.index.json"] = json.dumps(index).encode()
        refused("org/big", "refused", stream=True)


# --- addresses and headers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hub:org/name", Address("org/name")),
        ("org/name", Address("org/name")),
        ("hub:gpt2", Address("gpt2")),
        ("hub:org/name@v1.0", Address("org/name", "v1.0")),
        ("hub:org/name@v1/a/b", Address("org/name", "v1", "a/b")),
        ("hub:org/name/a/b", Address("org/name", "main", "a/b")),
        ("hub:org/name@feature%2Fx/a", Address("org/name", "feature/x", "a")),
        ("hub:org/name@refs/pr/3", Address("org/name", "refs/pr/3")),
        ("hub:org/name@refs/pr/3/a", Address("org/name", "refs/pr/3", "a")),
        ("timm:vit_tiny.augreg_in21k", Address("timm/vit_tiny.augreg_in21k")),
        ("timm:vit_tiny.augreg_in21k@v2", Address("timm/vit_tiny.augreg_in21k", "v2")),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["hub:", "hub:/", "hub:../x", "hub:a/..", "hub:org/name@", "hub:org/name@main/../x", "hub:org/name@main//x",
     "hub:org/name@..%2F..%2Fx", "hub:org/name/../x", "hub:org/na me", "hub:org/n\nx", "timm:a/b",
     "hub:org/name@main/a\\b", "hub:org/name@main/./a"],
)  # fmt: skip
def test_addresses_that_are_none_or_lead_out(text):
    with pytest.raises(InputError):
        parse_address(text)


def test_a_header_is_read_as_the_library_reads_it():
    content = save({**tensors(), "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)})
    stop = header_bytes(content)
    header = _parse_header(content[8:stop], len(content) - stop)
    assert header["empty"][0] == (0, 3)
    assert header["scalar"][:2] == ((), "float32")
    for name, tensor in tensors().items():
        shape, dtype, start, end = header[name]
        assert (shape, dtype) == ((20, 10), "float32")
        assert content[stop + start : stop + end] == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    ("offsets", "size"),
    [([(0, 8), (4, 12)], 12), ([(0, 8), (9, 17)], 17), ([(0, 8), (8, 16)], 17), ([(0, 8), (8, 16)], 15),
     ([(8, 0), (0, 8)], 8), ([(-8, 0), (0, 8)], 8), ([(0, 8), (0, 8)], 8)],
)  # fmt: skip
def test_tensors_of_a_header_fill_the_file_once(offsets, size):
    header = {
        f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": pair} for i, pair in enumerate(offsets)
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"overlap|fill|bytes|whole numbers"):
        _parse_header(json.dumps(header).encode(), size)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_header_is_refused_or_stays_inside_the_file(damage):
    content = save(tensors())
    stop = header_bytes(content)
    header = bytearray(content[8:stop])
    for place, value in damage:
        header[place % len(header)] = value
    try:
        found = _parse_header(header, len(content) - stop)
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for _, _, start, end in found.values():
        assert 0 <= start <= end <= len(content) - stop


# --- the environment that users set -------------------------------------------------------------------------------


def test_the_environment_of_a_real_process(hub, running, tmp_path):
    script = (
        "from specbasis.checkpoint import open_checkpoint as o; c = o('org/small', stream=True);"
        "print(c.revision, len(c), float(c['layer.0.weight'][0, 0]))"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": running[0], "HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_TOKEN": "hf_x",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [COMMIT, "6", str(float(tensors(1)["layer.0.weight"][0, 0]))], done.stderr
    assert not Path(tmp_path / "elsewhere").exists()
