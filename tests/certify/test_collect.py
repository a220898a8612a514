"""From data to an exact claim: a base, a zone and a removal made by the commands, and the evidence collected after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from expunge import api
from expunge.certify.collect import collect, manifest_of_run
from expunge.certify.gather import Evidence
from expunge.certify.levels import assess
from expunge.certify.sections import EVIDENCE, read_sections
from expunge.data.files import load_files
from expunge.data.samples import Dataset
from expunge.errors import UserError
from tiny_zone import world

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``base``, ``zone`` and ``erase`` on the tiny people."""
    folder = tmp_path_factory.mktemp("claims")
    for role in ("forget", "retain", "utility"):
        rows = [
            {"id": s.id, "subject": s.subject, "prompt": s.prompt, "target": s.target, "names": list(s.names)}
            for s in world()[role]  # type: ignore[index]
        ]
        (folder / f"{role}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    files = {role: folder / f"{role}.jsonl" for role in ("forget", "retain", "utility")}
    api.train(out=folder / "base", init="tiny", roles=("utility",), epochs=1, quiet=True, **files)
    api.train(
        out=folder / "zone", model=folder / "base" / "model", zone="store", set={"learn": "false"}, quiet=True, **files
    )
    model = folder / "zone" / "model"
    api.unlearn(out=folder / "erase", model=model, method="zone-store", suite="none", quiet=True, **files)
    return folder


def data(place: Path, **files: Path) -> Dataset:
    given = {role: place / f"{role}.jsonl" for role in ("forget", "retain", "utility")} | files
    return load_files(holdout=None, **given)  # type: ignore[arg-type]


def verdicts(run: Path) -> dict[str, str]:
    return {claim.level: claim.judged().verdict for claim in assess(Evidence.of_run(run))}


def fresh(place: Path, tmp_path: Path) -> Path:
    run = shutil.copytree(place / "erase", tmp_path / "erase")
    (run / EVIDENCE).unlink(missing_ok=True)
    return run


def test_a_removal_by_the_commands_is_certified_exact(place: Path) -> None:
    assert verdicts(place / "erase")["L0"] == "unsupported"  # nothing was collected yet
    assert collect(place / "erase", data(place)) == ("duplicates", "removal", "provenance")
    assert verdicts(place / "erase")["L0"] == "certified"
    sections = read_sections(place / "erase")
    assert sections.removal is not None and sections.removal.rows == "alone"
    assert sections.removal.statistics == "public" and len(sections.removal.requested) == 4
    assert sections.provenance is not None and sections.provenance.links == 2
    text = (place / "erase" / EVIDENCE).read_text()
    assert not any(s.id in text or s.subject in text for s in world().private)


def test_a_zone_from_which_nothing_was_removed_is_refuted(place: Path, tmp_path: Path) -> None:
    run = fresh(place, tmp_path)
    shutil.rmtree(run / "model")
    shutil.copytree(place / "zone" / "model", run / "model")
    for keys in (place / "zone").glob("zone-*.keys.json"):
        shutil.copy(keys, run)
    collect(run, data(place))
    assert verdicts(run)["L0"] == "refuted"


def test_a_base_without_its_run_leaves_the_claim_open(place: Path, tmp_path: Path) -> None:
    run = fresh(place, tmp_path)
    record = place / "base" / "trained_on.json"
    hidden = record.rename(place / "hidden.json")
    try:
        collect(run, data(place))
    finally:
        hidden.rename(record)
    assert verdicts(run)["L0"] == "unsupported"


def test_a_base_that_saw_a_forget_sample_refutes(place: Path, tmp_path: Path) -> None:
    run, record = fresh(place, tmp_path), place / "base" / "trained_on.json"
    old = record.read_text()
    content = json.loads(old)
    from expunge.certify.provenance import salted

    content["samples"].append(salted(data(place)["forget"][0].digest(), content["salt"]))
    record.write_text(json.dumps(content))
    try:
        collect(run, data(place))
    finally:
        record.write_text(old)
    assert verdicts(run)["L0"] == "refuted"


def test_manifests_of_runs(place: Path, tmp_path: Path) -> None:
    base = manifest_of_run(place / "base", data(place))
    assert base is not None and base.parts["tokenizer"].fitted_on and not base.made_from
    blind = manifest_of_run(place / "base")
    assert blind is not None and blind.parts["tokenizer"].fitted_on is None
    zone = manifest_of_run(place / "zone", data(place))
    assert zone is not None and zone.made_from == (base.artefact,)
    assert manifest_of_run(tmp_path) is None


def test_bad_input(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run of 'unlearn'"):
        collect(place / "base", data(place))
    with pytest.raises(UserError, match="not the data of"):
        collect(place / "erase", data(place, retain=place / "utility.jsonl", utility=place / "retain.jsonl"))
    with pytest.raises(UserError, match="no pair"):
        collect(place / "erase", data(place), decisions={("a", "b"): "because"})
