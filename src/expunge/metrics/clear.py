"""The metrics of CLEAR (Dontsov et al. 2024, arXiv:2410.18057) for models that see, from the numbers of its six sets.

A set is a :class:`expunge.metrics.tofu.TofuSet`: losses of the answer, of the answer in other words, of wrong answers,
and ROUGE. The real sets and the two sets of face recognition have the wrong answers as options of a choice.

The authors' code differs from their paper in what is averaged; the default here follows the paper, per item, and the
published Jensen-Shannon score stands beside it under its own name.

Shape suffixes: N items, P parts, T terms (set and part), R resamples, D embedding width, C people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from expunge.data.portrait_words import CAPTION_PROMPTS, NAME_PROMPT
from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.metrics.registry import metric
from expunge.metrics.rouge import rouge_score
from expunge.metrics.tofu import (
    ForgetQuality,
    Ratio,
    Score,
    TofuSet,
    forget_quality,
    harmonic_mean,
    tofu_set,
    truth_scores,
)
from expunge.signals.record import Signals
from expunge.stats import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Groups,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_means,
    percentile_interval,
)

Floats = NDArray[np.float64]
Part = Literal["prob", "rouge", "truth_ratio"]
Kind = Literal["caption", "face", "question", "text"]
PAPER: tuple[Part, ...] = get_args(Part)
TABLES: tuple[Part, ...] = ("prob", "truth_ratio")  # what the code that prints the paper's tables averages
REAL, RETAIN, FORGET = ("real_faces", "real_world"), ("retain", "retain_facerec"), ("forget", "forget_facerec")
OPTIONS = (*REAL, "retain_facerec", "forget_facerec")  # sets whose wrong answers are options of a choice


# -- the six sets --------------------------------------------------------------------------------------------------


def kind_of(sample: Sample) -> Kind:
    """What CLEAR asks with a sample: a picture's caption, the name of the face on it, anything else that it shows, or
    a question in words alone. What stands beside a picture without any question is its caption, too."""
    if sample.image is None:
        return "text"
    if sample.prompt == NAME_PROMPT:
        return "face"
    return "caption" if sample.prompt in ("", *CAPTION_PROMPTS) else "question"


def clear_set(
    name: str, samples: Sequence[Sample], signals: Sequence[Signals], rouge: Mapping[str, float] | None = None
) -> TofuSet:
    """One of CLEAR's sets from the signals of the samples and their probes, joined by id.

    Raises:
        UserError: no such set, a sample without signals, or a restated or wrong answer to another question than the
            sample's own: its loss could not be compared.
    """
    if name not in (*REAL, *RETAIN, *FORGET):
        raise unknown("CLEAR set", name, (*REAL, *RETAIN, *FORGET))
    for sample in samples:
        for probe in (*sample.probes_of("restated"), *sample.probes_of("perturbed")):
            if probe.prompt != sample.prompt:
                raise UserError(
                    f"sample '{sample.id}' asks \"{sample.prompt}\" but one of its {probe.kind} answers belongs to "
                    f'"{probe.prompt}": losses compare only after one question.'
                )
    return tofu_set(samples, signals, rouge, options=name in OPTIONS)


@dataclass(frozen=True, slots=True)
class ClearScore:
    """A score of one model; with references, also how far it is from their mean, on the same draws of subjects."""

    value: Estimate
    gap: Estimate | None = None


def _terms(
    sets: Mapping[str, TofuSet], parts: Sequence[Part], score: Score, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Means of every part of every set, (1, T), and their bootstrap draws, (R, T); sets are drawn independently."""
    means, draws = [], []
    for number, (name, items) in enumerate(sets.items()):
        columns = {
            "prob": items.probabilities(),
            "rouge": items.rouge_N,
            "truth_ratio": truth_scores(items.log_ratios(), score),
        }
        for part in parts:
            if not np.isfinite(columns[part]).any():
                raise UserError(
                    f"no {part} was measured on set '{name}': measure it, or name the parts without it "
                    f"(parts={tuple(p for p in parts if p != part)})."
                )
        table_NP = np.stack([columns[part] for part in parts], axis=1)
        means.append(np.nanmean(table_NP, axis=0))
        draws.append(bootstrap_means(table_NP, items.groups, resamples, seed + number))
    return np.concatenate(means)[None, :], np.concatenate(draws, axis=1)


