"""The blind baseline: can forget and holdout be told apart without any model?

If they can, a membership attack may succeed on the texts alone (Das et al. 2024, arXiv:2406.16201; Meeus et al. 2024,
arXiv:2406.17975), and its AUC says nothing about memory. The same for every checkpoint.

Shape suffixes: N texts, W words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.membership import WORDS
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.stats import Estimate, auc_estimate

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BlindOptions:
    """Options of the blind baseline."""

    folds: int = option(5, "folds; a subject is never in two of them", "mia_llms_benchmark")
    trees: int = option(100, "trees of the forest, of depth 2 and at least 5 texts per leaf", "mia_llms_benchmark")
    share: float = option(0.05, "share of texts in which a word must stand to count", "mia_llms_benchmark")
    margin: float = option(0.05, "how far the interval must stay away from 0.5 for the split to be called unfit")

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"{self.folds} folds cannot be told apart: give at least 2.")
        if not 0 <= self.margin < 0.5:
            raise UserError(f"margin {self.margin} is not from 0 to below 0.5: give for example 0.05.")


def text_of(sample: Sample) -> str:
    return f"{sample.prompt}\n{sample.target}" if sample.prompt else str(sample.target)


def out_of_fold(
    texts: Sequence[str], labels: Sequence[int], subjects: Sequence[str], options: BlindOptions, seed: int
) -> Floats:
    """How likely a forest of word counts, trained on the other subjects, finds label 1, (N,); nan where it cannot.

    Folds hold different shares of label 1, and a forest that saw fewer of them answers lower: pooled as they are,
    the answers would rank texts by their fold, against the truth. So both labels weigh the same in training, and each
    answer is replaced by its mid-rank within its fold, in (0, 1).
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import StratifiedGroupKFold

    label_N, found_N = np.array(labels), np.full(len(texts), math.nan)
    groups = [len({s for s, y in zip(subjects, labels, strict=True) if y == side}) for side in (0, 1)]
    folds = min(options.folds, *groups)
    if folds < 2:
        return found_N
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(np.zeros(len(texts)), label_N, list(subjects)):
        if len(set(label_N[train].tolist())) < 2:
            continue
        words: Any = CountVectorizer(min_df=options.share)
        try:
            train_NW = words.fit_transform([texts[i] for i in train])
        except ValueError:  # no word stands in that share of the texts: nothing to tell them apart by
            found_N[test] = 0.5
            continue
        forest: Any = RandomForestClassifier(
            options.trees, max_depth=2, min_samples_leaf=5, class_weight="balanced", random_state=seed, n_jobs=1
        )
        forest.fit(train_NW, label_N[train])
        answers = forest.predict_proba(words.transform([texts[i] for i in test]))[:, 1]
        found_N[test] = (scipy_stats.rankdata(answers) - 0.5) / len(test)
    return found_N


def blind_auc(scores_N: Floats, labels: Sequence[int], subjects: Sequence[str], level: float, name: str) -> Estimate:
    """AUC of label 1 over label 0, subjects as the unit of the interval."""
    sides = [[i for i, y in enumerate(labels) if y == side] for side in (1, 0)]
    values, groups = [scores_N[side] for side in sides], [[subjects[i] for i in side] for side in sides]
    found = auc_estimate(*values, *groups, level=level, definition=f"blind-{name}-auc/1")
    if len(np.unique(scores_N[~np.isnan(scores_N)])) == 1:  # all pairs tie: the formula would claim certainty
        found = Estimate(found.value, n=found.n, definition=found.definition, note="the same for every text")
    return found


def unfit(estimate: Estimate, margin: float, two_sided: bool) -> bool:
    """Whether the interval stays further than ``margin`` from 0.5; below it only where the score has no direction."""
    return estimate.low > 0.5 + margin or (two_sided and estimate.high < 0.5 - margin)


@attack(
    name="blind",
    family="membership",
    tier="quick",
    access="text",
    paper="Das et al. 2024, arXiv:2406.16201; Meeus et al. 2024, arXiv:2406.17975",
    formula="AUC of a random forest on word counts, 5 folds by subject; AUC of the text length in bytes",
    options=BlindOptions,
    needs=("holdout",),
    modalities=WORDS,
)
def blind(exam: Exam, checkpoint: Checkpoint, options: BlindOptions) -> Finding:
    """Whether forget and holdout differ in their words or lengths, without any model.

    Gives figures and no scores: it is a check of the split, not an attack on the checkpoint. Where a classifier that
    never asks a model tells the two apart, ``blind.words_auc`` or ``blind.length_auc`` is away from 0.5, and membership
    scores may measure the split. The report then calls it unfit; differences from a retrained model still count.
    """
    key = (__name__, options)
    if key not in exam.shared:
        exam.shared[key] = _examine(exam, options)
    finding: Finding = exam.shared[key]
    return finding


def _examine(exam: Exam, options: BlindOptions) -> Finding:
    samples = [*exam.forget, *exam.holdout]
    labels = [1] * len(exam.forget) + [0] * len(exam.holdout)
    subjects = [s.subject for s in samples]
    texts = [text_of(s) for s in samples]
    seed = int(exam.rng("blind").integers(2**31))
    words_N = out_of_fold(texts, labels, subjects, options, seed)
    lengths_N = np.array([len(t.encode()) for t in texts], dtype=np.float64)
    figures, notes = {}, []
    for name, scores_N, two_sided in (("words", words_N, False), ("length", lengths_N, True)):
        found = blind_auc(scores_N, labels, subjects, exam.level, name)
        if unfit(found, options.margin, two_sided):
            note = (
                f"split unfit: forget and holdout differ in their {name} alone (AUC {found.value:.2f}, interval "
                f"{found.low:.2f} to {found.high:.2f}, further than {options.margin:g} from 0.5), so membership "
                "scores may measure that; judge by the difference to a retrained model, or take another holdout"
            )
            found = replace(found, note=note)
            notes.append(f"blind: {note}")
        figures[f"blind.{name}_auc"] = found
    if np.isnan(words_N).all():
        notes.append("blind: words cannot be judged, since forget or holdout has a single subject")
    return Finding(figures=figures, notes=notes)
