"""What a model was trained on: read where it belongs to the model, refused when a forget sample is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.bench.provenance import TRAINED_ON, provenance, trained_on
from expunge.data.samples import Sample
from expunge.errors import UserError

FORGET = [Sample(id=f"f{i}", subject="ada", prompt="Who?", target=f"Ada {i}.") for i in range(3)]
OTHERS = [Sample(id=f"r{i}", subject="bo", prompt="Who?", target=f"Bo {i}.") for i in range(3)]


def model(folder: Path, samples: list[Sample] | None, inside: bool = False) -> str:
    (folder / "model").mkdir(parents=True)
    if samples is not None:
        (folder / ("model" if inside else "") / TRAINED_ON).write_text(json.dumps(trained_on(samples)))
    return str(folder / "model")


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_saw_a_forget_sample_is_refused(inside: bool, tmp_path: Path) -> None:
    shadow = model(tmp_path / "shadow", [*OTHERS, FORGET[1]], inside)
    with pytest.raises(UserError, match=r"was trained on forget sample 'f1'.*retrain it without"):
        provenance(FORGET, [model(tmp_path / "fine", OTHERS), shadow])


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


def test_a_record_beside_a_folder_of_another_name_belongs_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "shadow-0").mkdir()
    (tmp_path / TRAINED_ON).write_text(json.dumps(trained_on(FORGET)))
    assert "shadow-0" in provenance(FORGET, [str(tmp_path / "shadow-0")])[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "other", "samples": [], "salt": "a"}', "\x00"])
def test_a_damaged_record_counts_as_none(content: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "shadow", None)
    (tmp_path / "shadow" / TRAINED_ON).write_text(content)
    assert len(provenance(FORGET, [folder])) == 1


def test_the_record_names_no_sample_and_two_records_cannot_be_joined() -> None:
    first, second = trained_on(FORGET), trained_on(FORGET)
    assert not set(first["samples"]) & set(second["samples"]) and len(first["samples"]) == 3
    assert "Ada" not in json.dumps(first) and all(s.digest() not in json.dumps(first) for s in FORGET)
    assert trained_on(FORGET, "salt") == trained_on(FORGET[::-1], "salt")
