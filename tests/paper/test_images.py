"""Every source of images, against arrays written by other code, and what is refused."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from specbasis.core.errors import InputError
from specbasis.paper import image_files
from specbasis.paper.images import from_arrays, open_images

RNG = np.random.default_rng(0)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder, train, test, zipped=True):
    for name, (pixels, labels) in {"train": train, "t10k": test}.items():
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            path, content = folder / f"{name}-{kind}-ubyte", idx(array)
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


def some(n, size=28):
    return RNG.integers(0, 256, (n, size, size), dtype=np.uint8), RNG.integers(0, 10, n).astype(np.uint8)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_padded_and_repeated_over_channels(tmp_path, zipped):
    train, test = some(7), some(3)
    write_idx(tmp_path, train, test, zipped)
    found = open_images(tmp_path)
    assert (found.train.pixels.shape, found.test.pixels.shape) == ((7, 3, 32, 32), (3, 3, 32, 32))
    for channel in range(3):
        np.testing.assert_array_equal(found.train.pixels[:, channel, 2:30, 2:30], train[0])
    assert int(found.train.pixels.int().sum()) == 3 * int(train[0].astype(int).sum())  # the border is black
    assert found.test.labels.tolist() == test[1].tolist()


@pytest.mark.parametrize("damage", ["truncated", "other file", "no gzip", "missing"])
def test_damaged_idx_files_are_one_line(tmp_path, damage):
    write_idx(tmp_path, some(5), some(2), zipped=damage == "no gzip")
    path = tmp_path / "t10k-images-idx3-ubyte"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "other file":
        path.write_bytes(b"\x89PNG\r\n" + bytes(100))
    elif damage == "no gzip":
        gz = path.with_name(path.name + ".gz")
        gz.write_bytes(gz.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(InputError, match="t10k-images-idx3-ubyte") as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------------

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_batches():
    return {
        name: (RNG.integers(0, 256, (4, 3072), dtype=np.uint8), RNG.integers(0, 10, 4).tolist()) for name in NAMES
    }


def python_batch(data, labels):
    return pickle.dumps(
        {b"batch_label": b"x", b"labels": labels, b"data": data, b"filenames": [b"a"] * 4}, protocol=2
    )


def binary_batch(data, labels):
    return np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1).tobytes()


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_from_archive_and_folder(tmp_path, version, packed):
    inside = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}[version]
    write, ending = (python_batch, "") if version == "python" else (binary_batch, ".bin")
    batches = cifar_batches()
    contents = {f"{inside}/{name}{ending}": write(*batch) for name, batch in batches.items()}
    if packed:
        with tarfile.open(tmp_path / f"cifar-10-{version}.tar.gz", "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / inside).mkdir()
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
    found = open_images(tmp_path)
    want = np.concatenate([batches[name][0] for name in NAMES[:5]]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(found.train.pixels.numpy(), want)
    assert found.test.labels.tolist() == batches["test_batch"][1]
    assert len(list(tmp_path.rglob("*"))) == (1 if packed else 7)  # nothing was unpacked


class Runs:
    def __reduce__(self):
        return os.system, ("touch specbasis-was-here",)


class CallsNumpy:
    def __reduce__(self):
        return np.zeros, (3,)


@pytest.mark.parametrize("evil", [Runs(), CallsNumpy(), {b"data": Runs(), b"labels": []}])
def test_a_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    for name, batch in cifar_batches().items():
        (tmp_path / name).write_bytes(python_batch(*batch))
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(InputError, match="data_batch_3: wants to run"):
        open_images(tmp_path)
    assert not (tmp_path / "specbasis-was-here").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02garbage",
        pickle.dumps({b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2, 3]}, protocol=2),
    ],
)
def test_a_damaged_batch_is_one_line(tmp_path, content):
    for name, batch in cifar_batches().items():
        (tmp_path / name).write_bytes(python_batch(*batch))
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match="test_batch") as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, batch in cifar_batches().items():
        (data / name).write_bytes(python_batch(*batch))
    (data / "data_batch_2").rename(tmp_path / "elsewhere")
    (data / "data_batch_2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the folder"):
        open_images(data)


# --- folders of images, arrays ------------------------------------------------------------------------------------


def test_a_folder_of_images_with_classes_and_a_broken_file(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for kind, color in (("cat", (255, 0, 0)), ("dog", (0, 255, 0))):
            folder = tmp_path / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 40), color).save(folder / f"{i}.png")
    (tmp_path / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not looked at")
    found = open_images(tmp_path)
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.train.pixels[4, :, 16, 16].tolist() == [0, 255, 0]
    assert len(found.train.notes) == 1
    assert "broken.jpg" in found.train.notes[0]


def test_a_flat_folder_holds_a_sixth_out_and_has_no_labels(tmp_path):
    for i in range(12):
        Image.fromarray(np.full((5, 6), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    found = open_images(tmp_path, size=8)
    values = [sorted(images.pixels[:, 0, 4, 4].tolist()) for images in (found.train, found.test)]
    assert (len(values[1]), sorted(values[0] + values[1])) == (2, list(range(12)))
    assert found.train.labels is None
    again = open_images(tmp_path, size=8)
    assert torch.equal(again.test.pixels, found.test.pixels)


def test_npz_arrays_without_pickles(tmp_path):
    pixels, labels = RNG.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8), np.arange(9)
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels[:2])
    found = open_images(tmp_path / "a.npz")
    assert found.train.pixels.shape == (9, 3, 32, 32)
    means = found.train.pixels.float().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(means, pixels.mean(axis=(1, 2, 3)), atol=1.0)  # resized, not cut
    np.savez(tmp_path / "b.npz", images=np.array([Runs()], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        open_images(tmp_path / "b.npz")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "fashion", "."])
def test_a_place_without_images_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder|no images here"):
        open_images(source)


def test_samples_are_nested_and_shuffled_labels_keep_their_counts():
    images = from_arrays(RNG.integers(0, 256, (30, 4, 4), dtype=np.uint8), np.arange(30) % 4, size=4)
    small, large = images.sample(5, seed=3), images.sample(20, seed=3)
    assert torch.equal(large.pixels[:5], small.pixels)
    shuffled = images.shuffled_labels(1)
    assert torch.equal(shuffled.labels.bincount(), images.labels.bincount())
    assert not torch.equal(shuffled.labels, images.labels)
    assert shuffled.sha256 != images.sha256
    for n in (0, 31):
        with pytest.raises(InputError, match="has 30 images"):
            images.first(n)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (np.zeros((2, 4, 4), np.float32), None),
        (np.zeros((2, 4, 4, 2), np.uint8), None),
        (np.zeros((2, 4, 4), np.uint8), [0]),
        (np.zeros((2, 4, 4), np.uint8), [0, -1]),
        (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pixels, labels):
    with pytest.raises(InputError, match="want"):
        from_arrays(pixels, labels)


def test_what_is_unpacked_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGEST", 10**5)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(10**6))
    with pytest.raises(InputError, match="holds more than 100,000 bytes unpacked"):
        image_files.read_idx(tmp_path)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = 10**6
        archive.addfile(member, io.BytesIO(bytes(10**6)))
    with pytest.raises(InputError, match="holds more than 100,000 bytes unpacked"):
        image_files.read_cifar(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(10**6))
    with pytest.raises(InputError, match="at most 100000"):
        image_files.read_idx(tmp_path)


SHARED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
"""A tuple of twice the tuple before it, sixty times: hashing it takes as long as writing it out."""


@pytest.mark.parametrize("content", [b"\x80\x02}" + SHARED + b"K\x01s.", b"\x80\x02}r\xff\xff\xff\x7f."])
def test_a_batch_that_costs_more_than_its_bytes_is_one_line(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(InputError) as caught:
        image_files.read_cifar(tmp_path)
    assert "\n" not in str(caught.value)
