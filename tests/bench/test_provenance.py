"""What a model was trained on: read where it belongs to the model, refused when a forget sample is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.bench.provenance import provenance
from expunge.certify.provenance import MANIFEST, describe, lineage_of, save_manifest
from expunge.data.samples import Sample
from expunge.errors import UserError

FORGET = [Sample(id=f"f{i}", subject="ada", prompt="Who?", target=f"Ada {i}.") for i in range(3)]
OTHERS = [Sample(id=f"r{i}", subject="bo", prompt="Who?", target=f"Bo {i}.") for i in range(3)]


def model(folder: Path, samples: list[Sample] | None, start: str | None = None, name: str = "model") -> str:
    """A model folder with the manifest that its training leaves, if ``samples`` are known."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"from": str(folder)}))
    if samples is not None:
        below = [] if start is None else lineage_of(Path(start))
        parents = [] if start is None else [start]
        own = describe(kind="shadow", artefact=made, records=samples, code="c" * 64, made_from=parents)
        save_manifest(own.model_copy(update={"ancestors": tuple(below)}), folder)
    return str(made)


def test_a_model_that_saw_a_forget_sample_is_refused(tmp_path: Path) -> None:
    shadow = model(tmp_path / "shadow", [*OTHERS, FORGET[1]])
    with pytest.raises(UserError, match=r"was trained on forget sample 'f1'.*retrain it without"):
        provenance(FORGET, [model(tmp_path / "fine", OTHERS), shadow])


def test_one_that_was_made_from_a_model_that_saw_it_is_refused_too(tmp_path: Path) -> None:
    first = model(tmp_path / "first", FORGET)
    second = model(tmp_path / "second", OTHERS, start=first)
    third = model(tmp_path / "third", OTHERS, start=second)
    for later in (second, third):
        with pytest.raises(UserError, match=r"what '.*' was made from was trained on forget sample 'f0'"):
            provenance(FORGET, [later])


def test_one_whose_start_is_unknown_is_noted(tmp_path: Path) -> None:
    blank = model(tmp_path / "blank", None)
    later = model(tmp_path / "later", OTHERS, start=blank)
    (note,) = provenance(FORGET, [later])
    assert later in note


def test_a_model_that_did_not_is_not_mentioned_and_the_unknown_ones_are_in_one_note(tmp_path: Path) -> None:
    known, first, second = (model(tmp_path / n, s) for n, s in (("a", OTHERS), ("b", None), ("c", None)))
    assert provenance(FORGET, [known]) == []
    assert provenance(FORGET, []) == []
    (note,) = provenance(FORGET, [known, first, second, "somebody/model"])
    assert first in note and second in note and "somebody/model" in note and known not in note


def test_the_same_content_under_another_id_is_found(tmp_path: Path) -> None:
    renamed = Sample(id="x", subject="ada", prompt="Who?", target="Ada 2.")
    with pytest.raises(UserError, match="'f2'"):
        provenance(FORGET, [model(tmp_path / "shadow", [renamed])])


def test_a_manifest_of_another_model_says_nothing_of_this_one(tmp_path: Path) -> None:
    shadow = model(tmp_path, FORGET, name="shadow-0")
    (tmp_path / "shadow-0" / "config.json").write_text("{}")
    assert "shadow-0" in provenance(FORGET, [shadow])[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "other"}', "\x00"])
def test_a_damaged_manifest_is_an_error(content: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "shadow", OTHERS)
    (tmp_path / "shadow" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"cannot be read as expunge\.provenance/1"):
        provenance(FORGET, [folder])
