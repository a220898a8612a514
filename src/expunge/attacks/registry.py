"""Attacks: what one is, what it declares, how it is found by name.

An attack is a typed function ``(exam, checkpoint, options) -> Finding`` in one file of this package (or an entry
point of group ``expunge.attacks``, or ``path/to/file.py:name``), registered by :func:`attack`. It is run on every
checkpoint in the same way; comparing the audited model with its reference, intervals, tests and the worst case are
the audit's work (:mod:`expunge.bench.audit`), never the attack's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from expunge.data.samples import Modality, Role
from expunge.errors import UserError, unknown
from expunge.extensions import import_all, import_file, prefix
from expunge.options import configure
from expunge.stats import Estimate

if TYPE_CHECKING:
    from expunge.attacks.exam import Checkpoint, Exam

Family = Literal["membership", "extraction", "recovery"]
Tier = Literal["quick", "standard", "full"]
TIERS: tuple[Tier, ...] = ("quick", "standard", "full")
Access = Literal["text", "log-probabilities", "weights", "both checkpoints"]
Need = Literal["holdout", "aux", "retain", "original", "other", "base", "probes", "names", "llm", "utility"]


@dataclass(frozen=True)
class Finding:
    """What an attack got out of one checkpoint.

    ``scores``: name -> role -> one number per sample of ``exam.samples[role]``, in that order; higher always means
    that more of the sample is left, or that it is more likely a member; nan where it cannot be said. A name is the
    attack's own, or ``attack.part`` when one attack gives several scores.
    ``figures``: numbers of the whole model that are not means of scores. ``details``: sample id -> what a reader may
    look at (texts, token strings). ``notes``: what the reader must know (samples drawn, bounds, what was left out).
    """

    scores: Mapping[str, Mapping[Role, Sequence[float]]] = field(default_factory=dict)
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Attack:
    """A registered attack.

    ``passes``: cost as multiples of one forward pass over the attacked samples (a backward pass counts 2 more);
    0 for what reads signals that every audit has. ``needs``: without these it is skipped, and the report says so.
    ``two_sided``: showing less than a retrained model speaks against the audited one too. It does not where the score
    is a trace of the request (retrained models show it as well, and a model that shows none of it is no worse).
    """

    name: str
    run: Callable[[Exam, Checkpoint, Any], Finding]
    options: type[Any]
    family: Family
    tier: Tier
    access: Access
    paper: str
    summary: str
    formula: str = ""
    passes: float = 0.0
    needs: frozenset[Need] = frozenset()
    modalities: frozenset[Modality] = frozenset({"text"})
    two_sided: bool = True

    def missing(self, exam: Exam) -> str | None:
        """Why this attack cannot be run in this exam, as a clause; None when it can."""
        if exam.modality not in self.modalities:
            return f"works on {', '.join(sorted(self.modalities))} models, not on a {exam.modality} model"
        lacking = sorted(need for need in self.needs if not exam.has(need))
        return f"needs {', '.join(lacking)}" if lacking else None

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The attack's options with ``values`` set; strings are read as the field's type."""
        return configure(self.options, values, f"option of attack {self.name}")

    @property
    def doc(self) -> str:
        lines = (self.run.__doc__ or "").strip().split("\n")
        return "\n".join(line.removeprefix("    ") for line in lines)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For attacks without options."""


_ATTACKS: dict[str, Attack] = {}


def register(entry: Attack) -> Attack:
    known = _ATTACKS.get(entry.name)
    if known is not None and _place(known.run) != _place(entry.run):
        raise UserError(f"two attacks are called '{entry.name}': give the one in {_place(entry.run)[0]} another name.")
    _ATTACKS[entry.name] = entry
    return entry


def _place(run: Any) -> tuple[str, str]:
    run = getattr(run, "func", run)  # a row of a table is a partial
    return run.__module__, run.__qualname__


def attack(
    *,
    name: str,
    family: Family,
    tier: Tier,
    access: Access,
    paper: str,
    options: type[Any] = NoOptions,
    **declared: Any,
) -> Callable[[Callable[[Exam, Checkpoint, Any], Finding]], Callable[[Exam, Checkpoint, Any], Finding]]:
    """Decorator that registers an attack; ``summary`` is the first line of the function's docstring."""

    def wrap(run: Callable[[Exam, Checkpoint, Any], Finding]) -> Callable[[Exam, Checkpoint, Any], Finding]:
        summary = declared.pop("summary", (run.__doc__ or "").strip().split("\n")[0])
        for key in ("needs", "modalities"):
            if key in declared:
                declared[key] = frozenset(declared[key])
        register(Attack(name, run, options, family, tier, access, paper, summary, **declared))
        return run

    return wrap


def all_attacks() -> dict[str, Attack]:
    """Every attack by name: the modules of this package, then entry points of group ``expunge.attacks``."""
    _import_all()
    return dict(sorted(_ATTACKS.items()))


@cache
def _import_all() -> None:
    """Once per process: the entry points of an environment are slow to read."""
    import_all("expunge.attacks", "expunge.attacks")


def get_attack(name: str) -> Attack:
    """By name, or ``path/to/file.py:name``.

    Raises:
        UserError: no such attack or file; the nearest name is suggested.
    """
    if ".py:" in name:
        path, _, wanted = name.rpartition(":")
        module = import_file(path, "attack")
        if wanted not in _ATTACKS or _place(_ATTACKS[wanted].run)[0] != module:
            raise UserError(f"'{path}' registers no attack called '{wanted}'.")
        return _ATTACKS[wanted]
    attacks = all_attacks()
    if name not in attacks:
        raise unknown("attack", name, attacks)
    return attacks[name]


def suite(tier: Tier) -> list[Attack]:
    """The attacks of a suite, cheapest first: "standard" holds those of "quick", "full" holds all.

    An attack of the user's own file is in no suite: it runs where it is named.
    """
    if tier not in TIERS:
        raise unknown("suite", tier, TIERS)
    within = TIERS[: TIERS.index(tier) + 1]
    chosen = [
        a for a in all_attacks().values() if a.tier in within and not _place(a.run)[0].startswith(prefix("attack"))
    ]
    return sorted(chosen, key=lambda a: (a.passes, a.name))
