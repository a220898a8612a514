"""``expunge train --zone`` and ``unlearn --method zone-store`` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expunge import api
from expunge.errors import UserError
from expunge.models.load import load_model, save_model
from expunge.zones.model import ZonedModel
from zone_cases import world

torch.set_num_threads(1)

SIZES = {"people": "4", "forget": "1", "utility": "12", "holdout": "4", "questions": "4", "perturbed": "3"}


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return save_model(world()[0], tmp_path / "base")


def test_train_then_unlearn(base_folder: Path, tmp_path: Path) -> None:
    made = api.train(tmp_path / "zone", model=base_folder, data="people", data_options=SIZES, zone="store")
    assert made.model is not None and made.results["last_loss"] < 0.5 * made.results["first_loss"]
    assert made.results["records"] == 16 and made.results["subjects"] == 4
    record = json.loads((tmp_path / "zone" / "run.json").read_text())
    assert record["parameters_changed"] == 0 and record["status"] == "done"
    known = load_model(made.model).model
    assert isinstance(known, ZonedModel)
    gone = api.unlearn(
        made.model, tmp_path / "gone", data="people", data_options=SIZES, method="zone-store", suite="none"
    )
    after = load_model(tmp_path / "gone" / "model").model
    assert isinstance(after, ZonedModel) and gone.model == tmp_path / "gone" / "model"
    forget = world()[1]["forget"][0].subject
    known.zone.remove(subject=forget)
    assert after.zone.digest() == known.zone.digest() and forget not in after.zone.blocks
    figures = json.loads((tmp_path / "gone" / "run.json").read_text())
    assert figures["figures"]["zone_digest"] == after.zone.digest() and figures["parameters_changed"] == 0


def test_a_zone_is_measured_like_any_model(base_folder: Path, tmp_path: Path) -> None:
    made = api.train(tmp_path / "zone", model=base_folder, data="people", data_options=SIZES, zone="store")
    assert made.model is not None
    done = api.audit(
        made.model, tmp_path / "audit", base=base_folder, data="people", data_options=SIZES, suite="quick",
        attacks="loss,min_k,gradient_norm,greedy",
    )  # fmt: skip
    assert done.report is not None and done.report.is_file()


def test_what_a_zone_cannot_be_built_from_is_said_before_anything_runs(base_folder: Path, tmp_path: Path) -> None:
    def refused(sentence: str, **more: object) -> None:
        given = {"model": base_folder, "data": "people", "data_options": SIZES, "zone": "store", **more}
        with pytest.raises(UserError, match=sentence) as raised:
            api.train(tmp_path / "no", **given)  # type: ignore[arg-type]
        assert str(raised.value).count(". ") == 0 and str(raised.value).endswith(".")
        assert not (tmp_path / "no").exists()

    refused("unknown zone 'stroe': did you mean 'store'", zone="stroe")
    refused("did you mean 'beta'", set={"betta": "1"})
    refused("not over random weights", model=None, init="tiny")
    refused("cannot be private too", roles=("forget", "utility"))
    refused("add --utility FILE", data_options={**SIZES, "utility": "0"})
    refused("no --zone was named", zone=None, set={"beta": "1"})


def test_too_few_public_people_are_refused_and_nothing_is_left(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 4 subjects, and 2 were given"):
        api.train(
            tmp_path / "no", model=base_folder, data="people", data_options={**SIZES, "utility": "2"}, zone="store"
        )
    assert not (tmp_path / "no").exists()