def _clear_score(
    name: str,
    wanted: Sequence[str],
    sets: Mapping[str, TofuSet],
    references: Sequence[Mapping[str, TofuSet]],
    parts: Sequence[Part],
    level: float,
    resamples: int,
    seed: int,
) -> ClearScore:
    chosen = {n: sets[n] for n in wanted if n in sets}
    if not chosen:
        raise UserError(f"{name} needs one of the sets {', '.join(wanted)}: {', '.join(sets) or 'none'} was given.")
    if not parts or set(parts) - set(PAPER):
        raise UserError(f"{name} cannot be made of {tuple(parts)}: name some of {', '.join(PAPER)}.")
    score: Score = "closer_to_1_better" if name == "clear_forget" else "true_better"
    mean_1T, draws_RT = _terms(chosen, parts, score, resamples, seed)
    several = all(items.groups is None or len(set(items.groups)) > 1 for items in chosen.values())
    num = sum(len(items.loss_N) for items in chosen.values())
    definition = f"{name}[{', '.join(chosen)}; {', '.join(parts)}]/1"
    unknown_bounds = (np.nan, np.nan)  # one subject says nothing about other subjects
    value, draws_R = float(harmonic_mean(mean_1T)[0]), harmonic_mean(draws_RT)
    bounds = percentile_interval(draws_R, level) if several else unknown_bounds
    found = Estimate(value, *bounds, num, definition)
    if not references:
        return ClearScore(found)
    means, others = [], []
    for reference in references:
        theirs = {n: reference[n] for n in chosen if n in reference}
        if [len(s.loss_N) for s in theirs.values()] != [len(s.loss_N) for s in chosen.values()]:
            raise UserError(
                f"{name}: the reference was not measured on the same items: use one dataset for both models."
            )
        other_1T, others_RT = _terms(theirs, parts, score, resamples, seed)
        means.append(float(harmonic_mean(other_1T)[0]))
        others.append(harmonic_mean(others_RT))
    bounds = percentile_interval(draws_R - np.mean(others, axis=0), level) if several else unknown_bounds
    gap_name = definition.replace(name, f"{name}-gap")
    gap = Estimate(value - float(np.mean(means)), *bounds, num, gap_name).distance_from(0.0)
    return ClearScore(found, gap)


