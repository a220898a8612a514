"""From data to an exact claim: a base, a zone and a removal made by the commands, and the evidence collected after."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import api
from expunge.certify.collect import collect
from expunge.certify.gather import Evidence
from expunge.certify.levels import assess
from expunge.certify.provenance import MANIFEST, lineage_of, salted
from expunge.certify.sections import EVIDENCE, read_sections
from expunge.data.files import load_files
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.files import digest_folder
from tiny_zone import world

torch.set_num_threads(1)


def row(s: Sample) -> dict[str, Any]:
    return {"id": s.id, "subject": s.subject, "prompt": s.prompt, "target": s.target, "names": list(s.names)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``base``, ``zone`` and ``erase`` on the tiny people."""
    folder = tmp_path_factory.mktemp("claims")
    for role in ("forget", "retain", "utility"):
        rows = [row(s) for s in world()[role]]  # type: ignore[index]
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
    with pytest.raises(UserError, match="is not the model that"):
        collect(run, data(place))
    record = json.loads((run / "run.json").read_text())
    record["digests"]["output.model"] = digest_folder(run / "model")
    (run / "run.json").write_text(json.dumps(record))
    collect(run, data(place))
    assert verdicts(run)["L0"] == "refuted"


def without_ancestors(zone: Path) -> str:
    """Make the zone's manifest forget what the zone was made from; the text that was there."""
    path = zone / MANIFEST
    old = path.read_text()
    path.write_text(json.dumps(json.loads(old) | {"ancestors": []}))
    return old


def test_a_base_of_which_nothing_is_known_leaves_the_claim_open(place: Path, tmp_path: Path) -> None:
    run = fresh(place, tmp_path)
    old = without_ancestors(place / "zone")
    try:
        collect(run, data(place))
    finally:
        (place / "zone" / MANIFEST).write_text(old)
    assert verdicts(run)["L0"] == "unsupported"
    clearance = read_sections(run).provenance
    assert clearance is not None and "it has no manifest" in clearance.sentence


def test_the_base_may_be_gone_when_the_zone_carries_its_manifest(place: Path, tmp_path: Path) -> None:
    run, base = fresh(place, tmp_path), (place / "base").rename(place / "elsewhere")
    try:
        collect(run, data(place))
    finally:
        base.rename(place / "base")
    assert verdicts(run)["L0"] == "certified"


def test_a_base_that_saw_a_forget_sample_refutes(place: Path, tmp_path: Path) -> None:
    run, path = fresh(place, tmp_path), place / "zone" / MANIFEST
    old = path.read_text()
    content = json.loads(old)
    base = content["ancestors"][0]
    base["records"].append(salted(data(place)["forget"][0].digest(), base["salt"]))
    path.write_text(json.dumps(content))
    try:
        collect(run, data(place))
    finally:
        path.write_text(old)
    assert verdicts(run)["L0"] == "refuted"


def test_a_second_request_follows_the_first_to_the_base(place: Path, tmp_path: Path) -> None:
    """Manifests are those of the trainings; a removal in between changes nothing of what lies below."""
    first = data(place)["retain"][0]
    rest = [s for s in data(place)["retain"] if s.id != first.id]
    for role, samples in (("forget", [first]), ("retain", rest)):
        (tmp_path / f"{role}.jsonl").write_text("\n".join(map(json.dumps, map(row, samples))) + "\n")
    files = {"forget": tmp_path / "forget.jsonl", "retain": tmp_path / "retain.jsonl"}
    given = {**files, "utility": place / "utility.jsonl"}
    model = place / "erase" / "model"
    api.unlearn(model, tmp_path / "second", method="zone-store", suite="none", quiet=True, **given)
    collect(tmp_path / "second", data(place, **given))
    found = read_sections(tmp_path / "second").provenance
    assert found is not None and found.links == 2
    # The tokenizer of the base was fitted on what stayed then: a subject of it cannot be cleared afterwards.
    assert found.finding == "saw" and "tokenizer" in found.sentence


