"""``expunge certify``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import Json, emit, table
from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.certify.issue import Issued


def command(
    run: Annotated[Path, typer.Argument(help="Folder of an unlearn or audit run; or a certificate, to sign it too.")],
    key: Annotated[Path | None, typer.Option("--key", help="Private key; shows only, if none.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="The model, if the run had it elsewhere.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File of the certificate; certificate.json in the run, if none.")
    ] = None,
    days: Annotated[int, typer.Option("--days", help="Days for which the certificate is valid.")] = 365,
    request: Annotated[str | None, typer.Option("--request", help="Id of the request; random, never a name.")] = None,
    regime: Annotated[str | None, typer.Option("--regime", help="Law under which it was made, e.g. gdpr.")] = None,
    received: Annotated[str | None, typer.Option("--received", metavar="DATE", help="When it was received.")] = None,
    due: Annotated[str | None, typer.Option("--due", metavar="DATE", help="When it was due.")] = None,
    disposal: Annotated[
        list[str] | None,
        typer.Option(
            "--disposal",
            metavar="WHAT=STATE[@DATE]",
            help="What became of original, adapters, optimizer, caches or helpers: destroyed@DATE, sealed@DATE or "
            "unknown; repeat for more.",
        ),
    ] = None,
    timestamp: Annotated[
        Path | None, typer.Option("--timestamp", help="RFC 3161 token (.tsr) over the digest of the model's manifest.")
    ] = None,
    oms_key: Annotated[
        Path | None,
        typer.Option("--oms-key", help="P-256 private key: the model is also signed by OpenSSF Model Signing."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="First recompute evidence from the run's data and models.")
    ] = False,
    study: Annotated[
        Path | None,
        typer.Option("--study", metavar="RUN", help="Bench run of the method over seeds, for L2; with --plan."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="YAML file with 'fixed', a time before the study, and 'margins'.")
    ] = None,
    json: Json = False,
) -> int:
    """Sign what a run shows about its model: claims, evidence, and what is not claimed.

    Claims of exactness need --collect: it looks for near-duplicates and computes the removal from a zone again. Claims
    of equivalence over seeds need --study and --plan.
    certificate.json, its keys of commitments and a page for people go into the run folder. Without --key it shows what
    would be signed. The exit code is 1 when nothing can be certified: the certificate then says so.

    Examples:
      expunge certify runs/erase-17 --key signing.pem
      expunge certify runs/erase-17 --key signing.pem --regime gdpr --disposal original=sealed@2026-11-20
      expunge certify runs/erase-17/certificate.json --key auditor.pem --out both.json
    """
    from expunge.certify.issue import certify
    from expunge.certify.statement import Request, day

    given = Request(
        id=request,
        regime=regime,
        received=day(received, "--received"),
        due=day(due, "--due"),
        disposal=disposals(disposal),
        timestamp=None if timestamp is None else token(timestamp),
    )
    if (study is None) != (plan is None):
        raise UserError("--study and --plan belong together: runs over seeds, and the margins fixed before them.")
    if collect:
        from expunge.api import collect_evidence

        collect_evidence(run)
    if study is not None and plan is not None:
        from expunge.certify.study import collect_study, read_plan

        collect_study(run, study, read_plan(plan))
    made = certify(run, key=key, model=model, out=out, request=given, oms_key=oms_key, days=days)
    if made.certificate is not None and (run / "report.html").is_file():
        from expunge.report import write_report

        write_report(run)  # which shows the certificate
    places = {"certificate": made.certificate, "keys": made.keys, "page": made.page, "oms": made.oms}
    record = {k: v for k, v in places.items() if v is not None} | {"new": made.new, "verdict": made.verdict}
    text, pairs = described(made), run / "duplicates.jsonl"
    if collect and pairs.is_file() and pairs.stat().st_size:
        text += (
            f"\nnear-duplicates are listed in {pairs}: write a reason into 'why' of each that may stay, collect again."
        )
    emit(record | {"statement": made.statement}, text, json)
    return int(made.verdict == "refused")


def disposals(given: list[str] | None) -> dict[str, tuple[str, datetime | None]]:
    """``["original=sealed@2026-11-20"]`` as ``{"original": ("sealed", time)}``.

    Raises:
        UserError: no ``=``, an artefact given twice, or no date.
    """
    from expunge.certify.statement import day
    from expunge.cli.common import key_values

    found = {}
    for artefact, text in key_values(given, "--disposal").items():
        state, _, when = text.partition("@")
        found[artefact] = (state, day(when or None, f"--disposal {artefact}"))
    return found


def token(path: Path) -> bytes:
    """The bytes of a time-stamp token.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--timestamp '{path}' cannot be read: {error.strerror}.") from error


def described(made: Issued) -> str:
    """What was made, for people."""
    rows = [(c["level"], c["verdict"], c["claim"]) for c in made.claims]
    text = f"verdict: {made.verdict}\n\n{table(rows)}\n"
    if made.certificate is None:
        digest = made.statement["subject"][0]["digest"]["sha256"]
        return f"{text}digest of the manifest: {digest}\nNothing was signed: give --key (see expunge keygen)."
    text += f"certificate  {made.certificate}{'' if made.new else ' (was there, byte for byte)'}\n"
    if made.page is not None:
        text += f"page         {made.page}\nkeys         {made.keys} (destroy them, and the commitments say nothing)\n"
    if made.oms is not None:
        text += f"OMS          {made.oms}\n"
    return text
