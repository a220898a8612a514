"""``expunge demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, Quiet, Seed
from expunge.cli.studies import tell


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder: a new one, or the one to continue.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, unlearn, attack and measure on invented people, offline, in about a minute.

    A small model learns invented people; three of them ask to be forgotten. Three methods try, and are compared
    with models that were retrained without them.

    Example:
      expunge demo --out runs/demo
    """
    from expunge.api import demo

    tell(demo(out, seed=seed, quiet=quiet), json)
