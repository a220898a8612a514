"""From what was measured to named metrics with intervals, and to one row per sample. No model is needed here.

Subjects are the unit of resampling throughout, and everything that is compared (model, references, original) is
resampled on the same draws.

Shape suffixes: N samples, K columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expunge.attacks.membership import loss_score, min_k_plus_plus_score, min_k_score, zlib_score
from expunge.bench.desk import (
    Desk,
    Floats,
    items,
    losses,
    mean_over,
    numbers,
    probs,
    quality_over,
    rouge_of,
    where,
)
from expunge.bench.images import images, thumbnails
from expunge.bench.measuring import Measured
from expunge.bench.verdicts import sample_rows, verdicts
from expunge.data.samples import Role
from expunge.metrics.divergence import per_sample, tv
from expunge.metrics.kfr import judge, kfr, kfr_star, krr, linguistic_score
from expunge.metrics.memorization import exact_memorization, extraction_strength
from expunge.metrics.tofu import TofuSet, forget_quality, harmonic_mean, model_utility, truth_scores
from expunge.metrics.tofu import truth_ratio as truth_ratio_metric
from expunge.signals.record import Signals
from expunge.stats import Estimate, auc, auc_estimate, bootstrap_auc, bootstrap_means, percentile_interval, tpr_at_fpr

RATES = (0.01, 0.1)
# Public TOFU sets by the beginning of the sample's id; their wrong answers are the other options of a choice.
PUBLIC_SETS = {"real_authors": "real-", "world_facts": "world-"}


def assess(desk: Desk) -> list[dict[str, Any]]:
    """Fill the desk's metrics and reasons; return the rows for samples.jsonl."""
    desk.skipped.update(desk.own.skipped)
    likelihoods(desk)
    truth(desk)
    answers(desk)
    utility(desk)
    membership(desk)
    distances(desk)
    images(desk)
    relearning(desk)
    quantization(desk)
    rows = sample_rows(desk)
    thumbnails(desk, rows)
    verdicts(desk, rows)
    return rows


# -- what the model says of the samples ----------------------------------------------------------------------------


def likelihoods(desk: Desk) -> None:
    """prob, loss, accuracy of every role; extraction strength; perplexity; retain probability over the references'."""
    for role, signals in desk.own.signals.items():
        subjects = desk.subjects(role)
        desk.metrics[f"prob.{role}"] = desk.mean(probs(signals), subjects, "prob/1")
        desk.metrics[f"loss.{role}"] = desk.mean(losses(signals), subjects, "loss/1")
        found = exact_memorization(signals)
        desk.metrics[f"accuracy.{role}"] = found if desk.text else found.named("accuracy/1")
    if desk.text:
        desk.metrics["extraction_strength.forget"] = extraction_strength(desk.own.signals["forget"])
        roles: tuple[Role, ...] = ("retain", "utility")
        for role in roles:
            if role in desk.own.signals:
                signals = desk.own.signals[role]
                tokens = np.array([len(s) for s in signals], dtype=np.float64)
                spent = np.array([s.loss * len(s) if len(s) else 0.0 for s in signals])
                desk.metrics[f"perplexity.{role}"] = desk.paired(
                    [spent, tokens], desk.subjects(role), lambda m_RK: np.exp(m_RK[:, 0] / m_RK[:, 1]), "perplexity/1"
                )
    else:
        desk.skipped["extraction_strength"] = desk.skipped["perplexity"] = "a classifier has one target per sample"
    if "retain" not in desk.own.signals:
        desk.skipped["retain_ratio"] = "the dataset has no retain samples"
    elif not desk.references:
        desk.skipped["retain_ratio"] = "no reference model"
    else:
        theirs = mean_over([probs(r.signals["retain"]) for r in desk.references])
        desk.metrics["retain_ratio"] = desk.ratio(
            probs(desk.own.signals["retain"]), theirs, desk.subjects("retain"), "retain_ratio/1"
        )


# -- truth ratio, forget quality, utility --------------------------------------------------------------------------


def truth(desk: Desk) -> None:
    """Truth ratio, and the KS test of forget quality against each reference."""
    for role in desk.own.probes:
        score: Any = "closer_to_1_better" if role == "forget" else "true_better"
        found = truth_ratio_metric(items(desk.own, role), score)
        if found.n:
            desk.metrics[f"truth_ratio.{role}"] = found
    if "truth_ratio.forget" not in desk.metrics:
        desk.skipped["truth_ratio"] = desk.skipped["forget_quality"] = "the forget samples have no perturbed answers"
        return
    if not desk.references:
        desk.skipped["forget_quality"] = "no reference model"
        return
    ours = items(desk.own, "forget")
    found_all = [forget_quality(ours, items(r, "forget"), level=desk.options.level) for r in desk.references]
    distance, bound, p_value = quality_over(found_all)
    desk.metrics["forget_quality.ks_distance"] = distance
    desk.metrics["forget_quality.ks_bound"] = bound
    desk.metrics["forget_quality.p_value"] = p_value


