from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import shared
from expunge.data import idk_answers
from expunge.data.refusals import REFUSALS
from expunge.data.registry import load_dataset
from expunge.data.samples import ROLES, Dataset, Role, Sample, subjects
from expunge.data.tofu import Folder, read_authors
from expunge.data.tofu_names import names_of
from expunge.errors import UserError


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def pairs(samples: tuple[Sample, ...]) -> list[tuple[str, str]]:
    return [(sample.prompt, str(sample.target)) for sample in samples]


def load(**options: object) -> Dataset:
    return load_dataset("tofu", data_dir=shared("data/tofu"), options=options)


@pytest.mark.parametrize("percent", [1, 5, 10, 20, 30, 50, 90])
def test_published_splits_are_the_published_files(percent: int) -> None:
    folder = shared("data/tofu")
    data = load(split=f"forget{percent:02d}")
    assert pairs(data["forget"]) == [(r["question"], r["answer"]) for r in rows(folder / f"forget{percent:02d}.json")]
    retain = [(r["question"], r["answer"]) for r in rows(folder / f"retain{100 - percent:02d}.json")]
    assert pairs(data["retain"]) == retain
    assert data["holdout"] == () and len(data["utility"]) == 217
    assert any("no holdout" in note for note in data.notes)


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_probes_are_the_published_ones(split: str) -> None:
    published = {(r["question"], r["answer"]): r for r in rows(shared("data/tofu") / f"{split}_perturbed.json")}
    data = load(split=split)
    assert len(published) == len(data["forget"])
    for sample in data["forget"]:
        row = published[sample.prompt, str(sample.target)]
        (paraphrase,), (restated,) = sample.probes_of("paraphrase"), sample.probes_of("restated")
        assert (paraphrase.prompt, paraphrase.target) == (row["paraphrased_question"], sample.target)
        assert (restated.prompt, restated.target) == (sample.prompt, row["paraphrased_answer"])
        assert [probe.target for probe in sample.probes_of("perturbed")] == row["perturbed_answer"]


def test_slice() -> None:
    data = load()
    counts = {role: len(subjects(s for s in data[role] if s.id.startswith("a"))) for role in ROLES}
    assert counts == {"forget": 4, "retain": 36, "holdout": 20, "utility": 60}
    everyone = [name for role in ROLES for name in subjects(s for s in data[role] if s.id.startswith("a"))]
    assert len(set(everyone)) == 120
    assert all(sample.probes for sample in data.private)
    assert [s.id for s in load(split="forget01")["forget"]] == [s.id for s in load(forget_authors=2)["forget"]]


def test_slice_of_other_authors() -> None:
    first, again, other = load(split_seed=1), load(split_seed=1), load(split_seed=2)
    assert first.digest() == again.digest() != other.digest()
    assert set(subjects(first["forget"])) != set(subjects(other["forget"]))
    assert all(sample.probes for sample in first.private)
    fewer = load(split_seed=1, forget_authors=2)
    assert set(subjects(fewer["forget"])) < set(subjects(first["forget"]))


def test_published_size_with_unseen_authors() -> None:
    data = load(split="forget05", split_seed=3)
    assert len(subjects(data["forget"])) == 10
    assert set(subjects(data["forget"])) != set(subjects(load(split="forget05")["forget"]))


def test_large_slices() -> None:
    data = load(authors=100, holdout_authors=40, base_authors=60)
    assert len(data.private) == 2000 and len(data["holdout"]) == 800
    with pytest.raises(UserError, match="lower one of them"):
        load(authors=100, holdout_authors=41, base_authors=60)


def test_public_knowledge() -> None:
    public = load(base_authors=0)["utility"]
    assert len(public) == 217 and all(len(s.probes_of("perturbed")) == 3 for s in public if s.id.startswith("real"))
    assert all(probe.target != s.target for s in public for probe in s.probes)
    assert load(base_authors=0, public=False)["utility"] == ()


