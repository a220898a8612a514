"""Pictures of one's own: each form that a folder may hold, which one is meant, mixed sizes and modes, bad rows."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge.data import pictures
from expunge.data.hub_images import jsonl_pool, parquet_pool
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.models.tiny import classifier_for
from expunge.signals.forward import collect

RNG = np.random.default_rng(0)
NAMES = [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]
ARRAYS = {name: RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8) for name in NAMES}


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def parquet(path: Path, names: list[str], *, note: bool = True, **columns: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = columns or {
        "image": [{"bytes": png(ARRAYS[n]), "path": n} for n in names],
        "label": [int(n.startswith("dog")) for n in names],
    }
    table = pa.table(cells)
    if note:
        info = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def write(form: str, folder: Path) -> None:
    if form in ("folders", "part", "jsonl"):
        root = folder / "train" if form == "part" else folder / "pictures" if form == "jsonl" else folder
        for name in NAMES:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(ARRAYS[name]))
        if form == "jsonl":
            rows = [{"file_name": f"pictures/{n}", "label": n[:3], "other": 1} for n in NAMES]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif form == "zip":
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            for name in NAMES:
                archive.writestr(name, png(ARRAYS[name]))
    elif form == "npz":
        np.savez(folder / "x.npz", images=np.stack(list(ARRAYS.values())), labels=np.arange(20) // 10)
    else:
        parquet(folder / "data" / "train-00000-of-00002.parquet", NAMES[:11])
        parquet(folder / "data" / "train-00001-of-00002.parquet", NAMES[11:])


@pytest.mark.parametrize("form", ["folders", "part", "jsonl", "zip", "npz", "parquet"])
def test_every_form_gives_the_same_data(tmp_path: Path, form: str) -> None:
    write(form, tmp_path)
    options = {"part": "train"} if form == "part" else {}
    data = load_dataset("images", data_dir=tmp_path, options=options)
    assert [len(data[r]) for r in ("forget", "retain", "holdout", "utility")] == [1, 9, 6, 4]
    made = classifier_for([s for role in data.roles.values() for s in role])
    for role in data.roles.values():
        for s in role:
            name = NAMES[int(s.id.removeprefix("images-"))]
            assert s.target == int(name.startswith("dog"))
            if isinstance(s.image, Path):
                assert s.image.read_bytes() == png(ARRAYS[name])
            else:
                assert (s.image == ARRAYS[name]).all()
    assert len(collect(made.model, made.adapter, data["holdout"])) == 6


def test_mixed_sizes_and_modes_go_through_one_model(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr", "RGB")):
        folder = tmp_path / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        size = (8 + 5 * number, 40 - 3 * number)
        image = Image.fromarray(RNG.integers(0, 60000, size[::-1]).astype(np.uint16))
        if mode != "I;16":
            image = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
        image.save(folder / f"{number}{'.jpg' if mode in ('CMYK', 'YCbCr') else '.png'}")
    data = load_dataset("images", data_dir=tmp_path)
    made = classifier_for(data.private)
    batch = made.adapter.collate(data.private)
    assert batch.inputs["pixel_values"].shape == (5, 3, 32, 32)


def test_which_of_several_is_meant(tmp_path: Path) -> None:
    write("zip", tmp_path)
    write("npz", tmp_path)
    with pytest.raises(UserError, match=r"has all\.zip, x\.npz: say with option file"):
        load_dataset("images", data_dir=tmp_path)
    assert load_dataset("images", data_dir=tmp_path, options={"file": "x.npz"}).source.endswith("x.npz")
    for file, words in (("y.npz", "no such file"), ("x.tar", "no such file")):
        with pytest.raises(UserError, match=words):
            load_dataset("images", data_dir=tmp_path, options={"file": file})
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match=r"unknown kind of file .*Allowed: \.jsonl, \.npz, \.parquet, \.zip"):
        load_dataset("images", data_dir=tmp_path, options={"file": "x.tar"})
    with pytest.raises(UserError, match="give --data-dir"):
        load_dataset("images")


def test_parts_of_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00000-of-00001.parquet", NAMES[:15])
    parquet(tmp_path / "test-00000-of-00001.parquet", NAMES[15:])
    with pytest.raises(UserError, match="has Parquet of test, Parquet of train"):
        load_dataset("images", data_dir=tmp_path)
    data = load_dataset("images", data_dir=tmp_path, options={"part": "test", "forget_class": 1})
    assert sum(map(len, data.roles.values())) == 4 + 0 and {s.subject for s in data["forget"]} == {"dog"}


def test_parquet_reads_no_other_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = parquet_pool([parquet(tmp_path / "x.parquet", NAMES)])
    assert list(pool.classes) == ["cat", "dog", "eel"]
    read = []
    real = pictures.read_picture
    monkeypatch.setattr(
        "expunge.data.hub_images.read_picture", lambda raw, called: read.append(called) or real(raw, called)
    )
    got = pool.read([1, 16])
    assert (got[0] == ARRAYS[NAMES[1]]).all() and (got[1] == ARRAYS[NAMES[16]]).all() and len(read) == 2


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [b"x"], "label": [0]}, "picture 0 of .* is no readable image"),
        ({"image": [None], "label": [0]}, "has no bytes of a picture"),
        ({"image": [{"bytes": None, "path": "none.png"}], "label": [0]}, "'none.png', picture 0 of .* does not exist"),
        ({"image": [b"x"], "mark": [0]}, "has no column of labels: it has image, mark"),
        ({"picture": [b"x"], "label": [0]}, "has no column of images: it has picture, label"),
        ({"image": [b"x"], "label": [None]}, "has the label None"),
        ({"image": [b"x"], "label": [-1]}, "picture 0 has the label -1"),
        ({"image": [b"x"], "label": [1 << 40]}, "is no class"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    path = parquet(tmp_path / "x.parquet", [], note=False, **columns)
    with pytest.raises(UserError, match=words):
        parquet_pool([path]).check().read([0])


def test_parquet_with_a_label_outside_of_the_classes_it_notes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [], image=[b"x", b"x"], label=[0, 3])
    with pytest.raises(UserError, match="picture 1 has the label 3, outside of the 3 classes"):
        parquet_pool([path]).check()


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is not a readable Parquet file"):
        parquet_pool([tmp_path / "x.parquet"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("3", "line 1 is no object"),
        ('\n{"image": "a.png"}', "line 2 has no label: it has image"),
        ('{"label": 0, "caption": "x"}', "line 1 has no image: it has label, caption"),
        ('{"image": "b.png", "label": 0}', "the image 'b.png' does not exist"),
        ('{"image": 3, "label": 0}', "the image '3' does not exist"),
        ('{"image": "a.png", "label": 0}\n{"image": "a.png", "label": "cat"}', "has the label 0 beside others"),
        ('{"image": "a.png", "label": 99999999999999999999}', "is no class"),
        ('{"image": "a.png", "label": true}', "has the label True"),
        ('{"image": "a.png", "label": 1.5}', "has the label 1.5"),
    ],
)
def test_bad_json_lines(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        jsonl_pool(tmp_path / "x.jsonl")


def test_too_few_for_what_is_asked(tmp_path: Path) -> None:
    write("npz", tmp_path)
    with pytest.raises(UserError, match=r"has 20 images, and private \+ holdout \+ utility ask for 400"):
        load_dataset("images", data_dir=tmp_path, options={"private": 400, "holdout": 0, "utility": 0})
    with pytest.raises(UserError, match=r"private = 1\.5: give a whole count"):
        load_dataset("images", data_dir=tmp_path, options={"private": 1.5})


def test_digest_does_not_depend_on_the_form(tmp_path: Path) -> None:
    digests = set()
    for form in ("zip", "npz", "parquet"):
        (tmp_path / form).mkdir()
        write(form, tmp_path / form)
        found: Dataset = load_dataset("images", data_dir=tmp_path / form)
        assert all(isinstance(s, Sample) for s in found.private)
        digests.add(found.digest())
    assert len(digests) == 1


def test_one_class_is_none_to_choose_from(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in NAMES[:10]:
        (tmp_path / name).write_bytes(png(ARRAYS[name]))
    with pytest.raises(UserError, match="has the one class 'cat' here, and a classifier needs two or more"):
        load_dataset("images", data_dir=tmp_path, options={"forget": 1})
