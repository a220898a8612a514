"""Linear probes: can a simple reader get the fact, or the membership, out of the hidden states?

For each block a ridge classifier is fitted to states of samples that are known to be trained on, and applied to the
forget samples. A probe that is given enough freedom finds anything, so it is always compared with a control task of
the same size (Hewitt & Liang 2019, "Designing and Interpreting Probes with Control Tasks", arXiv:1909.03368):
labels that are shuffled among samples, within what the context already gives away.

Shape suffixes: M training rows, N rows, D hidden width, C classes, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.lens import fact_tokens, inside
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.stats import Estimate, auc_estimate, bootstrap_mean

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PENALTIES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
FOLDS = 5


@dataclass(frozen=True)
class Rows:
    """What a probe reads: states per block, and per row the token to find, the token before it and its sample."""

    states: list[Floats]  # (N, D) per block
    label_N: Ints
    context_N: Ints
    sample_N: Ints

    def __len__(self) -> int:
        return len(self.label_N)


@dataclass(frozen=True)
class Ridge:
    """A linear reader: class scores are (x − centre) / spread @ weight + bias."""

    centre_D: Floats
    spread_D: Floats
    weight_DC: Floats
    bias_C: Floats

    def scores(self, states_ND: Floats) -> Floats:
        return np.asarray((states_ND - self.centre_D) / self.spread_D @ self.weight_DC + self.bias_C)


def fit_ridge(states_MD: Floats, wanted_MC: Floats, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Least squares on standardised states with the penalty of the least leave-one-out error.

    The leave-one-out residual of row i is (y_i − ŷ_i) / (1 − h_i), h the diagonal of the hat matrix with the
    intercept's 1/M (Allen 1974; Golub et al. 1979): exact for fixed standardisation, and no second fit is needed.
    """
    centre_D, spread_D = states_MD.mean(0), states_MD.std(0)
    spread_D = np.where(spread_D > 1e-12, spread_D, 1.0)
    bias_C = wanted_MC.mean(0)
    left_MR, sizes_R, right_RD = np.linalg.svd((states_MD - centre_D) / spread_D, full_matrices=False)
    seen_RC = left_MR.T @ (wanted_MC - bias_C)
    best, weight_DC = math.inf, np.zeros((states_MD.shape[1], wanted_MC.shape[1]))
    for penalty in penalties:
        shrink_R = sizes_R**2 / (sizes_R**2 + penalty)
        fitted_MC = (left_MR * shrink_R) @ seen_RC + bias_C
        lever_M = np.clip((left_MR**2) @ shrink_R + 1 / len(states_MD), 0.0, 1 - 1e-9)
        error = float((((wanted_MC - fitted_MC) / (1 - lever_M)[:, None]) ** 2).mean())
        if error < best:
            best = error
            weight_DC = right_RD.T @ ((sizes_R / (sizes_R**2 + penalty))[:, None] * seen_RC)
    return Ridge(centre_D, spread_D, weight_DC, bias_C)


def one_hot(label_N: Ints, classes_C: Ints) -> Floats:
    """(N, C); a label that is no class gives a row of zeros."""
    return np.asarray(label_N[:, None] == classes_C[None, :], dtype=np.float64)


