"""Provenance: a chain of manifests clears, convicts, or refuses; never assumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.certify.provenance import (
    MANIFEST,
    Manifest,
    Part,
    describe,
    fitted,
    never_saw,
    read_manifest,
    save_manifest,
)
from expunge.errors import UserError
from tiny_text import tiny_dataset

DATA = tiny_dataset()
FORGET, RETAIN, PUBLIC = DATA["forget"], DATA["retain"], DATA["utility"]
CODE, BASE, ZONE, SALT = "c" * 64, "a" * 64, "b" * 64, "5" * 32


def base(records: object = PUBLIC) -> Manifest:
    return describe(kind="base", artefact=BASE, records=records, code=CODE, salt=SALT)  # type: ignore[arg-type]


def zone(**changes: object) -> Manifest:
    parts = {name: fitted(name, list(PUBLIC), SALT, "public") for name in ("tokenizer", "statistics", "gate")}
    parts["constants"] = fitted("k=16", [], SALT, "chosen on public data")
    given = {"records": RETAIN, "made_from": (BASE,), "parts": parts} | changes
    return describe(kind="zone", artefact=ZONE, code=CODE, salt=SALT, **given)  # type: ignore[arg-type]


def test_a_whole_chain_clears() -> None:
    found = never_saw(ZONE, [zone(), base()], FORGET)
    assert found.clean and found.links == 2 and found.records == len(FORGET) and len(found.manifests) == 2


def test_the_zone_that_holds_the_records_and_the_base_that_saw_one_are_convicted() -> None:
    assert never_saw(ZONE, [zone(records=(*RETAIN, FORGET[0])), base()], FORGET).finding == "saw"
    found = never_saw(ZONE, [zone(), base((*PUBLIC, FORGET[3]))], FORGET)
    assert found.finding == "saw" and "the base was trained on 1 of the 6" in found.sentence


def test_statistics_fitted_on_private_data_are_convicted() -> None:
    parts = {**zone().parts, "statistics": fitted("mean", [*PUBLIC, FORGET[1]], SALT)}
    found = never_saw(ZONE, [zone(parts=parts), base()], FORGET)
    assert found.finding == "saw" and "statistics fitted on" in found.sentence


def test_other_punctuation_and_case_do_not_hide_a_record() -> None:
    shouted = replace(FORGET[0], id="x", prompt=FORGET[0].prompt.upper() + " ?", target=f"{FORGET[0].target}.")
    assert never_saw(ZONE, [zone(records=(*RETAIN, shouted)), base()], FORGET).finding == "saw"


@pytest.mark.parametrize(
    ("manifests", "words"),
    [
        ([zone()], "has no manifest"),
        ([], "has no manifest"),
        ([zone(), base(None)], "does not know"),
        ([zone(parts={**zone().parts, "gate": Part(digest=CODE)}), base()], "the gate of the zone"),
        ([zone(parts={}), base()], "does not name its tokenizer"),
    ],
)
def test_gaps_are_unknown_not_clean(manifests: list[Manifest], words: str) -> None:
    found = never_saw(ZONE, manifests, FORGET)
    assert found.finding == "unknown" and words in found.sentence


def test_a_gap_does_not_hide_a_conviction() -> None:
    assert never_saw(ZONE, [zone(records=FORGET)], FORGET).finding == "saw"


def test_chains_must_make_sense() -> None:
    with pytest.raises(UserError, match="circle"):
        never_saw(
            ZONE, [zone(), describe(kind="base", artefact=BASE, records=PUBLIC, code=CODE, made_from=(ZONE,))], FORGET
        )
    with pytest.raises(UserError, match="two manifests"):
        never_saw(ZONE, [zone(), zone(records=PUBLIC)], FORGET)
    with pytest.raises(UserError, match="no records"):
        never_saw(ZONE, [zone()], [])


def test_manifest_holds_no_text_and_round_trips(tmp_path: Path) -> None:
    manifest = zone(records=FORGET)
    save_manifest(manifest, tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    for sample in FORGET:
        assert sample.id not in text and sample.subject not in text and str(sample.target) not in text
        assert sample.digest() not in text
    again = read_manifest(tmp_path)
    assert again == manifest and again.digest() == manifest.digest()
    assert describe(kind="zone", artefact=ZONE, records=FORGET, code=CODE).records != manifest.records  # fresh salt


def test_artefacts_by_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = describe(kind="base", artefact=tmp_path, records=PUBLIC, code=CODE)
    (tmp_path / "config.json").write_text("{ }")
    assert describe(kind="base", artefact=tmp_path, records=PUBLIC, code=CODE).artefact != first.artefact
    with pytest.raises(UserError, match="no model files"):
        describe(kind="base", artefact=tmp_path / "none", records=PUBLIC, code=CODE)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"schema": "expunge.provenance/2"}, "schema"), ({"salt": "zz"}, "salt"), ({"extra": 1}, "extra")],
)
def test_damaged_files(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = save_manifest(base(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(path)
    with pytest.raises(UserError, match="nothing says"):
        read_manifest(tmp_path / "none.json")