@metric(
    name="clear_real",
    definition="clear_real[{sets}; {parts}]/1",
    formula="harmonic mean of {prob-options, ROUGE-L recall, truth ratio (true_better)} x {real faces, real world}",
    direction="higher is better; compare with the original and the reference",
    source="CLEAR (Dontsov et al. 2024); parts=TABLES: without ROUGE, as the authors' code prints it",
)
def clear_real(
    sets: Mapping[str, TofuSet],
    references: Sequence[Mapping[str, TofuSet]] = (),
    parts: Sequence[Part] = PAPER,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClearScore:
    """What the model still knows of real faces and of the world in pictures.

    Other knowledge than the private one: it falls when forgetting damages the model. One part near 0 hides the rest.
    """
    return _clear_score("clear_real", REAL, sets, references, parts, level, resamples, seed)


@metric(
    name="clear_retain",
    definition="clear_retain[{sets}; {parts}]/1",
    formula="harmonic mean of {prob, ROUGE-L recall, truth ratio (true_better)} x {retain, retain face recognition}",
    direction="higher is better; compare with the original and the reference",
    source="CLEAR (Dontsov et al. 2024)",
)
def clear_retain(
    sets: Mapping[str, TofuSet],
    references: Sequence[Mapping[str, TofuSet]] = (),
    parts: Sequence[Part] = PAPER,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClearScore:
    """What the model still says of the people that stay, and whether it still names their faces."""
    return _clear_score("clear_retain", RETAIN, sets, references, parts, level, resamples, seed)


@metric(
    name="clear_forget",
    definition="clear_forget[{sets}; {parts}]/1",
    formula="harmonic mean of {prob, ROUGE-L recall, min(R, 1/R)} x {forget, forget face recognition}",
    direction="two-sided: the gap to the retrained reference, 0 is best",
    source="CLEAR (Dontsov et al. 2024), where lower is better: below the reference it is a trace of the forgetting",
)
def clear_forget(
    sets: Mapping[str, TofuSet],
    references: Sequence[Mapping[str, TofuSet]] = (),
    parts: Sequence[Part] = PAPER,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClearScore:
    """What the model still says of the forgotten people and their pictures, beside what a retrained model says.

    A broken model scores 0 and is best by the paper's reading; the gap is then as large as the reference's score.
    """
    return _clear_score("clear_forget", FORGET, sets, references, parts, level, resamples, seed)


# -- forget quality ------------------------------------------------------------------------------------------------


@metric(
    name="clear_forget_quality",
    definition="forget_quality-geometric-p_value/1, -ks_distance/1",
    formula="two-sample KS of per-item truth ratios on the forget set: p-value (v1 prints its ln); sup|F - G|",
    direction="distance: 0 is best, the upper bound is the claim; p-value: high means only that no difference was seen",
    source="CLEAR v1 (Dontsov et al. 2024) after TOFU (Maini et al. 2024)",
)
def clear_forget_quality(
    unlearned: TofuSet, reference: TofuSet, ratio: Ratio = "geometric", level: float = LEVEL
) -> ForgetQuality:
    """KS test of the truth ratios against the retrained model's; the order of the items does not matter."""
    return forget_quality(unlearned, reference, ratio, level)


@metric(
    name="clear_js_published",
    definition="clear/js-published/1",
    formula="1 - sqrt(JS(p, q)), base e, with p = softmax over items of -loss of the paraphrase, q the reference's",
    direction="1 is best, 0.167 is least; only for comparison with published figures",
    source="Forget Quality of CLEAR v4 as its code computes it: scipy's jensenshannon of two rows of truth ratios",
)
def clear_js_published(unlearned: TofuSet, reference: TofuSet) -> Estimate:
    """CLEAR's published Forget Quality, for comparison with its tables and for nothing else.

    The truth ratios of all items are read as one probability mass over row numbers. So rows are paired, a common
    factor cancels, and with it the wrong answers, whose loss the code averages over all items: what is left is the
    share of each item in the likelihood of the paraphrases. Two draws of one distribution can score below a shifted
    one. It has no interval: rows are its outcomes, not its observations.

    Raises:
        UserError: the two models were measured on different numbers of items.
    """
    first, second = unlearned.paraphrased_N, reference.paraphrased_N
    if first.shape != second.shape:
        raise UserError(
            f"clear/js-published pairs rows, and {len(first)} and {len(second)} were given: measure both models on "
            "the same items, or use the KS form, which does not pair."
        )
    kept = np.isfinite(first) & np.isfinite(second)
    if not kept.any():
        return Estimate(np.nan, definition="clear/js-published/1")
    value = 1 - float(jensenshannon(softmax(-first[kept]), softmax(-second[kept])))
    return Estimate(value, n=int(kept.sum()), definition="clear/js-published/1", note="no measure of distributions")


# -- faces ---------------------------------------------------------------------------------------------------------


@metric(
    name="face_recognition",
    definition="face_choice/1",
    formula="share of pictures whose right name is likelier (per token) than every wrong name; k-fold ties count 1/k",
    direction="forget: two-sided to the reference, whose floor is about 1 / options; retain: higher is better",
    source="CLEAR's face recognition sets (Dontsov et al. 2024), read as a choice",
)
def face_recognition(items: TofuSet, level: float = LEVEL) -> Estimate:
    """Whether the model names the person in the picture when it may choose among names.

    Without a picture, or with a model that does not look, it is 1 / options on average. ``items``: a set of face
    recognition, with the wrong names as wrong answers; an item without them is left out.
    """
    hits_N = np.full(len(items.loss_N), np.nan)
    for place, (own, wrong) in enumerate(zip(items.loss_N, items.perturbed, strict=True)):
        if np.size(wrong) and np.isfinite(own):
            best = min(own, float(np.min(wrong)))
            hits_N[place] = (own == best) / (1 + np.sum(np.asarray(wrong) == best))
    return bootstrap_mean(hits_N, items.groups, level=level, definition="face_choice/1")


@dataclass(frozen=True, slots=True, eq=False)
class Faces:
    """Pictures as a face embedder sees them, with the people on them."""

    ids: Sequence[str]
    people: Sequence[str]
    embedding_ND: Floats

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.people) == len(self.embedding_ND):
            raise UserError("faces need one id, one person and one embedding each: the three lengths differ.")


@metric(
    name="face_centroid",
    definition="face_centroid/1",
    formula="share of pictures whose nearest mean of enrolled embeddings (cosine) is that of their own person",
    direction="forget: two-sided to the reference; retain and holdout: higher is better",
    source="CLEAR's vision part (Dontsov et al. 2024), with enrolled pictures that are not asked about",
)
def face_centroid(enrolled: Faces, asked: Faces, level: float = LEVEL) -> Estimate:
    """Whether a face embedder still finds a person among the enrolled ones.

    A mean over pictures that are asked about too would find itself, so the two sides must not share one. Enrolling
    a person shows the embedder new pictures: it tells what the features separate, not what was learnt by heart.

    Raises:
        UserError: a picture is enrolled and asked about, or a person that is asked about is not enrolled.
    """
    hits_N = centroid_hits(enrolled, asked)
    return bootstrap_mean(hits_N, list(asked.people), level=level, definition="face_centroid/1")


def centroid_hits(enrolled: Faces, asked: Faces) -> Floats:
    """1 for each picture that is nearest to its own person's mean, else 0, (N,); errors as :func:`face_centroid`."""
    both = sorted(set(enrolled.ids) & set(asked.ids))
    if both:
        raise UserError(f"picture '{both[0]}' is enrolled and asked about: enrol other pictures of the person.")
    people = sorted(set(enrolled.people))
    strangers = sorted(set(asked.people) - set(people))
    if strangers:
        raise UserError(f"nobody enrolled '{strangers[0]}': give at least one other picture of each person asked.")
    names = np.array(list(enrolled.people))
    unit_ND = _unit(enrolled.embedding_ND)
    centre_CD = _unit(np.stack([unit_ND[names == person].mean(axis=0) for person in people]))
    nearest = (_unit(asked.embedding_ND) @ centre_CD.T).argmax(axis=1)
    hits = [people[place] == person for place, person in zip(nearest, asked.people, strict=True)]
    return np.array(hits, dtype=np.float64)


def _unit(rows_ND: Floats) -> Floats:
    return np.asarray(rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12))


# -- ROUGE with the picture ----------------------------------------------------------------------------------------


def swapped(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions, each with the picture of the next sample of another subject.

    Raises:
        UserError: a sample without a picture, or all of one subject.
    """
    found = []
    for place, sample in enumerate(samples):
        if sample.image is None:
            raise UserError(f"sample '{sample.id}' has no picture that could be swapped: leave it out.")
        others = (s for s in (*samples[place + 1 :], *samples[:place]) if s.subject != sample.subject)
        other = next(others, None)
        if other is None:
            raise UserError("pictures can be swapped only between subjects: give samples of at least two.")
        found.append(replace(sample, image=other.image))
    return found


@dataclass(frozen=True, slots=True)
class SeenRouge:
    """ROUGE-L recall of answers to question and picture, and by how much the right picture raises it."""

    rouge: Estimate
    gain: Estimate


@metric(
    name="rouge_with_image",
    definition="rougeL_recall-image/1, rougeL_recall-image_gain/1",
    formula="mean ROUGE-L recall of answers with the picture; gain: minus that of answers with another's picture",
    direction="forget: two-sided to the reference; retain: higher is better; a gain of 0 says that nobody looked",
    source="CLEAR (Dontsov et al. 2024), whose code answers without the picture; the control is ours",
)
def rouge_with_image(
    targets: Sequence[str],
    answers: Sequence[str],
    swapped_answers: Sequence[str],
    groups: Groups = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> SeenRouge:
    """ROUGE of answers that were given with the picture, and the proof that the picture had a part in them.

    ``swapped_answers``: to the samples of :func:`swapped`. A gain whose interval reaches 0 means that the answers
    come from the question alone, because the model does not look or because it was not shown the picture.
    """
    if not len(targets) == len(answers) == len(swapped_answers):
        raise UserError(
            f"{len(targets)} targets, {len(answers)} answers and {len(swapped_answers)} answers to swapped pictures: "
            "give one of each per sample."
        )
    own_N = np.array([rouge_score(t, a) for t, a in zip(targets, answers, strict=True)])
    other_N = np.array([rouge_score(t, a) for t, a in zip(targets, swapped_answers, strict=True)])
    return SeenRouge(
        bootstrap_mean(own_N, groups, level=level, seed=seed, definition="rougeL_recall-image/1"),
        bootstrap_difference(own_N - other_N, groups, level=level, seed=seed, definition="rougeL_recall-image_gain/1"),
    )


# -- over runs -----------------------------------------------------------------------------------------------------


def identical_runs(runs: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Runs of different settings whose every number is the same: their settings had no effect.

    At least two numbers must be there, since a single one may agree by chance.
    """
    found: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for name, numbers in runs.items():
        key = tuple(sorted((k, v) for k, v in numbers.items() if np.isfinite(v)))
        if len(key) > 1:
            found.setdefault(key, []).append(name)
    return [tuple(names) for names in found.values() if len(names) > 1]
