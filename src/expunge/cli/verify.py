"""``expunge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, emit
from expunge.errors import UserError


def command(
    certificate: Annotated[Path, typer.Argument(help="The certificate.")],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Folder of the model; 'model' beside the certificate, if none.")
    ] = None,
    pub: Annotated[
        list[Path] | None, typer.Option("--pub", help="Public key of whoever must have signed; repeat for more.")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option("--threshold", help="How many of the keys must have signed; all, if not given.")
    ] = None,
    require: Annotated[
        str | None, typer.Option("--require", metavar="LEVEL", help="Refuted unless this level is certified, e.g. L4.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run folder to compare with the commitments.")] = None,
    commitments: Annotated[
        Path | None, typer.Option("--commitments", help="With --run: the keys that certify wrote.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", "--data", help="With --run: make the claims again from its data and models.")
    ] = False,
    json: Json = False,
) -> int:
    """Check a certificate offline: what holds, what is refuted, what could not be checked.

    Without --pub the key beside the certificate is taken: it shows damage, and not who signed.
    The exit code is 0 when nothing is refuted, 1 when something is, 2 when it cannot be read.

    Examples:
      expunge verify runs/erase-17/certificate.json --pub signing.pub.pem
      expunge verify certificate.json --pub signing.pub.pem --model ./released --require L4
      expunge verify certificate.json --run runs/erase-17 --commitments commitments.json --data
    """
    from expunge.certify.verify import verify

    dataset = None
    if recompute:
        if run is None:
            raise UserError("--recompute needs --run: the folder of the certified run, which names data and models.")
        from expunge.api import run_dataset

        dataset = run_dataset(run)
    found = verify(
        certificate,
        pub=pub or (),
        model=model,
        run=run,
        commitments=commitments,
        dataset=dataset,
        threshold=threshold,
        require=require,
    )
    emit(found.record() if json else None, "" if json else found.text(), json)
    return found.code