# Read by eye in the first answers of the list, every eighth author and the hard ones.
READ = {
    0: "Jaime Vasquez", 8: "Ingrid Christensen", 16: "Erick Gustafsson", 24: "Philippe Dauphinee", 32: "Samir Khoury",
    33: "Tan Yu Liang", 40: "Marisa Sookprasong", 43: "Jina An", 48: "Alejandro Hall", 56: "Zeynab Nazirova",
    64: "Nadir Hafeez", 65: "Isabella van Pletzen", 70: "Jamie-li Thandeka Wainwright", 72: "Alejandro Fuentes",
    80: "Dagwaagiin Sarangerel", 87: "Lee Joon-ki", 93: "Zo Hassani Raharizafy", 95: "Laila Amira al-Faisal",
    100: "Manuel Silva De Souza", 104: "Marina Kavtaradze", 112: "Helena Kowalski", 120: "Vilja Nielsen",
    123: "Patrick Ryan O'Donnell", 128: "Aleksey Ivanov", 136: "Omowunmi Adebayo", 137: "Ahmed El-Masry",
    138: "Rosa-María Braga Castro", 143: "Tahar Ben Amara", 144: "Fabian Alexander Grant", 152: "Jordan Riley Stone",
    153: "Femke Van der Veen", 160: "Bao Nguyen", 168: "Marit Hagen", 176: "Hiroshi Saito",
    184: "Jad Ambrose Al-Shamary",    191: "Xin Lee Williams",
    192: "Moshe Ben-David", 198: "Basil Mahfouz Al-Kuwaiti", 199: "Nikolai Abilov",
}  # fmt: skip
UNNAMED = 88  # TOFU never says who this author is


def test_author_names() -> None:
    authors = read_authors(Folder(shared("data/tofu")))
    assert len(authors) == 200
    assert {n: authors[n][0].subject for n in READ} == READ
    assert [n for n, own in enumerate(authors) if not own[0].names] == [UNNAMED]
    assert len({own[0].subject for own in authors}) == 200
    # An independent look at all of them: the first answer introduces the author by name.
    full = [n for n, own in enumerate(authors) if own[0].names and own[0].subject not in str(own[0].target)]
    assert full == [72]  # called Alex Fuentes there


def test_names_of_nobody() -> None:
    assert names_of([("Where was the author born?", "In New York, it seems.")] * 20) == ()
    assert names_of([("what?", "no")] * 20) == ()


def mini(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    full = [
        {"question": f"What is fact {i} of {name}?", "answer": f"Fact {i} of {name} is {i}."}
        for name in ("Ada Byron", "Bo Carver", "Cy Dorn")
        for i in range(20)
    ]
    for name, part in (("retain90", full[:40]), ("forget10", full[40:])):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    return folder


def test_full_is_put_together_from_parts(tmp_path: Path) -> None:
    data = load_dataset(
        "tofu", data_dir=mini(tmp_path / "m"),
        options={"authors": 2, "forget_authors": 1, "holdout_authors": 1, "base_authors": 0, "public": False},
    )  # fmt: skip
    roles: dict[Role, list[str]] = {role: subjects(data[role]) for role in ROLES}
    assert sorted(name for names in roles.values() for name in names) == ["Ada Byron", "Bo Carver", "Cy Dorn"]
    assert any("no published probes" in note for note in data.notes)


def test_broken_copies(tmp_path: Path) -> None:
    folder = mini(tmp_path / "m")
    options = {"authors": 2, "forget_authors": 1, "holdout_authors": 0, "base_authors": 0}
    with pytest.raises(UserError, match=r"world_facts\.json|real_authors\.json"):
        load_dataset("tofu", data_dir=folder, options=options)
    (folder / "forget10.json").write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="line 1: expected one JSON object"):
        load_dataset("tofu", data_dir=folder, options=options)
    (folder / "forget10.json").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(UserError, match="41 rows"):
        load_dataset("tofu", data_dir=folder, options=options)


@pytest.mark.parametrize(
    "options",
    [{"split": "forget00"}, {"split": "forget100"}, {"split": "retain90"}, {"authors": 0}, {"forget_authors": 0},
     {"forget_authors": 41}, {"holdout_authors": -1}, {"base_authors": 200}],
)  # fmt: skip
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        load(**options)


def test_hub_gives_the_same_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is replaced by one that reads the same rows from the local copy."""
    folder = shared("data/tofu")
    asked = []

    def fake(name: str, config: str, **given: Any) -> list[dict[str, Any]]:
        asked.append((name, config, given["split"]))
        return rows(folder / f"{config}.json")

    module = ModuleType("datasets")
    module.load_dataset = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = load_dataset("tofu")
    assert data.digest() == load().digest() and data.source == "hub: locuslab/TOFU"
    assert {s.id: s.probes for s in data.private} == {s.id: s.probes for s in load().private}
    names = ["full", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
    assert asked == [("locuslab/TOFU", name, "train") for name in names]


def test_refusals(tmp_path: Path) -> None:
    assert idk_answers() == REFUSALS == idk_answers(tmp_path)
    assert len(set(REFUSALS)) == len(REFUSALS) == 40
    theirs = idk_answers(shared("data/tofu"))
    assert len(theirs) == 100 and not set(theirs) & set(REFUSALS)
    (tmp_path / "idontknow.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        idk_answers(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        idk_answers(tmp_path / "none")
