"""Decompositions on disk: the same as without, bit for bit, and never a damaged one."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbasis import decompose
from specbasis.checkpoint.digest import digest
from specbasis.jobs import cache as module
from specbasis.jobs.cache import Cache, mapped
from tests.helpers.matrices import gaussian, weight_like

PARTS = ("U", "S", "Vh", "spectrum", "spectrum_error", "residual", "gap")


def same(a, b):
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in PARTS)


@pytest.fixture
def only_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "decompose", lambda *a, **k: calls.append(a) or decompose(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [None, 3])
def test_what_is_found_is_what_was_computed(tmp_path, only_once, dtype, ranks):
    W = weight_like(12, 20).to(dtype)
    found = [Cache(tmp_path / "c").decompose(W, ranks) for _ in range(2)]
    assert len(only_once) == 1
    assert all(same(d, decompose(W, ranks)) for d in found)


def test_contents_decide_and_not_the_layout(tmp_path, only_once):
    W = weight_like(12, 20)
    cache = Cache(tmp_path)
    for same_matrix in (W, W.mT.contiguous().mT, W.clone()):
        cache.decompose(same_matrix)
    assert len(only_once) == 1
    for other in (W.double(), W.reshape(20, 12), W + 1e-3, W.bfloat16()):
        cache.decompose(other)
    cache.decompose(W, 5)
    assert len(only_once) == 6


def test_another_algorithm_finds_nothing(tmp_path, only_once, monkeypatch):
    W = gaussian(6, 9)
    Cache(tmp_path).decompose(W)
    monkeypatch.setattr(module, "ALGORITHM", "another-1")
    Cache(tmp_path).decompose(W)
    assert len(only_once) == 2


@pytest.mark.parametrize("at", [5, 300, -1, -400])
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_entry_is_computed_anew(tmp_path, only_once, how, at):
    W = gaussian(8, 11)
    first = Cache(tmp_path).decompose(W)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes({"flipped": data, "cut": data[: at % len(data)], "emptied": b""}[how])
    assert same(Cache(tmp_path).decompose(W), first)
    assert len(only_once) == 2
    assert same(Cache(tmp_path).decompose(W), first)
    assert len(only_once) == 2


@pytest.mark.parametrize("other", [gaussian(8, 11, 5), gaussian(11, 8), 2 * gaussian(8, 11)])
@pytest.mark.parametrize("is_sealed", [True, False], ids=["of today", "of versions before seals"])
def test_an_entry_under_the_name_of_another_matrix_is_computed_anew(tmp_path, other, is_sealed):
    W, cache = gaussian(8, 11), Cache(tmp_path)
    cache.decompose(other)
    stored = load_file(cache.path(other))
    if not is_sealed:
        del stored["seal"]
        stored["digest"] = torch.tensor(list(bytes.fromhex(digest(*(stored[part] for part in PARTS)))))
        stored["digest"] = stored["digest"].to(torch.uint8)
    save_file(stored, cache.path(W))
    assert same(cache.decompose(W), decompose(W))


@pytest.mark.parametrize("ranks", [None, 3])
def test_an_entry_of_versions_before_seals_is_taken_for_its_matrix_and_sealed(tmp_path, only_once, ranks):
    W, cache = weight_like(12, 20), Cache(tmp_path)
    cache.decompose(W, ranks)
    stored = load_file(cache.path(W, ranks))
    sealed = stored.pop("seal")
    content = bytes.fromhex(digest(*(stored[part] for part in PARTS)))
    save_file({**stored, "digest": torch.tensor(list(content), dtype=torch.uint8)}, cache.path(W, ranks))
    assert same(cache.decompose(W, ranks), decompose(W, ranks))
    assert torch.equal(load_file(cache.path(W, ranks))["seal"], sealed)
    assert len(only_once) == 1


@pytest.mark.parametrize("how", ["flipped", "without a seal", "of other matrices"])
def test_damaged_samples_are_drawn_anew(tmp_path, how):
    W, T, cache = gaussian(6, 8), gaussian(6, 8, 1), Cache(tmp_path)
    drawn = (torch.rand(4, 6), torch.rand(4, 6))
    cache.samples(W, T, "gaussian", 4, 6, lambda: drawn)
    (path,) = tmp_path.iterdir()
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    elif how == "without a seal":
        stored = load_file(path)
        save_file({name: stored[name] * 9 for name in ("left", "right")}, path)
    else:
        cache.samples(T, W, "gaussian", 4, 6, lambda: (drawn[1], drawn[0]))
        other = next(entry for entry in tmp_path.iterdir() if entry != path)
        path.write_bytes(other.read_bytes())
    again = cache.samples(W, T, "gaussian", 4, 6, lambda: drawn)
    assert all(torch.equal(a, b) for a, b in zip(again, drawn, strict=True))


def test_an_entry_is_mapped_where_its_seal_was_checked_and_it_is_still_that_file(tmp_path):
    W, cache = gaussian(8, 11), Cache(tmp_path)
    path = cache.path(W)
    assert mapped(path) is None
    svd = cache.decompose(W)
    assert same(mapped(path), svd)
    path.write_bytes(path.read_bytes()[:-8])
    assert mapped(path) is None
    assert same(cache.decompose(W), svd)
    assert same(mapped(path), svd)
    Cache(tmp_path / "other").decompose(2 * W)
    (tmp_path / "other" / cache.path(2 * W).name).replace(path)
    assert mapped(path) is None


def test_the_least_recently_used_go_first(tmp_path, only_once):
    one, two, three = (gaussian(10, 10, seed) for seed in range(3))
    Cache(tmp_path).decompose(one)
    size = next(tmp_path.iterdir()).stat().st_size
    cache = Cache(tmp_path, limit=2 * size + 10)
    cache.decompose(two)
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns, reverse=True)):
        os.utime(path, (1e9 - age, 1e9 - age))
    cache.decompose(one)  # used: now the younger of the two
    cache.decompose(three)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.limit
    cache.decompose(one)
    assert len(only_once) == 3
    cache.decompose(two)
    assert len(only_once) == 4


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    W = gaussian(5, 6)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert same(Cache(tmp_path / "file").decompose(W), decompose(W))


W_FILLS = torch.eye(4)
SIDES = (torch.ones(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("what", "keep"),
    [
        ("decompositions", lambda folder: Cache(folder).decompose(W_FILLS)),
        ("samples", lambda folder: Cache(folder).samples(W_FILLS, W_FILLS, "permuted", 1, 2, lambda: SIDES)),
    ],
)
def test_a_disk_that_fills_keeps_nothing_of_a_file(tmp_path, monkeypatch, what, keep):
    def fills(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specbasis.jobs.cache.save_file", fills)
    with pytest.warns(UserWarning, match=f"{what} cannot be kept here"):
        keep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_count_against_the_limit_when_they_are_written(tmp_path):
    W, T = torch.randn(6, 8), torch.randn(6, 8)
    found = (torch.rand(50, 6), torch.rand(50, 6))
    size = 2 * 50 * 6 * 4
    kept = Cache(tmp_path, limit=2 * size + 2000)
    for draws, kind in enumerate(("gaussian", "permuted", "rotated", "rounding"), 50):
        kept.samples(W, T, kind, draws, 6, lambda: found)
        os.utime(next(tmp_path.glob(f"*-{kind}-*")), ns=(draws, draws))  # the times of use, in order
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= kept.limit
    assert list(tmp_path.glob("*-rounding-53-6.safetensors"))
    assert not list(tmp_path.glob("*-gaussian-50-6.safetensors"))
