"""The published CLEAR: its 21 configurations, read from small files that are made here in the same layout."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge.data import clear_files
from expunge.data.clear_files import CONFIGURATIONS, Source
from expunge.data.people import people
from expunge.data.portrait_words import CAPTION_PROMPTS, NAME_PROMPT
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError

NAMES = [who.name for who in people(200)]
Rows = list[dict[str, Any]]
Write = Callable[[Path, str, Rows], None]


def png(number: int, side: int = 8) -> bytes:
    pixels = np.full((side, side, 3), (number % 256, number // 256, 90), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def image_rows(names: list[str], count: int, start: int) -> Rows:
    """``count`` rows, as even as can be over the names; image number n is that of row n."""
    rows = []
    for i in range(count):
        name = names[i * len(names) // count]
        rows.append({"image": png(start + i), "caption": f"{name} stands in scene {start + i}.", "name": name})
    return rows


def perturbed(rows: Rows) -> Rows:
    out = []
    for row in rows:
        name, scene = row["name"], row["caption"].rpartition("scene ")[2]
        out.append(
            {
                **row,
                "paraphrased_caption": f"In scene {scene} one sees {name}.",
                "perturbed_captions": [f"In scene {scene} one sees nobody {i}." for i in range(5)],
                "perturbed_names": [f"Wrong {scene} {i}" for i in range(5)],
            }
        )
    return out


def with_text(rows: Rows, names: list[str]) -> Rows:
    """Image rows with empty questions, then two questions a person, the second of which names nobody."""
    out = [{"image": r["image"], "caption": r["caption"], "question": "", "answer": ""} for r in rows]
    for name in names:
        out.append({"image": None, "caption": "", "question": f"Where was {name} born?", "answer": f"{name}: here."})
        out.append({"image": None, "caption": "", "question": "Any awards?", "answer": f"The prize {len(out)}."})
        out.append({"image": None, "caption": "", "question": f"Who is {name}?", "answer": "An author."})
    return out


def published() -> dict[str, Rows]:
    """forget10 with its published row counts, everything else small."""
    gone, kept = NAMES[180:], NAMES[:180]
    forget, retain = image_rows(gone, 379, 1000), image_rows(kept, 200, 0)
    # The published trap: one row fewer, so that from there on row n is not row n. Here the order differs as well.
    views = perturbed(forget[:100] + forget[101:])
    random.Random(0).shuffle(views)
    others = perturbed(retain[40:60])
    # retain_perturbed has all that forget01 keeps, so rows of people whom forget10 forgets stand in it.
    return {
        "forget10": forget,
        "forget10_perturbed": views,
        "retain90": retain,
        "retain_perturbed": others + perturbed(forget[:3]),
        "forget10+tofu": with_text(forget, gone),
        "retain90+tofu": with_text(retain, kept[:30]),
        "real_faces": [{"image": png(9), "answer": "Ann Lee", "options": ["Ann Lee", "Bo Li", "Cy Fox"]}],
        "real_world": [
            {"image": png(8), "question": "What is this?", "answer": "a tree", "options": ["a car", "a tree"]}
        ],
    }


def as_parquet(folder: Path, name: str, rows: Rows) -> None:
    """As the hub stores it: a struct of bytes and path, in one or more parts."""
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    (folder / name).mkdir(parents=True)
    cells = [{**r, "image": r["image"] and {"bytes": r["image"], "path": None}} for r in rows]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    half = len(cells) // 2
    for part, cut in enumerate((cells[:half], cells[half:])):
        columns = {key: [row[key] for row in cut] for key in rows[0]}
        table = arrow.table({k: arrow.array(v, kind if k == "image" else None) for k, v in columns.items()})
        parquet.write_table(table, folder / name / f"train-{part:05d}-of-00002.parquet")


def _stored(folder: Path, rows: Rows) -> Rows:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    out = []
    for row in rows:
        path = f"images/{hash(row['image'])}.png"
        if row["image"]:
            (folder / path).write_bytes(row["image"])
        out.append({**row, "image": path if row["image"] else None})
    return out


def as_jsonl(folder: Path, name: str, rows: Rows) -> None:
    text = "".join(json.dumps(row) + "\n" for row in _stored(folder, rows))
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def as_image_folder(folder: Path, name: str, rows: Rows) -> None:
    """A folder of images with metadata.csv, whose column is file_name and whose lists are JSON."""
    stored = _stored(folder / name, rows)
    with open(folder / name / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        keys = ["file_name" if key == "image" else key for key in rows[0]]
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for row in stored:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            writer.writerow({"file_name": cells.pop("image"), **cells})


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clear")
    for name, rows in published().items():
        as_jsonl(folder, name, rows)
    return folder


def scene(text: str) -> str:
    """Which image a text belongs to."""
    return next(part.strip(".:") for part in text.split() if part.strip(".:").isdigit())


def kinds(samples: tuple[Sample, ...]) -> dict[str, int]:
    ends = [s.id.rpartition("/")[2] for s in samples]
    return {end: ends.count(end) for end in set(ends)}


def test_the_21_configurations() -> None:
    assert len(CONFIGURATIONS) == 21
    for percent, rest, n in (("01", "99", 35), ("05", "95", 188), ("10", "90", 379)):
        assert CONFIGURATIONS[f"forget{percent}"].rows == n
        # Text rows: 20 questions for each of 2, 10 and 20 people.
        assert CONFIGURATIONS[f"forget{percent}+tofu"].rows == n + 40 * {"01": 1, "05": 5, "10": 10}[percent]
        assert CONFIGURATIONS[f"forget{percent}_perturbed"].rows == (378 if percent == "10" else n)
        assert {f"retain{rest}", f"retain{rest}+tofu"} <= set(CONFIGURATIONS)
    assert CONFIGURATIONS["full+tofu"].rows == 3768 + 4000 and CONFIGURATIONS["full"].rows == 3768
    assert CONFIGURATIONS["forget10"].fields == ("image", "caption", "name")
    assert CONFIGURATIONS["real_world"].fields == ("image", "question", "answer", "options")
    assert (CONFIGURATIONS["real_world"].rows, CONFIGURATIONS["real_faces"].rows) == (367, 151)


def test_probes_are_joined_by_identity_and_never_by_position(copy: Path) -> None:
    data = load_dataset("clear", data_dir=copy)
    assert kinds(data["forget"]) == {"caption": 379, "name": 379}
    without = []
    for sample in data["forget"]:
        if not sample.id.endswith("/caption"):
            continue
        restated, wrong = sample.probes_of("restated"), sample.probes_of("perturbed")
        if not wrong:
            without.append(sample)
            continue
        assert len(restated) == 1 and len(wrong) == 5
        assert {scene(p.target) for p in (*restated, *wrong)} == {scene(str(sample.target))}
        assert sample.subject in restated[0].target
    assert [scene(str(s.target)) for s in without] == ["1100"]  # the row that forget10_perturbed lacks
    assert any("1 of 379 rows of forget10" in note for note in data.notes)
    # The defective form, row n with row n, gives another image's probes to nearly everyone.
    rows = Source(copy).rows("forget10"), Source(copy).rows("forget10_perturbed")
    assert sum(a["caption"] != b["caption"] for a, b in zip(*rows, strict=False)) > 350


def test_roles_and_probes(copy: Path) -> None:
    data = load_dataset("clear", data_dir=copy)
    assert data.modality == "multimodal" and not data["holdout"] and data.source == str(copy)
    assert {s.subject for s in data["forget"]} == set(NAMES[180:])
    assert {s.subject for s in data["retain"]} == set(NAMES[:180])
    probed = {scene(str(s.target)) for s in data["retain"] if s.id.endswith("/caption") and s.probes_of("perturbed")}
    assert probed == {str(number) for number in range(40, 60)}
    for sample in data["forget"]:
        assert isinstance(sample.image, Path) and sample.names == (sample.subject,)
        if sample.id.endswith("/name"):
            assert (sample.prompt, sample.target) == (NAME_PROMPT, sample.subject)
            assert all(p.prompt == NAME_PROMPT for p in sample.probes_of("perturbed"))
        else:
            assert sample.prompt in CAPTION_PROMPTS and sample.probes_of("reverse")[0].target == sample.subject
            assert {p.prompt for p in sample.probes_of("perturbed")} <= {sample.prompt}  # one question for all
    face, thing = data["utility"]
    assert (face.prompt, face.target, [p.target for p in face.probes_of("perturbed")]) == (
        NAME_PROMPT, "Ann Lee", ["Bo Li", "Cy Fox"],
    )  # fmt: skip
    assert (thing.prompt, thing.target, [p.target for p in thing.probes_of("perturbed")]) == (
        "What is this?", "a tree", ["a car"],
    )  # fmt: skip


def test_the_image_is_that_of_the_caption(copy: Path) -> None:
    for sample in load_dataset("clear", data_dir=copy)["forget"]:
        if sample.id.endswith("/caption"):
            assert Path(str(sample.image)).read_bytes() == png(int(scene(str(sample.target))))


def test_questions_of_tofu(copy: Path) -> None:
    data = load_dataset("clear", data_dir=copy, options={"modality": "both", "names": False})
    assert kinds(data["forget"]) == {"caption": 379, "question": 60}
    asked = [s for s in data["forget"] if s.image is None]
    # Every third question names nobody; its neighbours on both sides are about the same person.
    assert [s.subject for s in asked] == [name for name in NAMES[180:] for _ in range(3)]
    text = load_dataset("clear", data_dir=copy, options={"modality": "text", "public": False})
    assert text.modality == "text" and kinds(text["forget"]) == {"question": 60}
    assert len(text.private) == 60 + 90


def test_a_question_between_two_people_is_nobodys(copy: Path, tmp_path: Path) -> None:
    folder = changed(copy, tmp_path, "forget10+tofu", lambda rows: [r for r in rows if "Who is" not in r["question"]])
    data = load_dataset("clear", data_dir=folder, options={"modality": "both"})
    nobody = [s for s in data["forget"] if s.subject.startswith("unnamed author")]
    assert len(nobody) == 20 and all(s.prompt == "Any awards?" and not s.names for s in nobody)
    assert any("20 questions" in note for note in data.notes)


def test_holdout_takes_whole_people_out_of_retain(copy: Path) -> None:
    options = {"modality": "both", "holdout": 20}
    data = load_dataset("clear", data_dir=copy, options=options)
    out = {s.subject for s in data["holdout"]}
    assert len(out) == 20 and not out & {s.subject for s in data.private}
    more = load_dataset("clear", data_dir=copy, options={**options, "holdout": 25})
    assert out < {s.subject for s in more["holdout"]}
    assert len(data["holdout"]) + len(data["retain"]) == 2 * 200 + 90


@pytest.mark.parametrize("write", [as_parquet, as_image_folder])
def test_layouts_hold_the_same(copy: Path, tmp_path: Path, write: Write) -> None:
    for name, rows in published().items():
        write(tmp_path / "data", name, rows)
    options = {"modality": "both"}
    here, there = (load_dataset("clear", data_dir=place, options=options) for place in (copy, tmp_path))
    assert here.notes == there.notes
    for role in ("forget", "retain", "utility"):
        assert [(s.id, s.probes) for s in here[role]] == [(s.id, s.probes) for s in there[role]]
        for one, other in zip(here[role], there[role], strict=True):
            if one.image is None:
                assert other.image is None
            else:
                assert np.array_equal(pixels(one), pixels(other))


def pixels(sample: Sample) -> np.ndarray:
    if isinstance(sample.image, np.ndarray):
        return sample.image
    with Image.open(str(sample.image)) as opened:
        return np.asarray(opened)


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    rows = published()
    rows["real_world"][0]["image"] = png(3, 40)
    for name in rows:
        as_parquet(tmp_path, name, rows[name])
    data = load_dataset("clear", data_dir=tmp_path, options={"size": 16})
    assert pixels(data["utility"][1]).shape == (16, 16, 3) and pixels(data["utility"][0]).shape == (8, 8, 3)


def test_from_the_hub(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client gives decoded pictures; which configurations are fetched is what the names say."""
    fetched, stored = [], published()

    def rows(name: str, config: str, split: str) -> Rows:
        assert (name, split) == ("therem/CLEAR", "train")
        fetched.append(config)
        return [{**r, "image": r["image"] and Image.open(io.BytesIO(r["image"]))} for r in stored[config]]

    monkeypatch.setattr(clear_files, "hub_rows", rows)
    data = load_dataset("clear")
    assert set(fetched) == {
        "forget10",
        "forget10_perturbed",
        "retain90",
        "retain_perturbed",
        "real_faces",
        "real_world",
    }
    local = load_dataset("clear", data_dir=copy)
    assert [(s.id, s.probes) for s in data.private] == [(s.id, s.probes) for s in local.private]
    assert data.source == "hub: therem/CLEAR" and isinstance(data["forget"][0].image, np.ndarray)