def token_rows(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Rows:
    """The states from which the next token is predicted, for every fact token of the targets."""
    states: list[list[Floats]] = [[] for _ in checkpoint.adapter.blocks(checkpoint.model)]
    labels, contexts, numbers = [], [], []
    for batch in inside(checkpoint, samples):
        sample_N = batch.positions.sample_N.cpu().numpy()
        ids_N = batch.positions.targets_N.cpu().numpy()
        for row, index in enumerate(batch.rows):
            mine = np.flatnonzero(sample_N == row)
            if not len(mine):
                continue
            kept = fact_tokens(checkpoint.adapter, samples[index], ids_N[mine])
            # The token read at a position is the target before it; the first target follows the prompt.
            before = np.concatenate([[-1], ids_N[mine][:-1]])
            for k, block in enumerate(batch.states):
                states[k].append(block.double().cpu().numpy()[mine[kept]])
            labels.append(ids_N[mine[kept]])
            contexts.append(before[kept])
            numbers.append(np.full(int(kept.sum()), index))
    if not labels:
        return Rows([], *(np.zeros(0, dtype=np.int64) for _ in range(3)))
    label_N, context_N, sample_N = (np.concatenate(part).astype(np.int64) for part in (labels, contexts, numbers))
    return Rows([np.concatenate(block) for block in states], label_N, context_N, sample_N)


def shuffled_within(label_M: Ints, context_M: Ints, rng: np.random.Generator) -> Ints:
    """The labels, shuffled among the rows that share a context: every slot keeps its values, no row its own."""
    mixed_M = label_M.copy()
    for context in np.unique(context_M):
        rows = np.flatnonzero(context_M == context)
        mixed_M[rows] = label_M[rng.permutation(rows)]
    return mixed_M


def folds_by(sample_M: Ints, subjects: Sequence[str], folds: int = FOLDS) -> Ints:
    """Fold of each row, so that a subject is never on both sides: (M,)."""
    place = {s: i for i, s in enumerate(dict.fromkeys(subjects))}
    return np.array([place[subjects[i]] % folds for i in sample_M], dtype=np.int64)


def held_out(states_MD: Floats, wanted_MC: Floats, fold_M: Ints) -> Floats:
    """Scores of each row from a probe that was fitted without its fold, (M, C)."""
    scores_MC = np.zeros_like(wanted_MC)
    for fold in np.unique(fold_M):
        out_M = fold_M == fold
        scores_MC[out_M] = fit_ridge(states_MD[~out_M], wanted_MC[~out_M]).scores(states_MD[out_M])
    return scores_MC


def reciprocal_rank(scores_NC: Floats, at_N: Ints) -> Floats:
    """1 / (1 + number of classes with a higher score than the true one), ties counted half: (N,)."""
    own_N1 = np.take_along_axis(scores_NC, at_N[:, None], axis=1)
    ahead_N = (scores_NC > own_N1).sum(1) + 0.5 * ((scores_NC == own_N1).sum(1) - 1)
    return np.asarray(1.0 / (1.0 + ahead_N))


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Of the fact-probe and membership-probe attacks."""

    limit: int = option(1000, "most training samples, drawn at random")
    controls: int = option(5, "control tasks, each with its own shuffled labels; their mean is reported")


def known_samples(exam: Exam, options: ProbeOptions) -> list[Sample]:
    """Samples that were trained on and are not to be forgotten."""
    if options.limit < 1 or options.controls < 1:
        raise UserError("probes need a limit and a number of controls of at least 1: give for example 1000 and 5.")
    pool = [*exam.trained, *exam.samples.get("retain", [])]
    drawn = sorted(exam.rng("probe", "known").permutation(len(pool))[: options.limit].tolist())
    return [pool[i] for i in drawn]


@attack(
    name="fact-probe",
    family="recovery",
    tier="standard",
    access="weights",
    paper="Hewitt & Liang 2019, arXiv:1909.03368; Patil et al. 2024, arXiv:2309.17410",
    options=ProbeOptions,
    formula="1/rank of the answer's token among the classes of a ridge probe on block k; selectivity = accuracy - "
    "accuracy with shuffled labels",
    passes=3.0,
    needs={"retain"},
    modalities={"text", "multimodal"},
)
def fact_probe(exam: Exam, checkpoint: Checkpoint, options: ProbeOptions) -> Finding:
    """Reads the answer's tokens from hidden states with a probe that was fitted to retained samples.

    The block is the one that reads retained subjects best when they are left out of the fit (never chosen on forget).
    ``fact-probe`` is the mean reciprocal rank of the answer's fact tokens among the tokens that the probe knows; nan
    where it knows none of them. Figures over forget tokens, by subject: ``accuracy``, ``control`` (labels shuffled
    within the same preceding token, so that only what the slot gives away is left), ``selectivity`` = accuracy −
    control, and ``covered``, the share of tokens that are classes of the probe.

    Raises:
        UserError: an option is below 1.
    """
    known = known_samples(exam, options)
    train = token_rows(checkpoint, known)
    classes_C = np.unique(train.label_N)
    if len(classes_C) < 2 or len({known[i].subject for i in train.sample_N}) < 2:
        return Finding(notes=["not measured: the retained samples have fewer than two subjects or answer tokens"])
    wanted_MC = one_hot(train.label_N, classes_C)
    fold_M = folds_by(train.sample_N, [s.subject for s in known])
    at_M = np.searchsorted(classes_C, train.label_N)
    reads = [float(reciprocal_rank(held_out(x, wanted_MC, fold_M), at_M).mean()) for x in train.states]
    block = int(np.argmax(reads))
    probe = fit_ridge(train.states[block], wanted_MC)
    rng = exam.rng("probe", "control")
    controls = []
    for _ in range(options.controls):
        mixed_M = shuffled_within(train.label_N, train.context_N, rng)
        controls.append(fit_ridge(train.states[block], one_hot(mixed_M, classes_C)))
    scores: dict[Role, list[float]] = {}
    figures: dict[str, Estimate] = {}
    roles: tuple[Role, ...] = ("forget", "holdout")
    for role in [r for r in roles if exam.samples.get(r)]:
        samples = exam.samples[role]
        rows = token_rows(checkpoint, samples)
        covered_N = np.isin(rows.label_N, classes_C)
        at_N = np.searchsorted(classes_C, rows.label_N[covered_N])
        states_ND = rows.states[block][covered_N] if len(rows) else np.zeros((0, len(probe.centre_D)))
        read_NC = probe.scores(states_ND)
        ranks_N = reciprocal_rank(read_NC, at_N)
        owner_N = rows.sample_N[covered_N]
        scores[role] = [_mean(ranks_N[owner_N == i]) for i in range(len(samples))]
        if role == "forget":
            right_N = (read_NC.argmax(1) == at_N).astype(float)
            guess_N = np.mean([c.scores(states_ND).argmax(1) == at_N for c in controls], axis=0)
            groups = [samples[i].subject for i in owner_N]
            settings: dict[str, Any] = {"level": exam.level, "resamples": exam.resamples, "seed": exam.seed}
            for name, values in (("accuracy", right_N), ("control", guess_N), ("selectivity", right_N - guess_N)):
                figures[f"fact-probe.{name}"] = bootstrap_mean(values, groups, **settings, definition=f"probe-{name}/1")
            figures["fact-probe.covered"] = Estimate(
                float(covered_N.mean()) if len(rows) else math.nan, n=len(rows), definition="probe-covered/1"
            )
    notes = [
        f"block {block + 1} of {len(reads)}, chosen on retained subjects left out of the fit (mean reciprocal rank "
        f"{reads[block]:.2f}); fitted to {len(train)} tokens of {len(known)} retained samples, {len(classes_C)} classes"
    ]
    return Finding({"fact-probe": scores}, figures, notes=notes)


def pooled(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[Floats]:
    """Mean state over the target positions of each sample, (N, D) per block; zeros without a target."""
    found: list[Floats] = []
    for batch in inside(checkpoint, samples):
        counts_B = batch.positions.count_per_sample().clamp_min(1)
        for k, states_ND in enumerate(batch.states):
            sums_BD = states_ND.new_zeros(len(batch.rows), states_ND.shape[-1])
            sums_BD.index_add_(0, batch.positions.sample_N, states_ND)
            if len(found) <= k:
                found.append(np.zeros((len(samples), states_ND.shape[-1])))
            found[k][batch.rows] = (sums_BD / counts_B[:, None]).double().cpu().numpy()
    return found


@attack(
    name="membership-probe",
    family="membership",
    tier="standard",
    access="weights",
    paper="LUMIA, Ibanez-Lissen et al. 2024, arXiv:2411.19876; Hewitt & Liang 2019, arXiv:1909.03368 (control)",
    options=ProbeOptions,
    formula="decision value of a ridge probe, retained = 1, auxiliary never-trained = 0, on the mean state of block k",
    passes=3.0,
    needs={"retain", "aux"},
    modalities={"text", "multimodal"},
)
def membership_probe(exam: Exam, checkpoint: Checkpoint, options: ProbeOptions) -> Finding:
    """Tells trained from never-trained samples by a linear probe on the mean hidden state of the answer.

    Fitted to retained samples (members) and auxiliary texts (non-members); the block is the one with the best AUC on
    subjects left out of the fit. Figures: that AUC, and ``control_auc``, the same with members and non-members
    shuffled among subjects. Where the first is not above chance, the scores say nothing, and a note says so. A high
    AUC may also mean that the two kinds of text differ: on the reference the same probe must find nothing in forget.

    Raises:
        UserError: an option is below 1.
    """
    known = known_samples(exam, options)
    crowd = [*known, *exam.aux]
    member_M = np.array([1.0] * len(known) + [0.0] * len(exam.aux))
    subjects = [s.subject for s in crowd]
    place = np.arange(len(crowd), dtype=np.int64)
    if min(len({s.subject for s in known}), len({s.subject for s in exam.aux})) < 2:
        return Finding(notes=["not measured: fewer than two retained or two auxiliary subjects"])
    fold_M = folds_by(place, subjects, folds=min(FOLDS, len({s.subject for s in exam.aux})))
    # Folds run over all subjects in order; each side gets its own count, so that none is left without a class.
    fold_M[len(known) :] = folds_by(place[: len(exam.aux)], subjects[len(known) :], int(fold_M.max()) + 1)
    states = pooled(checkpoint, crowd)
    aucs = [_held_out_auc(x, member_M, fold_M, subjects, exam.level) for x in states]
    block = int(np.argmax([found.value for found in aucs]))
    rng = exam.rng("probe", "members")
    side = dict(zip(subjects, member_M.tolist(), strict=True))
    mixed = []
    for _ in range(options.controls):
        swapped = dict(zip(side, rng.permutation(list(side.values())).tolist(), strict=True))
        shuffled_M = np.array([swapped[s] for s in subjects])
        mixed.append(_held_out_auc(states[block], shuffled_M, fold_M, subjects, exam.level).value)
    probe = fit_ridge(states[block], member_M[:, None])
    scores: dict[Role, list[float]] = {}
    roles: tuple[Role, ...] = ("forget", "holdout")
    for role in [r for r in roles if exam.samples.get(r)]:
        scores[role] = probe.scores(pooled(checkpoint, exam.samples[role])[block])[:, 0].tolist()
    control = Estimate(float(np.mean(mixed)), n=len(crowd), definition="probe-auc/1")
    figures = {"membership-probe.known_auc": aucs[block], "membership-probe.control_auc": control}
    notes = [f"block {block + 1} of {len(states)}; {len(known)} retained and {len(exam.aux)} auxiliary samples"]
    if not aucs[block].low > 0.5:
        notes.append("the probe does not tell known members from non-members: its scores are no evidence")
    return Finding({"membership-probe": scores}, figures, notes=notes)


def _held_out_auc(states_MD: Floats, member_M: Floats, fold_M: Ints, subjects: Sequence[str], level: float) -> Estimate:
    """AUC of rows under probes that were fitted without their subject, with subjects as units."""
    value_M = held_out(states_MD, member_M[:, None], fold_M)[:, 0]
    inside_M = member_M == 1
    sides = [[subjects[int(i)] for i in np.flatnonzero(m)] for m in (inside_M, ~inside_M)]
    return auc_estimate(value_M[inside_M], value_M[~inside_M], *sides, level=level, definition="probe-auc/1")


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
