"""Checkpoints on disk: what is read, and what is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file

from specbasis.checkpoint import Checkpoint, content_sha256, open_checkpoint, sha256, weights_sha256
from specbasis.checkpoint.entry import inside
from specbasis.core.errors import InputError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.0.weight": torch.randn(6, 4, generator=generator),
        "layer.0.bias": torch.randn(6, generator=generator),
        "layer.1.weight": torch.randn(3, 6, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
    }


def same(checkpoint, want):
    assert set(checkpoint) == set(want)
    for name, tensor in want.items():
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        assert checkpoint.entries[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(checkpoint[name], tensor)


def sharded(folder, want, ending=".safetensors"):
    """The tensors over two files and the index that tells which is where."""
    folder.mkdir(exist_ok=True)
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    shards = [f"{stem}-0000{i}-of-00002{ending}" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(want)}
    for shard in shards:
        part = {name: want[name] for name in want if weight_map[name] == shard}
        (save_file if ending == ".safetensors" else torch.save)(part, folder / shard)
    write_index(folder, weight_map, f"{stem}{ending}.index.json")
    return shards


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_all(source, **options):
    checkpoint = open_checkpoint(source, **options)
    return {name: checkpoint[name] for name in checkpoint}


def refused(source, match, **options):
    """The one line with which a source is refused, wherever between opening and reading that is."""
    with pytest.raises(InputError, match=match) as caught:
        read_all(source, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- what is read -------------------------------------------------------------------------------------------------


def test_a_safetensors_file(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    same(checkpoint, tensors())
    assert checkpoint.files == (tmp_path / "a.safetensors",)
    assert checkpoint.source == str(tmp_path / "a.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "weights", "model.bin", "last.ckpt"])
def test_a_torch_file_whatever_its_name(tmp_path, name, legacy):
    torch.save(tensors(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    same(open_checkpoint(tmp_path / name), tensors())


def test_a_safetensors_file_with_a_torch_name(tmp_path):
    save_file(tensors(), tmp_path / "a.bin")
    same(open_checkpoint(tmp_path / "a.bin"), tensors())


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("with_index", [True, False])
def test_shards(tmp_path, ending, with_index):
    shards = sharded(tmp_path, tensors(), ending)
    if not with_index:
        next(tmp_path.glob("*.index.json")).unlink()
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors())
    assert checkpoint.files == tuple(tmp_path / shard for shard in shards)
    assert checkpoint.notes == ()


def test_one_shard_or_the_index_can_be_named(tmp_path):
    shards = sharded(tmp_path, tensors())
    same(open_checkpoint(tmp_path / "model.safetensors.index.json"), tensors())
    part = open_checkpoint(tmp_path / shards[0])
    assert set(part) < set(tensors())
    assert part.notes == (f"{shards[0]} is one of 2 shards; only its tensors were read",)


def test_the_whole_model_wins_over_its_shards_and_says_so(tmp_path):
    sharded(tmp_path, tensors(1))
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors())
    assert any("index.json" in note for note in checkpoint.notes)


def test_safetensors_win_over_torch_files(tmp_path):
    torch.save(tensors(1), tmp_path / "pytorch_model.bin")
    save_file(tensors(), tmp_path / "model.safetensors")
    same(open_checkpoint(tmp_path), tensors())


def test_a_trainer_folder_has_more_than_weights(tmp_path):
    for beside in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        torch.save({"state": torch.ones(2, 2)}, tmp_path / beside)
    torch.save(tensors(), tmp_path / "epoch3.pt")
    same(open_checkpoint(tmp_path), tensors())


def test_the_config_beside_the_weights_is_data(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).config == config
    assert open_checkpoint(tmp_path / "model.safetensors").config == config
    assert "evil" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff\xfe", "[" * 100_000, "1e9999999"])
def test_a_broken_config_is_ignored_with_a_note(tmp_path, text):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors())
    assert checkpoint.config == {}
    assert any("config.json" in note for note in checkpoint.notes)


def test_nested_dictionaries(tmp_path):
    nested = {"epoch": 3, "best": torch.tensor(0.9), "model": tensors(), "ema": {"shadow.0": tensors(1)},
              "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2)}}}}  # fmt: skip
    torch.save(nested, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", "several dictionaries")
    assert "#model (4)" in message
    assert "#ema.shadow.0 (4)" in message
    same(open_checkpoint(f"{tmp_path / 'a.pt'}#model"), tensors())
    same(open_checkpoint(f"{tmp_path / 'a.pt'}#ema.shadow.0"), tensors(1))
    same(open_checkpoint(f"{tmp_path / 'a.pt'}#ema"), tensors(1))
    assert "model" in refused(f"{tmp_path / 'a.pt'}#nodel", "no key 'nodel'")


def test_a_scalar_beside_the_only_dictionary_does_not_hide_it(tmp_path):
    torch.save({"loss": torch.tensor(0.5), "state_dict": tensors()}, tmp_path / "a.pt")
    same(open_checkpoint(tmp_path / "a.pt"), tensors())


def test_a_path_with_a_hash_in_it(tmp_path):
    save_file(tensors(), tmp_path / "a#1.safetensors")
    same(open_checkpoint(tmp_path / "a#1.safetensors"), tensors())
    refused(f"{tmp_path / 'a#1.safetensors'}#model", "leave it out")


def test_a_key_where_there_are_no_dictionaries(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    refused(f"{tmp_path}#model", "leave it out")
    sharded(tmp_path / "s", tensors())
    refused(f"{tmp_path / 's'}#model", "leave it out")


def test_a_mapping_and_a_checkpoint():
    checkpoint = open_checkpoint(tensors())
    same(checkpoint, tensors())
    assert open_checkpoint(checkpoint) is checkpoint
    refused({"a": 1}, "no tensors")
    refused(torch.nn.Linear(2, 2), "got a Linear")


def test_a_resource_in_a_package_that_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "somepackage_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    save_file(tensors(), package / "model.safetensors")
    save_file(tensors(), tmp_path / "outside.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    same(open_checkpoint("pkg:somepackage_of_weights"), tensors())
    same(open_checkpoint("pkg:somepackage_of_weights/model.safetensors"), tensors())
    refused("pkg:somepackage_of_weights/../outside.safetensors", "leads out")
    refused("pkg:somepackage_of_weights/none", "missing")
    refused("pkg:no_such_package_at_all/x", "no installed package")
    refused("pkg:os.path/x", "no installed package")


def test_the_cache_layout_of_the_hub_client_is_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40) / "unet"
    for folder in (repository / "blobs", tmp_path / "blobs" / "ab", snapshot):
        folder.mkdir(parents=True)
    save_file(tensors(), tmp_path / "blobs" / "ab" / "abc")
    (repository / "blobs" / "123").symlink_to(tmp_path / "blobs" / "ab" / "abc")
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / "123")
    same(open_checkpoint(snapshot), tensors())


def test_asking_whether_a_name_is_there_reads_nothing(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    broken = {name: type(e)(e.shape, e.dtype, lambda: 1 / 0) for name, e in checkpoint.entries.items()}
    assert "steps" in Checkpoint("x", broken)
    assert "stops" not in Checkpoint("x", broken)


def test_a_selection_holds_its_names_only(tmp_path):
    sharded(tmp_path, tensors())
    chosen = open_checkpoint(tmp_path).select(["layer.0.weight"])
    same(chosen, {"layer.0.weight": tensors()["layer.0.weight"]})


def test_digests(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    torch.save(tensors(), tmp_path / "b.pt")
    a, b = open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.pt")
    assert len(sha256(a.files[0])) == 64
    assert content_sha256(b) == content_sha256(open_checkpoint(tensors()))
    assert content_sha256(b) != content_sha256(open_checkpoint(tensors(1)))
    assert content_sha256(a.select(sorted(a))) == content_sha256(b.select(sorted(b)))
    assert weights_sha256(a) == sha256(a.files[0])  # what sha256sum says
    assert weights_sha256(open_checkpoint(tensors())) == content_sha256(b)
    shards = tmp_path / "shards"
    shards.mkdir()
    sharded(shards, tensors())
    whole = open_checkpoint(shards)
    assert len(whole.files) > 1
    expected = hashlib.sha256("\n".join(sha256(path) for path in whole.files).encode()).hexdigest()
    assert weights_sha256(whole) == expected


def test_views_that_claim_more_than_the_file_stores_are_no_weights(tmp_path):
    torch.save({"w": torch.ones(2, 2), "huge": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    entries = open_checkpoint(tmp_path / "a.pt").entries
    assert not entries["huge"].is_float
    assert entries["w"].is_float


# --- what is refused ----------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    refused(tmp_path / "none", "no such file or folder")
    refused("https://example.org/org/name", "hub:org/name")
    refused("x" * 5000, "cannot be read|no such file")
    refused("a\0b/c/d", "no such file")
    refused("~no-such-user-here/a/b", "no such file")
    refused("models/missing.safetensors", "no such file or folder")


def test_an_empty_folder_and_a_pipeline_of_folders(tmp_path):
    refused(tmp_path, "no weights in this folder")
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file(tensors(), tmp_path / part / "diffusion_pytorch_model.safetensors")
    assert "unet, vae" in refused(tmp_path, "folders")
    same(open_checkpoint(tmp_path / "unet"), tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    refused(tmp_path, "empty")
    refused(tmp_path / name, "empty")


def test_a_folder_named_like_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "not a regular file")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    refused(tmp_path, "cannot be read")


def test_a_file_that_fails_to_read(tmp_path, monkeypatch):
    save_file(tensors(), tmp_path / "model.safetensors")
    real = Path.open

    def fails(self, *args, **kwargs):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fails)
    refused(tmp_path, "cannot be read .Permission denied.")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "a.pt").write_text("hello, this is a text")
    refused(tmp_path / "a.pt", "neither a safetensors nor a torch file")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "b.pt", "not torch's")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(8), "TensorFlow.*from_tf=True"),
        ("flax_model.msgpack", b"\x82\xa6params", "Flax.*from_flax=True"),
        ("model.ckpt.index", b"\x00\x00\x01\x02abcdef", "TensorFlow.*from_tf=True"),
        ("weights.bin", b"\x89HDF\r\n\x1a\n" + bytes(8), "TensorFlow.*from_tf=True"),
    ],
)
def test_other_frameworks_are_refused_with_the_command_that_converts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["TFBertForMaskedLM"]}))
    assert f"transformers.BertForMaskedLM.from_pretrained('{tmp_path}'" in refused(tmp_path, message)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X'); import os; ('"]}))
    assert "transformers.AutoModel.from_pretrained" in refused(tmp_path / name, message)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_calls_code_is_refused_and_not_run(tmp_path, form):
    evil = {"weight": torch.ones(2, 2), "x": Payload(tmp_path / "ran")}
    if form == "bare pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    refused(tmp_path / "a.pt", "needs code.*refused.*safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"needs code \(torch.nn.modules.linear.Linear\)")


def test_a_torchscript_program_is_named_as_such(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", "TorchScript")


def repacked(path, compression=zipfile.ZIP_STORED, change=None):
    with zipfile.ZipFile(path) as archive:
        parts = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content) if change else content)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(1000, 1000)}, tmp_path / "a.pt")
    repacked(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    refused(tmp_path / "a.pt", "compressed")


def test_an_archive_whose_entries_overlap_is_refused(tmp_path):
    torch.save({"w": torch.zeros(100, 100)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        start = archive.start_dir
        count = len(archive.infolist())
    end = content.rindex(b"PK\x05\x06")
    directory = content[start:end]
    sixty_four = directory.find(b"PK\x06\x06")
    directory = directory[: sixty_four if sixty_four >= 0 else len(directory)]
    many = directory * 50
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count * 50, count * 50, len(many), start, 0)
    (tmp_path / "a.pt").write_bytes(content[:start] + many + tail)
    refused(tmp_path / "a.pt", "more than its size|truncated or corrupted")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\u202eb", "a\x00b"])
def test_names_with_control_characters(tmp_path, name):
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "control characters")
    torch.save({name: torch.ones(2, 2)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "control characters")
    torch.save({"m": {name: torch.ones(2, 2)}, "n": {"x": torch.ones(2, 2)}}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "several")


def test_file_names_with_control_characters_do_not_reach_the_terminal(tmp_path):
    for name in ("a\x1b[2J.pt", "b.pt"):
        torch.save(tensors(), tmp_path / name)
    refused(tmp_path, "several weights files")


# --- shards and indexes -------------------------------------------------------------------------------------------


LEADING_OUT = ["../out.safetensors", "/etc/passwd", "a/../../out.safetensors", "..\\out.safetensors",
               "a\n.safetensors", "./x/./out.safetensors", "", ".", 5, None, ["a"], {"a": 1}]  # fmt: skip


@pytest.mark.parametrize("shard", LEADING_OUT)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    save_file(tensors(), tmp_path / "out.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"layer.0.weight": shard})
    refused(tmp_path / "model", "refused|not an index")


@pytest.mark.parametrize("what", ["model.safetensors", "model.safetensors.index.json", "config.json", "folder"])
def test_links_out_of_the_folder_are_refused(tmp_path, what):
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file(tensors(), outside / "model.safetensors")
    (outside / "config.json").write_text("{}")
    write_index(outside, dict.fromkeys(tensors(), "model.safetensors"))
    folder = tmp_path / "model"
    folder.mkdir()
    if what == "folder":
        (folder / "sub").symlink_to(outside)
        write_index(folder, dict.fromkeys(tensors(), "sub/model.safetensors"))
    else:
        (folder / what).symlink_to(outside / what)
        if what == "config.json":
            save_file(tensors(), folder / "model.safetensors")
    refused(folder, "link out of its folder")


def test_a_link_that_the_user_names_is_followed(tmp_path):
    (tmp_path / "a").mkdir()
    save_file(tensors(), tmp_path / "a" / "x.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "latest.safetensors").symlink_to(tmp_path / "a" / "x.safetensors")
    same(open_checkpoint(tmp_path / "link"), tensors())
    same(open_checkpoint(tmp_path / "latest.safetensors"), tensors())


def test_links_in_circles(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    refused(tmp_path, "missing|cannot be read")


def test_a_missing_shard(tmp_path):
    shards = sharded(tmp_path, tensors())
    (tmp_path / shards[1]).unlink()
    refused(tmp_path, f"{shards[1]} is missing")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "1 of 2 shards")


def test_a_shard_that_the_index_leaves_out(tmp_path):
    shards = sharded(tmp_path, tensors())
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(tmp_path, {name: shard for name, shard in listed.items() if shard == shards[0]})
    refused(tmp_path, f"{shards[1]} is here, and .* does not list it")


def test_another_file_beside_an_index_is_noted(tmp_path):
    sharded(tmp_path, tensors())
    save_file(tensors(1), tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint, tensors())
    assert any("consolidated.safetensors" in note for note in checkpoint.notes)


def test_an_index_that_puts_a_tensor_into_the_wrong_shard(tmp_path):
    shards = sharded(tmp_path, tensors())
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(tmp_path, listed | {"layer.0.weight": shards[1]})
    refused(tmp_path, "layer.0.weight")
    write_index(tmp_path, listed | {"ghost": shards[0]})
    refused(tmp_path, "'ghost'")
    del listed["layer.0.bias"]
    write_index(tmp_path, listed)
    refused(tmp_path, "does not list.*layer.0.bias")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"]
)
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "not an index|no tensors")


def test_shards_of_two_models_are_ambiguous(tmp_path):
    save_file(tensors(), tmp_path / "model-00001-of-00001.safetensors")
    save_file(tensors(), tmp_path / "ema-00001-of-00001.safetensors")
    refused(tmp_path, "nothing says which")
    (tmp_path / "ema-00001-of-00001.safetensors").unlink()
    same(open_checkpoint(tmp_path), tensors())


def test_a_tensor_in_two_shards(tmp_path):
    for i in (1, 2):
        save_file(tensors(), tmp_path / f"model-0000{i}-of-00002.safetensors")
    refused(tmp_path, "in another shard")


# --- damage -------------------------------------------------------------------------------------------------------


def damaged(content, places, values, length):
    content = bytearray(content[:length])
    for place, value in zip(places, values, strict=True):
        if content:
            content[place % len(content)] = value
    return bytes(content)


def read_or_refuse(path):
    """Reading a damaged file gives tensors of the promised shapes, or an InputError of one line; nothing else."""
    try:
        checkpoint = open_checkpoint(path)
        for name, entry in checkpoint.entries.items():
            if entry.is_float:
                assert tuple(checkpoint[name].shape) == entry.shape
    except InputError as error:
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) == 1


DAMAGE = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, cut=st.one_of(st.none(), st.integers(0, 700)))
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_damaged_files_are_read_or_refused(tmp_path, form, damage, cut):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(damaged(content, [p for p, _ in damage], [v for _, v in damage], cut))
    read_or_refuse(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_files_are_refused(tmp_path, form, share):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    # Cut inside the name of a storage type, the pickle asks for a type that torch does not have.
    refused(path, "truncated or corrupted|neither a safetensors|needs code .torch.BF")


def test_an_older_file_that_ends_within_a_name_is_truncated(tmp_path):
    torch.save(tensors(), tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "whole.pt").read_bytes()
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    start = content.index(name)
    for length in range(1, len(name)):
        (tmp_path / "a.pt").write_bytes(content[: start + length])
        refused(tmp_path / "a.pt", "truncated or corrupted")


def test_an_archive_over_several_disks(tmp_path):
    torch.save(tensors(), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    end = content.rindex(b"PK\x05\x06")
    locator = content.rfind(b"PK\x06\x07")
    content[end + 4] = 3
    if locator >= 0:
        content[locator + 16] = 3
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", "truncated or corrupted")


def test_a_header_that_promises_too_much(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path / "a.safetensors", "truncated or corrupted")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(tmp_path / "b.safetensors", "truncated or corrupted")


@settings(max_examples=200)
@given(st.text(max_size=20))
def test_no_name_leads_out(name):
    folder = Path(__file__).parent
    try:
        path = inside(folder, name, "source")
    except InputError:
        return
    assert path.resolve().is_relative_to(folder.resolve())


def test_a_file_name_may_hold_the_sign_of_a_key(tmp_path):
    path = tmp_path / "ha#sh.pt"
    torch.save({"model": {"state": {"w": torch.ones(2, 2)}}, "other": {"w": torch.zeros(3, 3)}}, path)
    assert open_checkpoint(f"{path}#model.state")["w"].shape == (2, 2)
    assert open_checkpoint(f"{path}#other")["w"].shape == (3, 3)