def test_the_same_caption_twice_is_two_images(copy: Path, tmp_path: Path) -> None:
    def twice(rows: Rows) -> Rows:
        return [*rows, {**rows[0], "image": rows[1]["image"]}]

    data = load_dataset("clear", data_dir=changed(copy, tmp_path, "forget10", twice))
    assert len({s.id for s in data["forget"]}) == 2 * 380
    first = [s for s in data["forget"] if str(s.target).endswith("scene 1000.")]
    one, other = ([p.target for p in sample.probes] for sample in first)
    assert len(one) == 1 + 1 + 5 and sorted(one) == sorted(other) and first[0].image != first[1].image
    assert any("forget10 has 380 rows; as published it has 379" in note for note in data.notes)


def changed(copy: Path, folder: Path, name: str, change: Callable[[Rows], Rows]) -> Path:
    """A copy whose configuration ``name`` is another; images are linked."""
    for path in copy.glob("*.jsonl"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "images").symlink_to(copy / "images")
    rows = [json.loads(line) for line in (copy / f"{name}.jsonl").read_text().splitlines()]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    return folder


def dropped(field: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{k: v for k, v in row.items() if k != field} for row in rows]


def set_first(**fields: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [{**rows[0], **fields}, *rows[1:]]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("forget10", dropped("caption"), "row 1: configuration forget10 has no caption"),
        ("forget10", set_first(name=""), "name is missing"),
        ("forget10", set_first(image="images/none.png"), "does not exist"),
        ("forget10", set_first(image=None), "image is missing"),
        ("forget10", lambda rows: [], "empty"),
        ("forget10_perturbed", set_first(perturbed_captions=[1]), "perturbed_captions is no list of texts"),
        ("forget10_perturbed", lambda rows: [{**r, "caption": "x " + r["caption"]} for r in rows], "mixes versions"),
        ("retain90", set_first(name=NAMES[190]), "mixes splits"),
        ("real_faces", dropped("options"), "has no options"),
    ],
)
def test_broken_copies_are_refused(
    copy: Path, tmp_path: Path, name: str, change: Callable[[Rows], Rows], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load_dataset("clear", data_dir=changed(copy, tmp_path, name, change))


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    folder = changed(copy, tmp_path, "forget10", lambda rows: rows)
    (folder / "real_world.jsonl").unlink()
    with pytest.raises(UserError, match=r"needs configuration real_world in .* not there: put real_world/\*\.parquet"):
        load_dataset("clear", data_dir=folder)
    (folder / "forget10_perturbed.jsonl").unlink()
    data: Dataset = load_dataset("clear", data_dir=folder, options={"public": False})
    assert any("forget10_perturbed is not in the copy" in note for note in data.notes) and not data["utility"]
    (folder / "forget10.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1: not JSON"):
        load_dataset("clear", data_dir=folder, options={"public": False})
    with pytest.raises(UserError, match="needs configuration forget05"):
        load_dataset("clear", data_dir=folder, options={"split": "forget05"})


def test_early_form_of_real_world(copy: Path, tmp_path: Path) -> None:
    def early(rows: Rows) -> Rows:
        return [{**dropped("question")([row])[0], "prompt": row["question"]} for row in rows]

    data = load_dataset("clear", data_dir=changed(copy, tmp_path, "real_world", early))
    assert data["utility"][-1].prompt == "What is this?"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "forget11"}, "forget11"),
        ({"modality": "sound"}, "modality"),
        ({"size": 2}, "size"),
        ({"holdout": -1}, "holdout"),
        ({"holdout": 180}, "180 people"),
    ],
)
def test_wrong_options(copy: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_dataset("clear", data_dir=copy, options=options)


def test_unknown_configuration(copy: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'forget10'"):
        Source(copy).rows("forget100")


def test_damaged_images_and_files(tmp_path: Path) -> None:
    rows = published()
    rows["real_faces"][0]["image"] = b"no picture"
    for name in rows:
        as_parquet(tmp_path, name, rows[name])
    with pytest.raises(UserError, match=r"real_faces.*no readable image"):
        load_dataset("clear", data_dir=tmp_path)
    (tmp_path / "real_faces" / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_dataset("clear", data_dir=tmp_path)


def test_a_line_with_too_many_cells(tmp_path: Path) -> None:
    (tmp_path / "forget10").mkdir()
    (tmp_path / "forget10" / "metadata.csv").write_text("file_name,caption,name\na.png,one,two,three\n")
    with pytest.raises(UserError, match="more or fewer cells"):
        Source(tmp_path).rows("forget10")
