"""L1 of models that were made with noise, with the real commands: trained or reset, certified, made again, tampered."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.certify.test_cli_certify import expunge, statement

from expunge import api
from expunge.certify.collect import collect
from expunge.certify.gather import Evidence
from expunge.certify.levels import assess
from expunge.certify.provenance import MANIFEST, read_manifest, salted
from expunge.certify.sections import EVIDENCE, read_sections
from expunge.certify.vendored import check_statement, read_time
from expunge.data.registry import load_dataset
from expunge.errors import UserError
from expunge.files import digest_folder

torch.set_num_threads(1)
SIZES = {"private": 40, "forget": 3, "holdout": 40, "utility": 30}
DATA: dict[str, Any] = {"data": "digits", "data_options": SIZES, "device": "cpu"}
PRIVATE = {"epsilon": 8, "group": 3, "steps": 4, "records": 40}
RESET = {"epsilon": "8", "reset_steps": "3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``base``, ``private`` with its ``audit``, ``original`` and ``reset``; keys ``k.pem``."""
    folder = tmp_path_factory.mktemp("noisy")
    api.train(folder / "base", init="mlp", roles=("utility",), epochs=2, **DATA)
    model = folder / "base" / "model"
    api.train(folder / "private", model=model, private=PRIVATE, **DATA)
    api.audit(folder / "private" / "model", folder / "audit", suite="quick", **DATA)
    api.train(folder / "original", model=model, epochs=2, **DATA)
    api.unlearn(
        folder / "original" / "model", folder / "reset", base=model, method="reset", set=RESET, epochs=1, suite="quick",
        **DATA,
    )  # fmt: skip
    assert expunge("keygen", "--out", folder / "k.pem") == 0
    return folder


def data() -> Any:
    return load_dataset("digits", options=SIZES)


def verdicts(run: Path) -> dict[str, str]:
    return {claim.level: claim.judged().verdict for claim in assess(Evidence.of_run(run))}


def sentence(run: Path) -> str:
    return assess(Evidence.of_run(run))[1].said()


def moved(place: Path, tmp_path: Path) -> Path:
    """Copies of ``private`` and ``audit``, the second pointing to the first, to be spoiled."""
    private, run = shutil.copytree(place / "private", tmp_path / "private"), tmp_path / "audit"
    shutil.copytree(place / "audit", run)
    (run / EVIDENCE).unlink(missing_ok=True)
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(str(place / "private"), str(private)))
    return run


@pytest.mark.parametrize(("run", "kind", "made"), [("audit", "private", "private"), ("reset", "reset", "reset")])
def test_certified_verified_and_made_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, kind: str, made: str
) -> None:
    folder, out = place / run, tmp_path / "certificate.json"
    (folder / EVIDENCE).unlink(missing_ok=True)
    assert expunge("certify", folder) == 1  # nothing was repeated yet
    assert verdicts(folder)["L1"] != "certified"
    assert expunge("certify", folder, "--collect", "--key", place / "k.pem", "--out", out) == 0
    found = statement(out)["predicate"]
    levels = {c["level"]: c["verdict"] for c in found["claims"]}
    assert found["verdict"] == "certified" and found["method"]["kind"] == found["method"]["name"] == kind
    assert levels["L1"] == "certified" and levels["L0"] == "unsupported"
    figures = next(c for c in found["claims"] if c["level"] == "L1")["evidence"]
    assert figures["epsilon"] == pytest.approx(8.0, abs=1e-9) and figures["delta"] == 1e-5
    asked = ["verify", out, "--pub", place / "k.pub.pem", "--model", place / made / "model", "--require", "L1"]
    again = ["--run", folder, "--commitments", tmp_path / "certificate.keys.json", "--recompute"]
    capsys.readouterr()
    assert expunge(*asked, *again) == 0
    said = capsys.readouterr().out
    assert said.count("all 6 claims come out the same") == 2
    seed = place / made / f"{kind}.noise.json"
    kept = seed.read_bytes()
    assert stat.S_IMODE(seed.stat().st_mode) == 0o600 and json.loads(kept)["seed"] not in out.read_text()
    try:
        seed.unlink()
        assert expunge(*asked, *again) == 0
        assert "the seed of the noise is gone" in capsys.readouterr().out
        seed.write_bytes(kept.replace(b'"seed": "', b'"seed": "0')[:-3] + b'"}')
        assert expunge(*asked, *again) == 1  # another seed gives another model
        assert "L1: comes out differently from data and models" in capsys.readouterr().out
    finally:
        seed.write_bytes(kept)
        seed.chmod(0o600)


