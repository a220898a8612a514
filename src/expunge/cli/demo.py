"""``expunge demo``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, Quiet, Seed
from expunge.cli.studies import tell


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder: a new one, or the one to continue.")] = Path(
        "runs/demo"
    ),
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="people, or people-portraits: pictures and texts, a vision-language model."),
    ] = "people",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, unlearn, attack, measure and certify on invented people, offline, in one to two minutes.

    A small model learns invented people; three of them ask to be forgotten. Three methods try, and are compared
    with models that were retrained without them. Then two certificates are signed and verified: that of a zone, which
    forgets exactly, and that of an edited model, for which most is refused. On people-portraits (two to four minutes)
    the model sees: it learns faces, captions and names, and the report shows what it says of them before and after.

    Examples:
      expunge demo --out runs/demo
      expunge demo --data people-portraits --out runs/faces
    """
    from expunge.showcase import demo

    result = demo(out, data=data, seed=seed, quiet=quiet)
    tell(result, json, list(certified(result.folder)))


def certified(folder: Path) -> Iterator[str]:
    """What the certificates of the demo say, which its key has signed and which were verified just now."""
    from expunge.report.certificates import certificates

    for found in certificates(folder):
        yield f"Certificate of {found.method} ({found.kind}), signed and verified: {found.verdict}"
        yield from (f"  {level} {word:<9} {sentence}" for level, _, word, _, sentence in found.claims)
        yield f"  {folder / (found.page or found.file)}"
        yield ""
