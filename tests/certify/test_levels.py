"""From run folders to claims: what is read, what is missing, what is damaged; and the JSON that a statement carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from claim_cases import CLEAR, SEARCH, A, B, C, at, edit, equivalence, removal, residual, zone
from expunge.certify.audits import one_run_loss
from expunge.certify.canonical import canonical
from expunge.certify.claims import EPSILON, Limits
from expunge.certify.gather import Evidence, arms_of_study
from expunge.certify.levels import CLAIMS, assess, get_claim, strongest
from expunge.certify.refusals import LEVELS
from expunge.certify.sections import EVIDENCE, Guesses, add_section, read_sections
from expunge.errors import UserError
from expunge.stats import Estimate


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def unlearn_run(folder: Path, method: str = "npo", subjects: int = 150, loss: float = 2.0) -> Path:
    """What ``expunge unlearn`` with one reference writes, as far as claims read it."""
    write(folder / "run.json", {"command": "unlearn", "status": "done", "parameters_changed": 7,
                                "digests": {"model": A, "output.model": B}})  # fmt: skip
    write(folder / "run.yaml", f"command: unlearn\noptions: {{method: {method}}}\n")

    def row(kind: str, name: str, **metrics: float) -> dict[str, Any]:
        measured = {k: Estimate(v, v - 0.05, v + 0.05, 40).record() for k, v in metrics.items()}
        return {"kind": kind, "method": name, "seed": 0, "study": "main", "metrics": measured,
                "properties": {"removes_from_weights": True}}  # fmt: skip

    rows = [row("original", "original", **{"prob.retain": 0.9}), row("reference", "reference", **{"prob.retain": 0.9})]
    rows.append(row("method", method, **{"prob.retain": 0.88, "tv.floor": 0.1}))
    write(folder / "results.json", {"schema": "expunge.results/1", "rows": rows})
    samples = [
        {"method": method, "seed": 0, "role": "forget", "id": f"Ada Ash/{i}", "subject": f"Ada Ash {i}", "tv": 0.1,
         "loss": loss, "original_loss": 0.1, "reference_loss": 2.0, "verdict": "adequate", "target": "likes red"}
        for i in range(subjects)
    ]  # fmt: skip
    write(folder / "samples.jsonl", "\n".join(map(json.dumps, samples)) + "\n")
    return folder


def test_an_unlearning_run_without_an_audit(tmp_path: Path) -> None:
    evidence = Evidence.of_run(unlearn_run(tmp_path / "run"))
    assert (evidence.kind, evidence.method, evidence.before, evidence.after) == ("edit", "npo", A, B)
    assert evidence.losses is not None and evidence.losses.moved == pytest.approx(1.9)
    assert evidence.verdicts is not None and evidence.verdicts.adequate == 150
    assert evidence.sections.distance is not None and len(evidence.sections.distance.subjects) == 150
    found = {c.level: c.judged().verdict for c in assess(evidence)}
    expected = dict.fromkeys(LEVELS, "unsupported") | {"L3": "certified"}
    assert found == expected and strongest(assess(evidence)).level == "L3"  # type: ignore[union-attr]


def test_a_run_that_moved_nothing_is_refuted(tmp_path: Path) -> None:
    claims = assess(Evidence.of_run(unlearn_run(tmp_path / "run", loss=0.1)))
    assert claims[3].judged().verdict == "refuted" and strongest(claims) is None


def test_an_audit_run_finds_the_run_that_made_its_model(tmp_path: Path) -> None:
    made = unlearn_run(tmp_path / "made", method="zone-store")
    (made / "model").mkdir()
    folder = tmp_path / "audit"
    write(folder / "run.json", {"command": "audit", "status": "done", "digests": {"model": B, "original": A}})
    write(folder / "run.yaml", f"command: audit\noptions: {{model: {made / 'model'}}}\n")
    assert Evidence.of_run(folder).kind == "zone"
    write(folder / "run.json", {"command": "audit", "status": "done", "digests": {"model": A}})
    assert Evidence.of_run(folder).kind == "unknown"  # the files are not those that the run wrote


def test_an_empty_folder_supports_nothing(tmp_path: Path) -> None:
    records = [c.record() for c in assess(Evidence.of_run(tmp_path))]
    assert [r["level"] for r in records] == list(LEVELS) and {r["verdict"] for r in records} == {"unsupported"}


def test_sections_are_added_and_read_back(tmp_path: Path) -> None:
    add_section(tmp_path, removal=removal(), provenance=CLEAR)
    add_section(tmp_path, duplicates=SEARCH, residual=residual())
    assert read_sections(tmp_path) == zone().sections
    unlearn_run(tmp_path, method="zone-store")
    write(tmp_path / "model" / "zone.json", {"digest": C})
    found = {c.level: c.judged().verdict for c in assess(Evidence.of_run(tmp_path))}
    assert (found["L0"], found["L1"]) == ("certified", "certified")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", "{", "not JSON"),
        ("results.json", "[]", "no JSON object"),
        ("drill.jsonl", "{\n{}\n", "not JSON"),
        (EVIDENCE, "[]", "no evidence file"),
        (EVIDENCE, {"schema": "expunge.evidence/9"}, "this version reads"),
        (EVIDENCE, {"schema": "expunge.evidence/1", "residuum": {}}, "residuum"),
        (EVIDENCE, {"schema": "expunge.evidence/1", "removal": {"after": "x"}}, "removal.requested"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: Any, words: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=words):
        Evidence.of_run(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        Evidence.of_run(tmp_path / "none")


def test_records_are_canonical_json_and_name_nobody(tmp_path: Path) -> None:
    """RFC 8785 takes them; nothing of a sample is in them; ε stands in L0 and L1 alone."""
    run = Evidence.of_run(unlearn_run(tmp_path / "run"))
    for evidence in (run, edit(), zone(), Evidence()):
        for claim in assess(evidence):
            record = claim.record()
            text = canonical(record).decode()
            assert not any(word in text for word in ("Ada", "Ash", "likes red", str(tmp_path)))
            assert isinstance(record["evidence"], dict) and all(isinstance(a, str) for a in record["assumptions"])
            if claim.level not in ("L0", "L1"):
                assert not EPSILON.search(text)


def test_limits_are_part_of_the_judgement() -> None:
    assert assess(edit(), Limits(advantage=0.01))[4].judged().verdict == "unsupported"
    strict = assess(zone(), Limits(largest_epsilon=0.5))
    assert strict[1].judged().verdict == "unsupported"


def test_arms_of_a_study() -> None:
    def row(kind: str, method: str, seed: int, **metrics: Any) -> dict[str, Any]:
        return {"kind": kind, "method": method, "seed": seed, "study": "main", "metrics": metrics}

    rows = [row("method", "npo", s, **{"prob.forget": 0.1 + s}) for s in range(3)]
    rows += [row("method", "ga", 0, **{"prob.forget": 9.0})]
    rows += [row("reference", "reference", s, **{"prob.forget": {"value": 0.2 + s}}) for s in range(2)]
    found = arms_of_study({"rows": rows}, "npo", ["prob.forget"])["prob.forget"]
    assert found.unlearned == (0.1, 1.1, 2.1) and found.retrained == (0.2, 1.2)
    for method, metric in (("npo", "prob.retain"), ("dpo", "prob.forget")):
        with pytest.raises(UserError, match="needs all of its runs"):
            arms_of_study({"rows": rows}, method, [metric])


def test_levels_by_name() -> None:
    assert [get_claim(level).level for level in CLAIMS] == list(LEVELS)
    with pytest.raises(UserError, match="did you mean 'L1'"):
        get_claim("L11")


def test_an_identity_run_dressed_up_is_still_refuted() -> None:
    """All sections of a perfect edit, on a model that is the original."""
    claims = assess(edit(after=A))
    assert {c.judged().verdict for c in claims[2:]} == {"refuted"}
    assert "nothing was done" in claims[2].said()


def test_margin_fixed_on_the_day_of_the_runs_counts_by_the_clock() -> None:
    same = equivalence().model_copy(update={"started": at(1)})
    sections = edit().sections.model_copy(update={"equivalence": same})
    assert assess(edit(sections=sections))[2].judged().verdict == "certified"


def test_canaries_of_a_run(tmp_path: Path) -> None:
    add_section(tmp_path, guesses=Guesses(canaries=100, guesses=100, right=60, coins=True))
    figures = assess(Evidence.of_run(tmp_path))[4].judged().figures
    assert figures["canary_loss_ceiling"] < one_run_loss(100, 100, 100).low
