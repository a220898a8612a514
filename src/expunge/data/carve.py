"""Cut one list of samples into roles, by whole subjects, so that no subject stands in two roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expunge.data.chance import share, shuffled
from expunge.data.samples import Role, Sample, subjects
from expunge.errors import UserError
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many subjects stand in each role."""

    private: int = option(100, "subjects that the original is trained on (forget and retain together)")
    forget: int | float = option(0.1, "of these, to forget: a count (1 or more) or a fraction (below 1)")
    holdout: int = option(50, "subjects of the same kind that are never trained on")
    utility: int = option(100, "public subjects of the same kind, for training a base and measuring utility")
    split_seed: int = option(0, "another value gives another choice of subjects")


def carve(samples: Sequence[Sample], sizes: Sizes, name: str, *key: object) -> dict[Role, tuple[Sample, ...]]:
    """Roles of ``samples`` by subject, in an order fixed by ``key`` and ``sizes.split_seed``.

    Each role takes its own order, so more holdout or utility subjects never change which ones are forgotten.

    Raises:
        UserError: a negative size, or more subjects asked for than there are.
    """
    order = shuffled(subjects(samples), name, *key, sizes.split_seed)
    for field in ("private", "holdout", "utility"):
        if getattr(sizes, field) < (field == "private"):
            raise UserError(f"dataset '{name}': {field} = {getattr(sizes, field)} is too small; give 0 or more, "
                            "and at least 1 for private.")  # fmt: skip
    wanted = sizes.private + sizes.holdout + sizes.utility
    if wanted > len(order):
        raise UserError(
            f"dataset '{name}' has {len(order)} subjects, and private + holdout + utility ask for {wanted}: "
            "lower one of them."
        )
    forget = share(sizes.forget, sizes.private, f"dataset '{name}': forget")
    cuts: dict[Role, list[str]] = {
        "forget": order[:forget],
        "retain": order[forget : sizes.private],
        "holdout": order[sizes.private : sizes.private + sizes.holdout],
        "utility": order[sizes.private + sizes.holdout : wanted],
    }
    role_of = {subject: role for role, chosen in cuts.items() for subject in chosen}
    found: dict[Role, list[Sample]] = {role: [] for role in cuts}
    for sample in samples:
        if sample.subject in role_of:
            found[role_of[sample.subject]].append(sample)
    return {role: tuple(chosen) for role, chosen in found.items()}