def test_nothing_of_the_noise_is_in_the_model_or_left_in_the_run(place: Path) -> None:
    for kind in ("private", "reset"):
        seed = json.loads((place / kind / f"{kind}.noise.json").read_text())["seed"]
        others = [p for p in (place / kind).rglob("*") if p.is_file() and p.name != f"{kind}.noise.json"]
        assert not any(seed.encode() in p.read_bytes() for p in others)
        assert not (place / kind / "work").exists()
    manifest = read_manifest(place / "private")
    assert manifest.mechanism is not None and manifest.mechanism.group == 3 and manifest.mechanism.noise > 0
    assert read_manifest(place / "original").mechanism is None


def test_a_group_that_is_too_small_is_no_claim(place: Path, tmp_path: Path) -> None:
    """Trained to hide two, asked about three."""
    api.train(tmp_path / "two", model=place / "base" / "model", private=PRIVATE | {"group": 2}, **DATA)
    api.audit(tmp_path / "two" / "model", tmp_path / "run", suite="quick", **DATA)
    collect(tmp_path / "run", data())
    assert verdicts(tmp_path / "run")["L1"] == "unsupported"
    assert "promised to hide 2 record(s), and 3 are to be forgotten" in sentence(tmp_path / "run")


def test_fewer_records_than_the_group_are_hidden_better(place: Path, tmp_path: Path) -> None:
    """Group privacy counts the records of the request that were trained on: with none of them it is that of one."""
    api.train(tmp_path / "kept", model=place / "base" / "model", private=PRIVATE, roles=("retain",), **DATA)
    api.audit(tmp_path / "kept" / "model", tmp_path / "run", suite="quick", **DATA)
    collect(tmp_path / "run", data())
    ruling = assess(Evidence.of_run(tmp_path / "run"))[1].judged()
    assert ruling.verdict == "certified" and ruling.figures["group"] == 1 and ruling.figures["epsilon"] < 8 / 3


def test_a_copy_in_another_role_raises_the_group(place: Path, tmp_path: Path) -> None:
    """Three records, and one of them again among the utility samples that were trained on too: four, three hidden."""
    given = data()
    images, rows = tmp_path / "images", {}
    images.mkdir()
    for role, samples in (("forget", given["forget"]), ("retain", given["retain"]), ("utility", given["forget"][:1])):
        rows[role] = tmp_path / f"{role}.jsonl"
        lines = []
        for i, s in enumerate(samples):
            Image.fromarray(s.image).save(images / f"{role}{i}.png")
            lines.append(
                {"id": f"{role}{i}", "subject": s.subject, "target": s.target, "image": f"images/{role}{i}.png"}
            )
        rows[role].write_text("\n".join(map(json.dumps, lines)) + "\n")
    model = place / "base" / "model"
    roles = ("forget", "retain", "utility")
    api.train(tmp_path / "private", model=model, private=PRIVATE, roles=roles, device="cpu", **rows)
    api.audit(tmp_path / "private" / "model", tmp_path / "run", suite="quick", device="cpu", **rows)
    collect(tmp_path / "run", api.run_dataset(tmp_path / "run"))
    section = read_sections(tmp_path / "run").private_training
    assert section is not None and (section.group, section.hides) == (4, 3)
    assert verdicts(tmp_path / "run")["L1"] == "unsupported" and "hide 3 record(s), and 4 are" in sentence(
        tmp_path / "run"
    )


def test_random_weights_to_start_from_are_drawn_again_without_the_records(place: Path, tmp_path: Path) -> None:
    api.train(tmp_path / "new", init="mlp", private=PRIVATE, **DATA)
    api.audit(tmp_path / "new" / "model", tmp_path / "run", suite="quick", **DATA)
    collect(tmp_path / "run", data())
    assert verdicts(tmp_path / "run")["L1"] == "certified"


