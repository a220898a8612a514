"""What completeness is computed from: one number per sample and model.

Shape suffixes: N samples, K shadow models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from expunge.errors import UserError

Floats = NDArray[np.float64]
Form = Literal["text", "classifier"]


@dataclass(frozen=True, eq=False)
class Readings:
    """One set of samples under the unlearned model, the original, and K models that never saw them.

    Form "text": mean negative log-likelihood in nats per token (or bits per byte, where tokenizers differ: any loss
    per unit of text does). Form "classifier": probability of the true label. ``original_N`` is None offline.
    ``label_N`` is 1 where the sample is still a member of the unlearned model's training set and 0 where it is not.
    """

    form: Form
    ids: Sequence[str]
    unlearned_N: Floats
    shadow_KN: Floats
    original_N: Floats | None = None
    subjects: Sequence[str] | None = None
    label_N: Floats | None = None

    def __post_init__(self) -> None:
        num = len(self.ids)
        if self.shadow_KN.ndim != 2 or len(self.shadow_KN) < 1:
            raise UserError("completeness needs at least one model that never saw the samples: give a shadow.")
        sizes = {"unlearned": self.unlearned_N.shape, "shadow": self.shadow_KN.shape[1:]}
        if self.original_N is not None:
            sizes["original"] = self.original_N.shape
        if self.label_N is not None:
            sizes["label"] = self.label_N.shape
        for name, shape in sizes.items():
            if shape != (num,):
                raise UserError(f"{num} ids but {shape} values of '{name}': give one value per sample.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_shadows(self) -> int:
        return len(self.shadow_KN)

    def select(self, keep: NDArray[np.bool_] | Sequence[int]) -> Readings:
        """The same with some of the samples."""
        places = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep, dtype=np.intp)
        return replace(
            self,
            ids=[self.ids[i] for i in places],
            unlearned_N=self.unlearned_N[places],
            shadow_KN=self.shadow_KN[:, places],
            original_N=None if self.original_N is None else self.original_N[places],
            subjects=None if self.subjects is None else [self.subjects[i] for i in places],
            label_N=None if self.label_N is None else self.label_N[places],
        )

    def complete(self) -> NDArray[np.bool_]:
        """(N,) whether every number of a sample is there."""
        whole = np.isfinite(self.unlearned_N) & np.isfinite(self.shadow_KN).all(axis=0)
        return whole if self.original_N is None else whole & np.isfinite(self.original_N)


EPS_TEXT = (1e-1, 1e-5)
EPS_CLASSIFIER = (1e-2, 1e-5)


def text_signal(loss: Floats, eps: tuple[float, float] = EPS_TEXT) -> Floats:
    """-ln(e1 - ln(e2 + 1 - exp(-loss))): the bounded Gumbel map of 1 - p; it increases with the loss.

    Source: IAM, arXiv 2506.06112, language-model form; p is the geometric mean of the token probabilities.
    """
    return np.asarray(-np.log(eps[0] - np.log(eps[1] - np.expm1(-loss))))


def classifier_signal(prob: Floats, eps: tuple[float, float] = EPS_CLASSIFIER, normalised: bool = True) -> Floats:
    """-ln(e1 - ln(p + e2)), scaled to [0, 1]: the bounded Gumbel map; it increases with the probability.

    Source: IAM, arXiv 2506.06112, image form.
    """
    raw = np.asarray(-np.log(eps[0] - np.log(prob + eps[1])))
    if not normalised:
        return raw
    low, high = (-math.log(eps[0] - math.log(p + eps[1])) for p in (0.0, 1.0))
    return (raw - low) / (high - low)