def utility_sets(own: Measured) -> dict[str, TofuSet]:
    """The sets that must be kept, by name. Where samples were answered, only those, so that all parts are paired.

    With both of TOFU's public sets there, these and retain are taken, as in the paper; otherwise retain and utility.
    """
    found: dict[str, TofuSet] = {}
    public = own.samples.get("utility", [])
    if "retain" in own.samples:
        found["retain"] = items(own, "retain", only=answered(own, "retain"))
    by_set = {name: [s.id for s in public if s.id.startswith(begin)] for name, begin in PUBLIC_SETS.items()}
    heard = answered(own, "utility")
    if all(by_set.values()):
        for name, ids in by_set.items():
            kept = [i for i in ids if heard is None or i in set(heard)]
            if kept:
                found[name] = items(own, "utility", options="utility" in own.probes, only=kept)
    elif public:
        found["utility"] = items(own, "utility", only=heard)
    return found


def answered(own: Measured, role: Role) -> list[str] | None:
    """Ids of the answered samples of a role; None when nothing was answered."""
    return list(own.generated[role]) if role in own.generated else None


def utility(desk: Desk) -> None:
    """Model utility: TOFU's harmonic mean, of the parts that there are; the definition names them if not all."""
    sets = utility_sets(desk.own)
    if not sets:
        desk.skipped["model_utility"] = "the dataset has neither retain nor utility samples"
        return
    columns: list[tuple[str, Floats, Sequence[str]]] = []
    for name, its in sets.items():
        scores = truth_scores(its.log_ratios(), "true_better")
        parts = {"prob": its.probabilities(), "rouge": its.rouge_N, "truth_ratio": scores}
        groups = list(its.groups or ())
        # A part counts when most of the set has it; items that lack a part are then left out of the set.
        parts = {part: v for part, v in parts.items() if len(v) and np.isfinite(v).mean() >= 0.5}
        if not parts:
            continue
        kept = np.asarray(np.isfinite(np.stack(list(parts.values()))).all(axis=0))
        chosen_groups = where(groups, kept)
        columns += [(f"{part}.{name}", values[kept], chosen_groups) for part, values in parts.items()]
    if len(columns) == 3 * len(sets) and all(
        np.isfinite(np.stack([s.loss_N, s.rouge_N, s.log_ratios()])).all() for s in sets.values()
    ):
        desk.metrics["model_utility"] = model_utility(
            sets, level=desk.options.level, resamples=desk.options.resamples, seed=desk.seed
        )
        return
    numbers = {name: i for i, name in enumerate(dict.fromkeys(n.split(".", 1)[1] for n, _, _ in columns))}
    draws = [
        bootstrap_means(values, groups, desk.options.resamples, desk.seed + numbers[name.split(".", 1)[1]])
        for name, values, groups in columns
    ]
    if not draws:
        desk.skipped["model_utility"] = "no part of it could be measured"
        return
    value = float(harmonic_mean(np.array([[v.mean() for _, v, _ in columns]]))[0])
    low, high = percentile_interval(harmonic_mean(np.stack(draws, axis=1)), desk.options.level)
    sizes = {name.split(".", 1)[1]: len(v) for name, v, _ in columns}
    several = all(len(set(groups)) > 1 for _, _, groups in columns)
    definition = f"model_utility[{', '.join(name for name, _, _ in columns)}]/1"
    bounds = (low, high) if several else (math.nan, math.nan)
    desk.metrics["model_utility"] = Estimate(value, *bounds, sum(sizes.values()), definition)


# -- generations ---------------------------------------------------------------------------------------------------