def test_a_language_model_too(tmp_path: Path) -> None:
    """Its vocabulary is drawn again from what stays; records are answers of two people."""
    sizes = {"people": 6, "forget": 2, "holdout": 2, "utility": 8, "questions": 2}
    given: dict[str, Any] = {"data": "people", "data_options": sizes, "device": "cpu"}
    count = len(load_dataset("people", options=sizes)["forget"])
    private = {"epsilon": 8, "group": count, "steps": 2, "records": 20}
    api.train(tmp_path / "private", init="tiny-test", private=private, **given)
    api.audit(tmp_path / "private" / "model", tmp_path / "run", suite="quick", **given)
    collect(tmp_path / "run", load_dataset("people", options=sizes))
    section = read_sections(tmp_path / "run").private_training
    assert section is not None and section.group == section.hides == count > 2
    assert section.replayed == section.artefact and verdicts(tmp_path / "run")["L1"] == "certified"


def test_a_model_without_the_run_that_made_it_has_nothing_to_repeat(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "private" / "model", tmp_path / "alone" / "model")
    shutil.copy(place / "private" / MANIFEST, tmp_path / "alone")
    api.audit(tmp_path / "alone" / "model", tmp_path / "run", suite="quick", **DATA)
    assert collect(tmp_path / "run", data()) == ("duplicates",)
    assert verdicts(tmp_path / "run")["L1"] == "unsupported"


def touch(weights: Path) -> None:
    """The last bit of one weight."""
    tensors = load_file(weights)
    first = next(iter(tensors.values())).view(torch.int32)
    first.view(-1)[0] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})


def test_one_bit_of_the_weights_and_the_claim_is_gone(place: Path, tmp_path: Path) -> None:
    run = moved(place, tmp_path)
    touch(tmp_path / "private" / "model" / "model.safetensors")
    with pytest.raises(UserError, match="is not the model that"):
        collect(run, data())
    digest = digest_folder(tmp_path / "private" / "model")
    old = digest_folder(place / "private" / "model")
    for path in (run / "run.json", tmp_path / "private" / "run.json", tmp_path / "private" / MANIFEST):
        path.write_text(path.read_text().replace(old, digest))  # whoever touches it can write new digests too
    collect(run, data())
    assert verdicts(run)["L1"] == "refuted" and "gives other bytes" in sentence(run)


def test_an_audit_of_a_touched_model_has_nothing_to_claim(place: Path, tmp_path: Path) -> None:
    moved(place, tmp_path)
    touch(tmp_path / "private" / "model" / "model.safetensors")
    api.audit(tmp_path / "private" / "model", tmp_path / "run", suite="quick", **DATA)
    assert "private_training" not in collect(tmp_path / "run", data())
    assert verdicts(tmp_path / "run")["L1"] == "unsupported"


def without_ancestors(place: Path, private: Path) -> None:
    content = json.loads((private / MANIFEST).read_text())
    (private / MANIFEST).write_text(json.dumps(content | {"ancestors": []}))


def that_saw(place: Path, private: Path) -> None:
    content = json.loads((private / MANIFEST).read_text())
    base = content["ancestors"][0]
    base["records"].append(salted(data()["forget"][0].digest(), base["salt"]))
    (private / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "verdict", "said"),
    [(without_ancestors, "unsupported", "it has no manifest"), (that_saw, "refuted", "saw the records")],
)
def test_a_base_that_is_not_cleared(
    place: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], verdict: str, said: str
) -> None:
    run = moved(place, tmp_path)
    spoil(place, tmp_path / "private")
    collect(run, data())
    assert verdicts(run)["L1"] == verdict and said in sentence(run)


def test_figures_of_other_tools_are_read_and_not_relied_on(place: Path, tmp_path: Path) -> None:
    run = moved(place, tmp_path)
    digest = digest_folder(place / "private" / "model")
    figures = {"artefact": digest, "mu": 0.01, "group": 1, "clipped": True, "delta": 1e-5}
    (run / EVIDENCE).write_text(json.dumps({"schema": "expunge.evidence/1", "private_training": figures}))
    ruling = assess(Evidence.of_run(run))[1].judged()
    assert ruling.verdict == "unsupported" and any("nobody repeated" in reason for reason in ruling.reasons)
    collect(run, data())  # which puts what it finds in their place
    assert read_sections(run).private_training.replayed == digest and verdicts(run)["L1"] == "certified"  # type: ignore[union-attr]


