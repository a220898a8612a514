"""``expunge demo``: the main job from end to end, on invented people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge import api
from expunge.certify.signing import PUBLIC
from expunge.errors import unknown
from expunge.opening import Result, Text
from expunge.report import write_report

DEMO: dict[str, dict[str, Any]] = {  # by data set
    "people": {
        "data_options": {"people": 30, "forget": 3, "holdout": 24, "utility": 40, "questions": 8},
        "init": "tiny",
        "methods": "cluster,npo,graddiff",
        "seeds": 1,
        "references": 2,
        "base_epochs": 12.0,
        "epochs": 20.0,
    },
    "people-portraits": {
        "data_options": {"people": 20, "forget": 4, "holdout": 12, "utility": 16, "questions": 3},
        "init": "tiny",
        "methods": "cluster,npo,graddiff",
        "seeds": 1,
        "references": 2,
        "base_epochs": 15.0,
        "epochs": 30.0,
    },
}
ATTACKS = "blind,loss,min_k,quantization,relearn-forget"  # of the demo's audit


def demo(out: Text = "runs/demo", *, data: str = "people", seed: int = 0, quiet: bool = True) -> Result:
    """The main job on invented people, or on people with portraits, offline; see ``expunge demo --help``.

    Inside of the run of the comparison: ``measured/`` has an edit of the weights once more, with an audit, and where
    the models read texts alone ``exact/`` a zone from which the same people were removed; both are certified with a
    key of the demo's own, and verified.

    Raises:
        UserError: no demo of this data set.
        AssertionError: a certificate that was just made does not verify.
    """
    if data not in DEMO:
        raise unknown("demo of data set", data, DEMO)
    place, chosen, more = Path(out), DEMO[data], {"seed": seed, "data_seed": seed, "quiet": quiet}
    people: dict[str, Any] = {"data": data, "data_options": chosen["data_options"]} | more
    study = api.bench(place, data=data, **chosen, seed=seed, quiet=quiet, command="demo")
    models, exact, edit, key = place / "models", place / "exact", place / "measured", place / "signing.pem"
    certified: list[tuple[Path, Path]] = []
    if data == "people":  # a zone lies over a language model
        api.train(exact / "base", init=chosen["init"], roles=("utility",), epochs=chosen["base_epochs"], **people)
        api.train(exact / "zone", model=exact / "base" / "model", zone="store", **people)
        api.unlearn(exact / "zone" / "model", exact / "erase", method="zone-store", suite="quick", **people)
        certified.append((exact / "erase", exact / "erase" / "model"))
    first, retrained = models / "original-0", sorted(models.glob("reference-?"))
    api.unlearn(first, edit / "cluster", method="cluster", base=models / "base", suite="none", **people)
    unlearned, audited = edit / "cluster" / "model", edit / "audit"
    api.audit(unlearned, audited, original=first, references=retrained, suite="quick", attacks=ATTACKS, **people)
    certified.append((audited, unlearned))
    if not key.exists():
        api.keygen(key, days=365)
    for run, model in certified:
        if not (run / "certificate.json").is_file():
            api.collect_evidence(run)
            api.certify(run, key=key)
        found = api.verify(run / "certificate.json", pub=[key.with_suffix(PUBLIC)], model=model)
        assert not found.code, found.text()
        write_report(run)
    write_report(place)
    return study