def answers(desk: Desk) -> None:
    """ROUGE-L of every answered role; KFR and linguistic score on forget, KRR on retain."""
    own = desk.own
    for role, texts in own.generated.items():
        asked = [s for s in own.samples[role] if s.id in texts]
        scores = rouge_of(own, role)
        groups = [s.subject for s in asked]
        desk.metrics[f"rouge_l.{role}"] = desk.mean([scores[s.id] for s in asked], groups, "rougeL_recall/1")
        if role == "utility":
            continue
        replies = [texts[s.id] for s in asked]
        judged = judge([str(s.target) for s in asked], replies, [s.prompt for s in asked], groups)
        if role == "retain":
            desk.metrics["krr"] = krr(judged)
            continue
        desk.metrics["kfr"] = kfr(judged)
        desk.metrics["kfr_fluent"] = kfr_star(judged)
        perplexities = [own.perplexity.get(s.id, math.inf) for s in asked]
        found = linguistic_score(perplexities, replies, groups)
        desk.metrics["ls"] = found.named("ls-own/1", "perplexity under the model itself")


# -- membership ----------------------------------------------------------------------------------------------------


def scorers(percent: float) -> dict[str, tuple[str, Callable[[Signals], float]]]:
    """name → (label in definitions, score)."""
    return {
        "loss": ("loss", loss_score),
        "zlib": ("zlib", zlib_score),
        "min_k": (f"min_k-{percent:g}", lambda s: min_k_score(s, percent)),
        "min_k_plus": (f"min_k++-{percent:g}", lambda s: min_k_plus_plus_score(s, percent)),
    }


Sides = tuple[Sequence[Signals], Sequence[Signals]]


def sides(own: Measured) -> Sides:
    return own.signals["forget"], own.signals["holdout"]


def membership(desk: Desk) -> None:
    """AUC of four scores, forget against holdout; their distance from the references' mean AUC; PrivLeak."""
    if "holdout" not in desk.own.samples:
        for name in ("mia", "privleak"):
            desk.skipped[name] = "the dataset has no holdout samples"
        return
    theirs = [sides(r) for r in desk.references]
    for name, (label, score) in scorers(desk.options.min_k).items():
        if not desk.text and name == "zlib":
            desk.skipped["mia.zlib"] = "a class label has no text to compress"
            continue
        found, gap, leak = ranked(desk, sides(desk.own), theirs, score, label)
        desk.metrics[f"mia.{name}.auc"] = found
        desk.metrics[f"mia.{name}.gap"] = gap
        if name == "min_k":
            desk.metrics["privleak"] = leak
        if desk.options.suite == "full":
            inside, outside = sides(desk.own)
            for rate in RATES:
                desk.metrics[f"mia.{name}.tpr@{rate:g}"] = tpr_at_fpr(
                    [score(s) for s in inside],
                    [score(s) for s in outside],
                    rate,
                    [s.subject for s in inside],
                    [s.subject for s in outside],
                    level=desk.options.level,
                    seed=desk.seed,
                    definition=f"mia-{label}-tpr@{rate:g}/1",
                )


def ranked(
    desk: Desk, ours: Sides, theirs: Sequence[Sides], score: Callable[[Signals], float], label: str
) -> tuple[Estimate, Estimate, Estimate]:
    """(AUC, |AUC − mean AUC of the references|, PrivLeak to that mean), all on the same draws of subjects.

    Without a reference its AUC is taken as 0.5, and the definition says so.
    """
    tables = [
        np.array([[score(s) for s in model[side]] for model in (ours, *theirs)], dtype=np.float64) for side in (0, 1)
    ]
    kept = [np.asarray(~np.isnan(t).any(axis=0)) for t in tables]
    names = [[s.subject for s, keep in zip(ours[side], kept[side].tolist(), strict=True) if keep] for side in (0, 1)]
    pairs = [(tables[0][m, kept[0]], tables[1][m, kept[1]]) for m in range(len(tables[0]))]
    level, suffix = desk.options.level, "/1" if theirs else "-chance/1"
    found = auc_estimate(*pairs[0], *names, level=level, definition=f"mia-{label}-auc/1")
    gap_name, leak_name = f"mia-{label}-gap{suffix}", f"privleak-{label}{suffix}"
    if not all(names):
        return found, Estimate(math.nan, definition=gap_name), Estimate(math.nan, definition=leak_name)
    draws_MR = bootstrap_auc(pairs, *names, resamples=desk.options.resamples, seed=desk.seed)
    reference = float(np.mean([auc(*p) for p in pairs[1:]])) if theirs else 0.5
    reference_R = draws_MR[1:].mean(axis=0) if theirs else np.full(draws_MR.shape[1], 0.5)
    several = all(len(set(n)) > 1 for n in names)
    none = (math.nan, math.nan)  # one subject says nothing about other subjects
    bounds = percentile_interval(draws_MR[0] - reference_R, level) if several else none
    gap = Estimate(found.value - reference, *bounds, found.n, gap_name).distance_from(0.0)
    if reference == 1.0:
        note = "undefined: the references tell forget from holdout perfectly"
        return found, gap, Estimate(math.nan, n=found.n, definition=leak_name, note=note)
    with np.errstate(divide="ignore", invalid="ignore"):
        leak_R = 100 * (reference_R - draws_MR[0]) / (1 - reference_R)
    bounds = percentile_interval(leak_R, level) if several else none
    leak = Estimate(100 * (reference - found.value) / (1 - reference), *bounds, found.n, leak_name)
    return found, gap, leak


