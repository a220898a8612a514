"""``expunge keygen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, emit


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File of the private key; .pub goes before its suffix.")
    ] = Path("signing.pem"),
    days: Annotated[
        int | None, typer.Option("--days", help="The key expires after so many days; never, if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a key pair to sign certificates with: Ed25519, in PEM files; no key is ever overwritten.

    Keep the private file. Hand the public one to those who verify, and let them compare its id by another way.

    Example:
      expunge keygen --out signing.pem --days 365
    """
    from expunge.certify.signing import keygen

    made = keygen(out, days=days)
    until = "without date of expiry" if made.expires is None else f"valid until {made.expires:%Y-%m-%d}"
    text = f"private key  {made.private} (for you alone)\npublic key   {made.public}\nkey id       {made.id}, {until}"
    emit({"private": made.private, "public": made.public, "id": made.id, "expires": made.expires}, text, json)