def test_a_signer_who_lies_is_caught_by_whoever_repeats_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evidence that claims a tenth of the privacy loss can be signed; it does not come out again."""
    run, out = moved(place, tmp_path), tmp_path / "certificate.json"
    collect(run, data())
    found = json.loads((run / EVIDENCE).read_text())
    found["private_training"]["mu"] /= 10
    (run / EVIDENCE).write_text(json.dumps(found))
    assert expunge("certify", run, "--key", place / "k.pem", "--out", out) == 0
    given = ["--run", run, "--commitments", tmp_path / "certificate.keys.json", "--recompute"]
    capsys.readouterr()
    assert expunge("verify", out, "--pub", place / "k.pub.pem", *given) == 1
    assert "L1: comes out differently from data and models" in capsys.readouterr().out


def test_the_original_itself_is_certified_only_for_its_noise(place: Path, tmp_path: Path) -> None:
    """Given as its own original: nothing was done to it, and nothing had to be."""
    model = place / "private" / "model"
    api.audit(model, tmp_path / "run", original=model, suite="quick", **DATA)
    assert expunge("certify", tmp_path / "run") == 1
    assert expunge("certify", tmp_path / "run", "--collect", "--key", place / "k.pem") == 0
    assert statement(tmp_path / "run" / "certificate.json")["predicate"]["verdict"] == "certified"
    found = statement(tmp_path / "run" / "certificate.json")
    now = read_time(found["predicate"]["created"], "created")
    assert found["predicate"]["lineage"]["original"] == found["predicate"]["model"]["recorded"]
    assert [f.state for f in check_statement(found, now)] == ["holds"]
    for change, said in (({"kind": "edit"}, "came about by edit"), ({"kind": "reset"}, "'refused' follows")):
        other = copy.deepcopy(found)
        other["predicate"]["method"] |= change
        assert any(f.state == "refuted" and said in f.text for f in check_statement(other, now))
    other = copy.deepcopy(found)
    other["predicate"]["claims"][0]["verdict"] = "certified"  # L0
    assert any("came about by private" in f.text for f in check_statement(other, now))
    plain = place / "original" / "model"
    api.audit(plain, tmp_path / "plain", original=plain, suite="quick", **DATA)
    assert expunge("certify", tmp_path / "plain", "--collect") == 1
    assert set(verdicts(tmp_path / "plain").values()) == {"refuted", "unsupported"}


def test_a_reset_without_a_base_or_with_another_one_is_no_claim(place: Path, tmp_path: Path) -> None:
    given = {"method": "reset", "set": RESET, "epochs": 1, "suite": "quick", **DATA}
    api.unlearn(place / "original" / "model", tmp_path / "alone", **given)
    assert "reset" not in collect(tmp_path / "alone", data()) and verdicts(tmp_path / "alone")["L1"] == "unsupported"
    own = place / "original" / "model"  # a base that saw them
    api.unlearn(own, tmp_path / "own", base=own, **given)
    collect(tmp_path / "own", data())
    assert verdicts(tmp_path / "own")["L1"] == "refuted"


def test_a_run_that_is_done_again_keeps_its_noise_and_another_has_its_own(place: Path, tmp_path: Path) -> None:
    model = place / "base" / "model"
    shutil.copytree(place / "private", tmp_path / "killed")
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    (tmp_path / "killed" / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    api.train(tmp_path / "killed", model=model, private=PRIVATE, **DATA)
    api.train(tmp_path / "other", model=model, private=PRIVATE, **DATA)
    first, again, other = (
        digest_folder(p / "model") for p in (place / "private", tmp_path / "killed", tmp_path / "other")
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"epochs": 3}, "--private has steps and a learning rate of its own"),
        ({"zone": "store"}, "leave --zone"),
        ({"private": {"epsilon": "-1"}}, "epsilon = -1.0 cannot be"),
        ({"private": {"sigma": "1"}}, "unknown option of --private 'sigma'"),
    ],
)
def test_what_cannot_be_asked_for(place: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        api.train(tmp_path / "no", model=place / "base" / "model", **({"private": PRIVATE} | DATA | more))
    assert not (tmp_path / "no").exists()


def test_the_command_line_reads_it(place: Path, tmp_path: Path) -> None:
    options = [f"--data-option={k}={v}" for k, v in SIZES.items()]
    given = ["train", "--model", place / "base" / "model", "--data", "digits", *options, "--quiet"]
    assert expunge(*given, "--private", "epsilon=3,steps=2,group=2", "--out", tmp_path / "run") == 0
    made = read_manifest(tmp_path / "run").mechanism
    assert made is not None and (made.epsilon, made.steps, made.group, made.clip) == (3.0, 2, 2, 1.0)
    assert expunge(*given, "--private", "epsilon=3;steps=2", "--out", tmp_path / "bad") == 2