# -- distance to the references ------------------------------------------------------------------------------------


def distances(desk: Desk) -> None:
    """Total variation to the references, the floor between references, and the share of the gap that is closed."""
    if not desk.references:
        desk.skipped["tv"] = "no reference model"
        return
    subjects = desk.subjects("forget")
    ids = [s.id for s in desk.own.samples["forget"]]
    desk.metrics["tv.forget"] = tv(desk.own.forget.tv, subjects)
    if not desk.floor:
        desk.skipped["tv.floor"] = desk.skipped["tv.gap_closed"] = "the floor needs two references"
        return
    floor_N = mean_over([numbers(pair, ids) for pair in desk.floor])
    desk.metrics["tv.floor"] = desk.mean(floor_N, subjects, "tv-floor/1")
    if desk.original is None:
        desk.skipped["tv.gap_closed"] = "the original model was not given"
        return
    original_N = numbers(desk.original.tv, ids)
    columns = [original_N, np.array(per_sample(desk.own.forget.tv)), floor_N]
    desk.metrics["tv.gap_closed"] = desk.paired(
        columns, subjects, lambda m_RK: (m_RK[:, 0] - m_RK[:, 1]) / (m_RK[:, 0] - m_RK[:, 2]), "tv-gap_closed/1"
    )


# -- attacks -------------------------------------------------------------------------------------------------------


def relearning(desk: Desk) -> None:
    """Loss and probability of the forget samples that were not learnt again, and the loss over the references'."""
    own = desk.own.relearned
    if not own:
        return
    subjects = [s.subject for s in own]
    name = f"{desk.options.relearn_steps}x{desk.options.relearn_learning_rate:g}"
    desk.metrics["relearn.loss"] = desk.mean(losses(own), subjects, f"relearn-{name}-loss/1")
    desk.metrics["relearn.prob"] = desk.mean(probs(own), subjects, f"relearn-{name}-prob/1")
    theirs = [r.relearned for r in desk.references]
    if not theirs or not all(theirs):
        desk.skipped["relearn.loss_ratio"] = "no reference model that was attacked in the same way"
        return
    mean_N = mean_over([losses(r) for r in theirs])
    desk.metrics["relearn.loss_ratio"] = desk.ratio(losses(own), mean_N, subjects, f"relearn-{name}-loss_ratio/1")


def quantization(desk: Desk) -> None:
    """The main figures again with rounded weights."""
    attacked = desk.own.quantized
    if attacked is None:
        return
    bits = desk.options.quantize_bits
    begin, mark = f"quant{bits}", f"rtn-{bits}"
    subjects = desk.subjects("forget")
    desk.metrics[f"{begin}.prob.forget"] = desk.mean(probs(attacked.signals), subjects, f"prob-{mark}/1")
    desk.metrics[f"{begin}.loss.forget"] = desk.mean(losses(attacked.signals), subjects, f"loss-{mark}/1")
    if desk.references:
        desk.metrics[f"{begin}.tv.forget"] = tv(attacked.tv, subjects).named(f"tv-{mark}/1")
    holdout = desk.own.quantized_signals.get("holdout")
    if holdout is not None:
        theirs = [
            (r.quantized.signals, r.quantized_signals["holdout"]) for r in desk.references if r.quantized is not None
        ]
        found, gap, _ = ranked(desk, (attacked.signals, holdout), theirs, loss_score, f"loss-{mark}")
        desk.metrics[f"{begin}.mia.loss.auc"] = found
        desk.metrics[f"{begin}.mia.loss.gap"] = gap
    retain = desk.own.quantized_signals.get("retain")
    if retain is not None and desk.references:
        # Over the references' own, not rounded, probability: rounding alone costs a reference something too.
        mean_N = mean_over([probs(r.signals["retain"]) for r in desk.references])
        desk.metrics[f"{begin}.retain_ratio"] = desk.ratio(
            probs(retain), mean_N, desk.subjects("retain"), f"retain_ratio-{mark}/1"
        )
