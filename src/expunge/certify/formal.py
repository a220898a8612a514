"""L0 and L1: the two claims that hold by construction or by proof, for what was built so and never for an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from expunge.certify.audits import one_run_unlearning_loss
from expunge.certify.claims import Claim, Ruling, lacking, number
from expunge.certify.provenance import Clearance
from expunge.certify.refusals import Level
from expunge.certify.sections import DuplicateSearch, Guesses, PrivateTraining, Removal, Reset, Residual
from expunge.privacy_accounting import gaussian_epsilon

HONEST = "records and digests were logged honestly by whoever made the artefacts"
DISCLOSED = "conditional on what the request itself discloses, such as which block was touched"
PRIOR = "requests did not depend on outputs that were computed from the deleted records"


@dataclass(frozen=True, kw_only=True)
class Exact(Claim):
    """L0: what is released equals, byte for byte, what is built without the records."""

    level: ClassVar[Level] = "L0"
    title: ClassVar[str] = "exact"
    needs: ClassVar[tuple[str, ...]] = (
        "the digest of the zone or model after the removal",
        "the digest of one built again from the records that stay",
        "manifests of everything below it",
        "a search for near-duplicates",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        DISCLOSED,
        PRIOR,
        "SHA-256 has no collision here",
        "copies of the records outside of the training data (backups, logs, indexes) are dealt with elsewhere",
    )
    never: ClassVar[tuple[str, ...]] = (
        "that two releases, before and after, cannot be compared: they show what was deleted",
        "that other people's records do not say the same in other words",
    )

    removal: Removal | None = None
    provenance: Clearance | None = None
    duplicates: DuplicateSearch | None = None

    def ruling(self) -> Ruling:
        r = self.removal
        if r is None:
            return lacking("no digests of a removal were brought forward.")
        figures = {
            "requested": len(r.requested),
            "removed": len(r.removed),
            "after": r.after,
            "rebuilt": r.rebuilt,
            "base": r.base_after,
            "provenance_links": self.provenance.links if self.provenance else 0,
            "duplicates_searched": self.duplicates.searched if self.duplicates else 0,
            "duplicates_found": self.duplicates.pairs if self.duplicates else 0,
        }
        if r.rebuilt is not None and r.rebuilt != r.after:
            return Ruling("refuted", figures, ("what is released is not what is built without the records.",))
        gaps = {
            "nobody built it again from the records that stay.": r.rebuilt is None,
            "the kernels are not deterministic: report the agreement as equivalence (L2).": not r.deterministic,
            "nothing shows that rows were extracted one record at a time.": r.rows != "alone",
            "the base under the zone is not named by its digest.": r.base_after is None,
            "the statistics are not shown to be public.": r.statistics != "public",
            "no chain of manifests clears what it was made from.": not (self.provenance and self.provenance.clean),
            "nobody searched what stays for near-duplicates.": self.duplicates is None,
        }
        open_gaps = tuple(sentence for sentence, is_open in gaps.items() if is_open)
        return Ruling("unsupported" if open_gaps else "certified", figures, open_gaps)

    def sentence(self, ruling: Ruling) -> str:
        return (
            f"After the removal of {ruling.figures['removed']} record(s), what is released is byte for byte what is "
            f"built without them (SHA-256 {str(ruling.figures['after'])[:16]}…), and by the manifests of "
            f"{ruling.figures['provenance_links']} artefact(s) nothing below it was trained on or fitted to them."
        )


@dataclass(frozen=True, kw_only=True)
class Indistinguishable(Claim):
    """L1: (ε, δ)-indistinguishable from the same procedure without the records; all accounting in Gaussian privacy."""

    level: ClassVar[Level] = "L1"
    title: ClassVar[str] = "(ε, δ)"
    needs: ClassVar[tuple[str, ...]] = (
        "one of: a removal that is exact (L0), measured residuals of a strongly convex zone with noise, a certified "
        "reset, private training",
        "manifests of everything that was fixed without the records",
        "a search for near-duplicates",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        DISCLOSED,
        "features, blocks, regularisation and noise were fixed without the records",
        "noise is Gaussian, drawn afresh for every release by a generator made for secrets, and never used twice",
        "the released bytes were made after the noise, and the state before it was destroyed",
        "requests were made without looking at earlier releases; otherwise the releases do not add up as counted",
    )
    never: ClassVar[tuple[str, ...]] = (
        "anything about weights that the procedure did not make",
        "privacy of the records that stay",
    )

    residual: Residual | None = None
    reset: Reset | None = None
    private_training: PrivateTraining | None = None
    removal: Removal | None = None
    provenance: Clearance | None = None
    duplicates: DuplicateSearch | None = None
    guesses: Guesses | None = None

    def ruling(self) -> Ruling:
        found = self.residual or self.reset or self.private_training
        if found is None:
            return self._of_removal()
        if isinstance(found, Residual):
            own, gaps = self._of_residual(found)
        elif isinstance(found, Reset):
            own, gaps = reset_mu(found), ()
        else:
            own = found.mu * found.group  # group privacy of Gaussian privacy: Dong, Roth and Su 2022, Theorem 3
            gaps = _of_training(found)
        earlier = () if isinstance(found, PrivateTraining) else found.earlier_mu
        mu = math.sqrt(own**2 + sum(m**2 for m in earlier))
        epsilon = gaussian_epsilon(mu, found.delta) if math.isfinite(mu) else math.inf
        figures = {
            "mechanism": type(found).__name__,
            "mu": mu,
            "mu_of_this_release": own,
            "epsilon": epsilon,
            "delta": found.delta,
            "releases": 1 + len(earlier),
            **(
                {"group": found.group, "hides": found.hides}
                if isinstance(found, PrivateTraining)
                else {"noise": found.noise}
            ),
        }
        if isinstance(found, Residual):  # what the noise follows from; the norms themselves differ in their last bits
            figures |= {"gradient_norm_at_most": found.tolerance, "strong_convexity": found.strong_convexity}
        if self.guesses is not None and self.guesses.coins:
            shown = one_run_unlearning_loss(
                self.guesses.canaries, self.guesses.guesses, self.guesses.right, delta=found.delta
            )
            figures["canaries_show"] = shown.low
            if shown.low > epsilon:
                return Ruling("refuted", figures, ("canaries show a larger privacy loss than is claimed.",))
        if epsilon > self.limits.largest_epsilon:
            gaps += (f"ε = {number(epsilon)} promises nothing: the limit is {self.limits.largest_epsilon:g}.",)
        if self.duplicates is None:
            gaps += ("nobody searched what stays for near-duplicates.",)
        if not (self.provenance and self.provenance.clean):
            gaps += ("no chain of manifests clears what was fixed beforehand.",)
        return Ruling("unsupported" if gaps else "certified", figures, gaps)

    def _of_removal(self) -> Ruling:
        """Equal bytes are (0, 0)-indistinguishable: nothing is left to be measured."""
        exact = Exact(removal=self.removal, provenance=self.provenance, duplicates=self.duplicates).ruling()
        if self.removal is None or exact.verdict != "certified":
            return lacking("no exact removal, residual, reset or private training was brought forward.")
        figures = {"mechanism": "Exact", "mu": 0.0, "epsilon": 0.0, "delta": 0.0, "releases": 1}
        return Ruling("certified", figures)

    def _of_residual(self, r: Residual) -> tuple[float, tuple[str, ...]]:
        """μ = (τ₁ + τ₂)/(λσ) from the tolerances, which say nothing about the data; residuals must lie below them."""
        from expunge.zones.residual import ROUNDING_MARGIN  # needs PyTorch, which no other claim does

        gaps: tuple[str, ...] = ()
        least = min(r.tolerance, r.reference_tolerance)
        if r.residual + r.rounding > r.tolerance or r.reference_residual + r.rounding > r.reference_tolerance:
            gaps += ("a measured residual is above its tolerance: the optimisation did not converge.",)
        if least < ROUNDING_MARGIN * r.rounding:
            gaps += ("the tolerance drowns in the rounding of the gradient: whether it was reached cannot be told.",)
        if r.dtype != "float64":
            gaps += ("residuals were summed in single precision: their rounding is not below the tolerance.",)
        if r.noise == 0:
            return math.inf, (*gaps, "no noise was put on the weights.")
        if r.logit_noise is None or r.logit_noise > self.limits.logit_noise:
            gaps += (
                f"the noise moves logits by more than {self.limits.logit_noise:g}: the zone is of no use with it.",
            )
        return (r.tolerance + r.reference_tolerance) / (r.strong_convexity * r.noise), gaps

    def sentence(self, ruling: Ruling) -> str:
        f = ruling.figures
        if f["mechanism"] == "Exact":
            return "What is released is (0, 0)-indistinguishable from what is built without the records: it is equal."
        given = f"(ε, δ) = ({number(f['epsilon'], 4)}, {f['delta']:g})-indistinguishable"
        if f["mechanism"] == "PrivateTraining":
            return (
                f"The model is {given} from one that the same training gives without the {f['group']} record(s) of it "
                "that are to be forgotten: nothing was removed, noise on clipped gradients hid them from the start."
            )
        if f["mechanism"] == "Reset":
            return (
                f"The model is {given} from one that the same reset gives for an original that never had the records: "
                "noise drowned what was learnt, and everything in it since then was learnt from the records that stay."
            )
        norm = f.get("gradient_norm_at_most")
        rests = f", by noise on a solve with a gradient norm of at most {norm:g} over all that stay" if norm else ""
        return (
            f"The released zone is {given} from one that the same procedure builds without the "
            f"records, over {f['releases']} release(s) together{rests}."
        )


def _of_training(found: PrivateTraining) -> tuple[str, ...]:
    gaps: tuple[str, ...] = ()
    if not found.clipped:
        gaps += ("gradients were not clipped per record: no bound on one record's influence.",)
    if found.hides is not None and found.group > found.hides:
        gaps += (f"the training promised to hide {found.hides} record(s), and {found.group} are to be forgotten.",)
    return gaps


def reset_mu(reset: Reset) -> float:
    """μ of clipped noisy steps from a ball: (2 C₀ ρᵀ + 2 η C₁ Σ ρʲ) / (s √Σ ρ²ʲ), j from 0 to T − 1.

    Koloskova et al. 2025 (certified unlearning for neural networks), gradient clipping; as Rényi privacy of slope μ²/2
    at every order, in Gaussian form by shifted interpolation (Bok, Su and Altschuler 2024). Both worlds see retain
    data only. Without decay and with T = C₀/(η C₁) steps it is 4 C₀/(s √T): the noise drowns what the zone had learnt,
    so this is a certified re-initialisation, and the zone's own training is its price.
    """
    powers = [reset.decay**j for j in range(reset.steps)]
    shift = 2 * reset.radius * reset.decay**reset.steps + 2 * reset.learning_rate * reset.clip * math.fsum(powers)
    return shift / (reset.noise * math.sqrt(math.fsum(p * p for p in powers)))
