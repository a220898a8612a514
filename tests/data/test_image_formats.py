"""Binary CIFAR, class folders, zips and .npz: known contents come back, few are read, broken ones are one sentence."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge.data import class_folders, npz, pool
from expunge.data.cifar import PIXELS
from expunge.data.cinic10 import CLASSES
from expunge.data.class_folders import folder_pool, zip_pool
from expunge.data.npz import npz_pair, npz_pool
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.models.images import Preprocess
from expunge.models.tiny import classifier_for
from expunge.signals.forward import collect

SMALL = {"private": 30, "holdout": 15, "utility": 5}
RNG = np.random.default_rng(0)


def place(sample: Sample) -> int:
    return int(sample.id.rsplit("-", 1)[1])


def everyone(data: Dataset) -> list[Sample]:
    return [s for role in data.roles.values() for s in role]


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


# -- CIFAR -----------------------------------------------------------------------------------------------------------


def write_ten(folder: Path, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir()
    images = RNG.integers(0, 256, (5 * count, 32, 32, 3), dtype=np.uint8)
    labels = RNG.integers(0, 10, 5 * count)
    for n in range(5):
        records = [
            bytes([labels[i]]) + images[i].transpose(2, 0, 1).tobytes() for i in range(n * count, (n + 1) * count)
        ]
        (folder / f"data_batch_{n + 1}.bin").write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    return images, labels


def test_cifar10_in_its_binary_form(tmp_path: Path) -> None:
    images, labels = write_ten(tmp_path / "cifar-10-batches-bin")
    for folder in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        data = load_dataset("cifar10", data_dir=folder, options=SMALL | {"forget_class": 3})
        assert len(everyone(data)) == 50 and {s.subject for s in data["forget"]} == {"cat"}
        for s in everyone(data):
            assert (s.image == images[place(s)]).all() and s.target == labels[place(s)]
    made = classifier_for(everyone(data))
    assert len(collect(made.model, made.adapter, data["forget"])) == len(data["forget"])


def test_cifar100_reads_the_fine_label(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (50, PIXELS), dtype=np.uint8)
    records = [bytes([i % 20, 2 * i]) + images[i].tobytes() for i in range(50)]
    (tmp_path / "train.bin").write_bytes(b"".join(records))
    (tmp_path / "fine_label_names.txt").write_text("".join(f"fine {i}\n" for i in range(100)))
    data = load_dataset("cifar100", data_dir=tmp_path, options=SMALL)
    for s in everyone(data):
        assert s.target == 2 * place(s)
        assert isinstance(s.image, np.ndarray) and (s.image.transpose(2, 0, 1).reshape(-1) == images[place(s)]).all()
    (tmp_path / "train.bin").write_bytes(bytes([0, 100]) + images[0].tobytes())
    with pytest.raises(UserError, match="picture 0 has the label 100, outside of the 100 classes"):
        load_dataset("cifar100", data_dir=tmp_path, options=SMALL)


def test_cifar_that_is_pickled_or_cut_off(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("data_batch_1", "cifar-10-python.tar.gz"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(UserError, match=r"python version of cifar10, a pickle.*take cifar-10-binary\.tar\.gz"):
            load_dataset("cifar10", data_dir=tmp_path, options=SMALL)
        (tmp_path / name).unlink()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"needs train\.bin \(from cifar-100-binary"):
        load_dataset("cifar100", data_dir=tmp_path)
    with pytest.raises(UserError, match="give --data-dir"):
        load_dataset("cifar10")
    write_ten(tmp_path / "cifar-10-batches-bin")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_4\.bin' is missing or cut off"):
        load_dataset("cifar10", data_dir=tmp_path, options=SMALL)
    file.unlink()
    with pytest.raises(UserError, match=r"data_batch_4\.bin' is missing or cut off"):
        load_dataset("cifar10", data_dir=tmp_path, options=SMALL)


def test_cifar_as_npz_and_folders(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60)[:, None] % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images[:5] ^ 1, y_test=labels[:5])
    data = load_dataset("cifar10", data_dir=tmp_path, options=SMALL)
    assert all((s.image == images[place(s)]).all() and s.target == place(s) % 10 for s in everyone(data))
    (test,) = load_dataset(
        "cifar10", data_dir=tmp_path, options={"part": "test", "private": 1, "forget": 1, "holdout": 0, "utility": 0}
    ).private
    assert (test.image == images[place(test)] ^ 1).all()
    write_folders(tmp_path / "train", ("cat", "dog"))
    with pytest.raises(UserError, match="has 2 class folders: cifar10 has 10"):
        load_dataset("cifar10", data_dir=tmp_path, options=SMALL)


# -- folders and zips ------------------------------------------------------------------------------------------------


def write_folders(root: Path, classes: tuple[str, ...], count: int = 6) -> dict[str, np.ndarray]:
    out = {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            array = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            out[f"{name}/{i}.png"] = array
            (root / name / f"{i}.png").write_bytes(png(array))
    return out


def test_cinic_stays_on_disk(tmp_path: Path) -> None:
    written = write_folders(tmp_path / "train", CLASSES)
    data = load_dataset("cinic10", data_dir=tmp_path, options=SMALL)
    reader = Preprocess(height=32, width=32)
    for s in everyone(data):
        assert isinstance(s.image, Path)
        key = f"{s.image.parent.name}/{s.image.name}"
        assert CLASSES.index(s.image.parent.name) == s.target and (reader.pixels(s) == written[key]).all()
    (tmp_path / "train" / "ship").rename(tmp_path / "train" / "boat")
    with pytest.raises(UserError, match=r"should have the class folders airplane, .*: look at 'boat'"):
        load_dataset("cinic10", data_dir=tmp_path, options=SMALL)
    with pytest.raises(UserError, match="give --data-dir"):
        load_dataset("cinic10")


def test_the_same_picture_in_two_files_is_taken_once(tmp_path: Path) -> None:
    write_folders(tmp_path, ("a", "b"))
    one = Image.open(tmp_path / "a" / "0.png")
    one.save(tmp_path / "b" / "copy.bmp")  # other bytes, same pixels
    pool = folder_pool(tmp_path)
    assert len(pool.labels_N) == 13 and len(pool.different(range(13), 13)) == 12


def test_classes_are_in_order_and_other_files_left_out(tmp_path: Path) -> None:
    write_folders(tmp_path, ("10", "9", "0"), 1)
    (tmp_path / "9" / "notes.txt").write_text("x")
    (tmp_path / "9" / ".hidden.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    pool = folder_pool(tmp_path)
    assert pool.classes == ("0", "9", "10") and pool.labels_N.tolist() == [0, 1, 2]
    assert pool.notes == (f"1 file(s) in '{tmp_path}' are no pictures by their ending and were left out.",)
    (tmp_path / "11").mkdir()
    with pytest.raises(UserError, match=r"the class folder '11' has no picture \(\.bmp"):
        folder_pool(tmp_path)
    for folder, words in ((tmp_path / "none", "does not exist"), (tmp_path / "9", "no sub-folders with pictures")):
        with pytest.raises(UserError, match=words):
            folder_pool(folder)


def test_a_damaged_picture_is_found_when_the_data_are_loaded(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", CLASSES)
    file = tmp_path / "train" / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cat/3\.png' is no readable image, it is cut off or damaged"):
        load_dataset("cinic10", data_dir=tmp_path, options={"private": 60, "holdout": 0, "utility": 0})


def write_zip(path: Path, members: dict[str, bytes], **more: Any) -> Path:
    with zipfile.ZipFile(path, "w", **more) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_zips(tmp_path: Path) -> None:
    arrays = {f"{c}/{i}.png": RNG.integers(0, 256, (8, 8), dtype=np.uint8) for c in "ab" for i in range(3)}
    members = {f"top/{name}": png(array) for name, array in arrays.items()}
    extra = {"top/a/readme.md": b"x", "__MACOSX/top/a/._0.png": b"x", "readme.md": b"x"}
    pool = zip_pool(write_zip(tmp_path / "x.zip", members | extra))
    assert pool.classes == ("a", "b") and pool.labels_N.tolist() == [0, 0, 0, 1, 1, 1] and len(pool.notes) == 1
    got = pool.read([1, 5])
    assert (got[0][:, :, 0] == arrays["a/1.png"]).all() and (got[1][:, :, 0] == arrays["b/2.png"]).all()
    two = write_zip(tmp_path / "two.zip", members | {"test/a/1.png": png(arrays["a/0.png"])})
    with pytest.raises(UserError, match="has class folders in test, top: say with option part which"):
        zip_pool(two)
    assert len(zip_pool(two, "test").labels_N) == 1
    with pytest.raises(UserError, match="under 'tets'"):
        zip_pool(two, "tets")


def test_zips_that_are_no_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK no")
    with pytest.raises(UserError, match="no readable zip"):
        zip_pool(path)
    with pytest.raises(UserError, match="no class folders with pictures"):
        zip_pool(write_zip(path, {"0.png": b"", "a/0.txt": b""}))
    write_zip(path, {"a/0.png": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(class_folders, "MOST_BYTES", 1 << 18)  # a bomb: 1 KiB that unpacks to 1 MiB
    with pytest.raises(UserError, match=r"'a/0\.png' in '.*' is larger than 0 MiB"):
        zip_pool(path).read([0])
    write_zip(path, {"a/0.png": png(np.zeros((64, 64, 3), np.uint8)), "a/1.png": b"x"})
    monkeypatch.setattr(pool, "MOST_HELD", 9999)
    with pytest.raises(UserError, match="more than 0 GiB in memory: ask for fewer, or unpack"):
        zip_pool(path).read([0])
    monkeypatch.setattr(pool, "MOST_HELD", 1 << 31)
    with pytest.raises(UserError, match=r"'a/1\.png' in '.*x\.zip' is no readable image"):
        zip_pool(path).read([1])
    raw = bytearray(path.read_bytes())
    raw[60] ^= 255  # inside the first picture: the check sum says so
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"'a/0\.png' in '.*' cannot be read \(.*CRC"):
        zip_pool(path).read([0])


# -- npz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_are_streamed(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (200, 9, 7), dtype=np.uint8)
    save(tmp_path / "x.npz", images=images, labels=np.arange(200) % 4)

    def whole(*_: Any) -> None:
        raise AssertionError("the whole array was read")

    monkeypatch.setattr(np, "load", whole)
    pool = npz_pool(tmp_path / "x.npz")
    assert pool.labels_N.tolist() == [i % 4 for i in range(200)] and len(pool.classes) == 4
    for row, at in zip(pool.read([0, 3, 199]), (0, 3, 199), strict=True):
        assert (row == images[at]).all()


def test_npz_forms(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    planes = RNG.integers(0, 256, (5, 3, 8, 9), dtype=np.uint8)
    np.savez(path, data=planes, targets=np.eye(5)[::-1])  # one-hot, planes first
    pool = npz_pool(path)
    assert pool.labels_N.tolist() == [4, 3, 2, 1, 0]
    assert (pool.read([2])[0] == planes[2].transpose(1, 2, 0)).all()
    np.savez(path, train_images=planes, train_labels=np.arange(5.0)[:, None])
    assert npz_pool(path, "train").labels_N.tolist() == [0, 1, 2, 3, 4]


GOOD = {"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.arange(2)}, "'images' has 3 rows and 'labels' 2"),
        ({"labels": np.array(["a", "b", "c"])}, "labels are whole numbers"),
        ({"labels": np.array([0.5, 1, 2])}, "labels are whole numbers"),
        ({"labels": np.array([0, np.nan, 2])}, "labels are whole numbers"),
        ({"labels": np.array([0, 1, 1 << 40])}, "the label 1099511627776 is no class"),
        ({"labels": np.ones((3, 3))}, "not of one 1 per row"),
        ({"labels": np.array([{}, 1, 2], object)}, "holds Python objects, which only a pickle can"),
        ({"images": np.zeros((3, 4, 4))}, "is float64 of shape"),
        ({"images": np.zeros((3, 4, 4, 2), np.uint8)}, "is uint8 of shape"),
        ({"images": np.zeros((3, 0, 4), np.uint8)}, "no image"),
        ({"images": np.asfortranarray(np.ones((3, 4, 4), np.uint8))}, "stored by columns"),
        ({"images": np.uint8(3)}, "single value"),
        ({"images": None}, "has no array of images: it has labels"),
    ],
)
def test_npz_that_is_no_good(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{k: v for k, v in (GOOD | change).items() if v is not None})
    with pytest.raises(UserError, match=words):
        npz_pool(path)


def test_npz_that_lies_or_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="no readable"):
        npz_pool(path)
    out = {}
    for name, array in GOOD.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        out[f"{name}.npy"] = buffer.getvalue()
    write_zip(path, out | {"images.npy": out["images.npy"][:-1]})
    with pytest.raises(UserError, match="'images' is cut off"):
        npz_pool(path).read([0, 2])
    write_zip(path, out | {"images.npy": b"no header"})
    with pytest.raises(UserError, match="'images' cannot be read"):
        npz_pool(path)
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 1000000, 1000000), }"
    head += b" " * (117 - len(head)) + b"\n"
    write_zip(path, out | {"images.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head})
    with pytest.raises(UserError, match="enormous"):
        npz_pool(path)
    big = head.replace(b"(3, 1000000, 1000000)", b"(1000000000000,)     ")
    write_zip(path, out | {"images.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(big)) + big,
                           "labels.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(big)) + big})  # fmt: skip
    with pytest.raises(UserError, match="'labels' has the shape"):
        npz_pair(path)
    assert npz.LABELS[0] == "labels"
