"""UnLeak: a classifier on what the class probabilities of the two models say, trained on shadow models only.

Chen et al., "When Machine Unlearning Jeopardizes Privacy", CCS 2021 (arXiv 2005.02205). Shape suffixes: N samples, V
classes, F features.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from expunge.completeness.readings import Floats
from expunge.errors import UserError, unknown

Features = Literal["sorted-diff", "direct-diff", "sorted-concat", "direct-concat", "l2"]
Learner = Literal["logistic", "mlp"]
TOP = 3  # probabilities that are kept one by one; the others are averaged


def features(original_NV: Floats, unlearned_NV: Floats, kind: Features = "sorted-diff") -> Floats:
    """(N, F) features of two posteriors of the same samples (paper section 4.3).

    "sorted": both are put in the order in which the original's probabilities fall, the first three are kept and the
    rest averaged, so that the number of features does not depend on the classes.

    Raises:
        UserError: an unknown kind, or posteriors of different shapes.
    """
    if kind not in get_args(Features):
        raise unknown("UnLeak feature", kind, get_args(Features))
    if original_NV.shape != unlearned_NV.shape or original_NV.ndim != 2:
        raise UserError(
            f"UnLeak compares two (N, V) posteriors: {original_NV.shape} and {unlearned_NV.shape} were given."
        )
    form, _, join = kind.partition("-")
    if kind == "l2":
        return np.asarray(np.linalg.norm(original_NV - unlearned_NV, axis=1, keepdims=True))
    if form == "sorted":
        order_NV = np.argsort(-original_NV, axis=1, kind="stable")
        original_NV, unlearned_NV = (_leading(p, order_NV) for p in (original_NV, unlearned_NV))
    if join == "diff":
        return original_NV - unlearned_NV
    return np.concatenate([original_NV, unlearned_NV], axis=1)


def _leading(posterior_NV: Floats, order_NV: NDArray[np.intp]) -> Floats:
    ordered_NV = np.take_along_axis(posterior_NV, order_NV, axis=1)
    if ordered_NV.shape[1] <= TOP:
        return np.asarray(ordered_NV)
    return np.concatenate([ordered_NV[:, :TOP], ordered_NV[:, TOP:].mean(axis=1, keepdims=True)], axis=1)


class UnLeak:
    """Fitted once on shadows, then asked about the pair (original, unlearned)."""

    def __init__(self, learner: Learner = "logistic", kind: Features = "sorted-diff", seed: int = 0) -> None:
        if learner not in get_args(Learner):
            raise unknown("UnLeak learner", learner, get_args(Learner))
        self.kind: Features = kind
        self._model = _learner(learner, seed)
        self._constant: float | None = None

    def fit(self, whole_NV: Floats, part_NV: Floats, kept_N: NDArray[np.bool_]) -> UnLeak:
        """Learn from samples that a shadow original was all trained on: which did a shadow without some keep?

        ``whole_NV``: posteriors of the shadow original. ``part_NV``: of the shadow trained on part of its data.
        ``kept_N``: that part.

        Raises:
            UserError: all samples or none were kept.
        """
        if kept_N.all() or not kept_N.any():
            raise UserError("UnLeak needs shadow samples of both kinds, kept and left out: give a smaller share.")
        table_NF = features(whole_NV, part_NV, self.kind)
        if np.ptp(table_NF, axis=0).max() == 0:  # nothing to learn from: every sample gets the same answer
            self._constant = float(kept_N.mean())
            return self
        self._constant = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an MLP that stops at its last epoch is used as it is
            self._model.fit(table_NF, kept_N.astype(int))
        return self

    def score(self, original_NV: Floats, unlearned_NV: Floats) -> Floats:
        """(N,) probability that the unlearned model was still trained on the sample."""
        if self._constant is not None:
            return np.full(len(original_NV), self._constant)
        table_NF = features(original_NV, unlearned_NV, self.kind)
        return np.asarray(self._model.predict_proba(table_NF)[:, 1], dtype=np.float64)


def _learner(learner: Learner, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if learner == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    mlp = MLPClassifier((32,), learning_rate_init=0.01, max_iter=200, early_stopping=True, random_state=seed)
    return make_pipeline(StandardScaler(), mlp)