def test_manifests_of_trainings(place: Path, tmp_path: Path) -> None:
    (base,) = lineage_of(place / "base" / "model")
    assert base.kind == "base" and base.parts["tokenizer"].fitted_on and not base.made_from
    assert len(base.records or ()) == len(world()["utility"])
    zone, below = lineage_of(place / "zone" / "model")
    assert zone.kind == "zone" and zone.made_from == (base.artefact,) and below == base
    assert {"statistics", "gate", "constants", "tokenizer"} <= zone.parts.keys()
    assert len(zone.parts["gate"].fitted_on or ()) == len(world()["utility"])
    assert lineage_of(tmp_path) == []
    copied = shutil.copytree(place / "base", tmp_path / "base")
    (copied / "model" / "config.json").write_text("{}")
    assert lineage_of(copied / "model") == []  # another model stands there now


def test_near_duplicates_are_listed_and_reasons_taken_from_the_list(place: Path, tmp_path: Path) -> None:
    run, keys = fresh(place, tmp_path), ("forget", "kept", "kind", "why")
    twin = replace(data(place)["forget"][0], id="copy", subject="somebody else", probes=(), names=())
    kept = replace(twin, target=str(twin.target).upper())
    own = data(place)
    more = replace(own, roles={**own.roles, "retain": (*own["retain"], kept)})
    record = json.loads((run / "run.json").read_text())
    record["digests"]["data"] = more.digest()
    (run / "run.json").write_text(json.dumps(record))
    collect(run, more)
    pairs = [json.loads(line) for line in (run / "duplicates.jsonl").read_text().splitlines()]
    assert (own["forget"][0].id, "copy", "normalised", "") in [tuple(p[k] for k in keys) for p in pairs]
    assert verdicts(run)["L0"] == "refuted"
    decided = [json.dumps(p | {"why": "a public sentence that names nobody"}) for p in pairs]
    (run / "duplicates.jsonl").write_text("\n".join(decided) + "\n")
    collect(run, more)
    search = read_sections(run).duplicates
    assert search is not None and (search.pairs, search.open) == (len(pairs), 0)
    assert verdicts(run)["L0"] == "certified" and "a public sentence" in (run / "duplicates.jsonl").read_text()
    (run / "duplicates.jsonl").write_text("{\n{}\n")
    with pytest.raises(UserError, match="is damaged"):
        collect(run, more)


def test_bad_input(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run of 'unlearn' or 'audit'"):
        collect(place / "base", data(place))
    with pytest.raises(UserError, match="not the data of"):
        collect(place / "erase", data(place, retain=place / "utility.jsonl", utility=place / "retain.jsonl"))
    with pytest.raises(UserError, match="no pair"):
        collect(place / "erase", data(place), decisions={("a", "b"): "because"})


def test_a_zone_released_with_noise_gets_epsilon_and_delta_and_nothing_exact(place: Path, tmp_path: Path) -> None:
    files = {role: place / f"{role}.jsonl" for role in ("forget", "retain", "utility")}
    options = {"features": "128", "groups": "2", "epsilon": "1", "delta": "1e-5"}
    base, zone, run = place / "base" / "model", tmp_path / "zone", tmp_path / "gone"
    api.train(out=zone, model=base, zone="shared", set=options, quiet=True, **files)
    api.unlearn(out=run, model=zone / "model", method="zone-shared", suite="none", quiet=True, **files)
    assert verdicts(run)["L1"] == "unsupported"
    assert collect(run, data(place)) == ("duplicates", "residual", "removal", "provenance")
    found = {claim.level: claim for claim in assess(Evidence.of_run(run))}
    assert verdicts(run)["L0"] == "unsupported" and verdicts(run)["L1"] == "certified"
    ruling = found["L1"].judged()
    assert ruling.figures["epsilon"] == pytest.approx(1.0, abs=1e-9) and ruling.figures["delta"] == 1e-5
    assert ruling.figures["mechanism"] == "Residual" and ruling.figures["releases"] == 1
    assert "(1, 1e-05)-indistinguishable" in found["L1"].said()
    section = read_sections(run).residual
    assert section is not None and 0 < section.residual <= section.tolerance == 5e-4
    (seeds,) = run.glob("*.noise.json")
    kept = seeds.read_text()
    seeds.unlink()
    with pytest.raises(UserError, match="seeds of the zone's noise are gone"):
        collect(run, data(place))
    seeds.write_text((next(zone.glob("*.noise.json"))).read_text())  # those of the release before
    collect(run, data(place))
    assert verdicts(run)["L1"] == "refuted"
    seeds.write_text(kept)
    (run / EVIDENCE).unlink()
    assert "residual" in collect(run, data(place)) and verdicts(run)["L1"] == "certified"
