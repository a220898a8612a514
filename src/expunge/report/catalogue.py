"""What the report knows about a metric from its name: group, label, ideal, formula.

A name is ``stem[.role]``, for example ``prob.forget`` or ``quant4.prob.forget``. An unknown metric is shown too, in
the group that its role suggests and without a claim about which direction is good.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Group = Literal["forgetting", "retention", "privacy", "robustness", "other"]
GROUPS: tuple[Group, ...] = ("forgetting", "retention", "privacy", "robustness", "other")
# reference: best where the retrained model is, both sides count; zero: a distance; high, low: one-sided
Ideal = Literal["reference", "zero", "high", "low"]
ROLES = ("forget", "retain", "holdout", "utility")
REQUEST = re.compile(r"^(?P<stem>.+)\.request_(?P<number>\d+)$")


@dataclass(frozen=True)
class Entry:
    """One row of the table: ``pattern`` matches the stem in full."""

    pattern: str
    label: str
    formula: str
    group: Group | None = None  # None: the role decides
    ideal: Ideal | None = None  # None: reference on forget, ``better`` elsewhere
    better: Literal["high", "low"] = "high"


# fmt: off
ENTRIES: tuple[Entry, ...] = (
    Entry("tv", "total variation", "TV = ½ Σ_v |p(v) − p_ref(v)| over the vocabulary, mean over target positions "
          "and samples; 0 = the same predictions as the retrained model", None, "zero"),
    Entry(r"tv\.gap_closed", "gap closed", "(TV(original) − TV) / (TV(original) − floor), the floor being the total "
          "variation between two retrained models", "forgetting", "high"),
    Entry(r"tv\.floor", "floor of total variation", "total variation between two retrained models that differ by "
          "their seed: nothing can be expected to come closer", "forgetting", None),
    Entry("kl", "KL divergence", "KL = Σ_v p_ref(v) log(p_ref(v) / p(v)) in nats, mean over target positions and "
          "samples; 0 = the same predictions", None, "zero"),
    Entry("js", "Jensen-Shannon", "JS = ½ KL(p ‖ m) + ½ KL(p_ref ‖ m), m = ½ (p + p_ref), in nats", None, "zero"),
    Entry("prob", "probability", "P = exp(−loss): the geometric mean of the target tokens' probabilities, mean over "
          "samples"),
    Entry("loss|nll", "loss", "loss = −(1/T) Σ_t log p(x_t | x_<t) in nats per target token, mean over samples",
          better="low"),
    Entry(r"rouge_with_image\.gain", "what the picture adds", "ROUGE-L recall of the answers minus that of answers to "
          "the same questions with another subject's picture; 0 = nobody looked"),
    Entry("rouge_with_image", "ROUGE-L with the picture", "ROUGE-L recall of the answers to questions with a picture"),
    Entry("face_recognition", "faces named", "share of the pictures whose right name is likelier per token than every "
          "wrong one; about 1 / options for a model that does not know the face"),
    Entry(r"face_centroid\.gap", "gap of faces found", "|own − that of the retrained model|", None, "zero"),
    Entry("face_centroid", "faces found", "share of the pictures whose embedding is nearest (cosine) to the mean of "
          "other pictures of the same person, among all people; arXiv 2410.18057, vision part"),
    Entry("clear_real", "CLEAR Real", "harmonic mean of probability among options and truth ratio over "
          "real faces and real world; arXiv 2410.18057", "retention", "high"),
    Entry("clear_retain", "CLEAR Retain", "harmonic mean of probability and truth ratio over captions and "
          "names of the people that stay; arXiv 2410.18057", "retention", "high"),
    Entry("clear_forget", "CLEAR Forget", "harmonic mean of probability and min(R, 1/R) over captions and "
          "names of the forgotten people; arXiv 2410.18057; 0 for a broken model", "forgetting", "reference"),
    Entry(r"clear_forget\.gap", "CLEAR Forget gap", "|own − mean of the retrained models|", "forgetting", "zero"),
    Entry(r"clear_(?P<x>real|retain)\.gap", "CLEAR gap", "|own − mean of the retrained models|", "retention", "zero"),
    Entry(r"clear_forget_quality\.ks.*", "Forget Quality, KS distance", "largest vertical gap between the truth ratios "
          "of the captions under this model and under the retrained model", "forgetting", "zero"),
    Entry(r"clear_forget_quality\.p_value", "Forget Quality p", "p-value of the two-sample Kolmogorov-Smirnov test on "
          "those truth ratios; small = told apart", "forgetting", "high"),
    Entry("clear_js_published", "Forget Quality as published", "1 − √JS of two rows of truth ratios, from 0.167 to 1; "
          "only to compare with printed tables", "forgetting", None),
    Entry("rouge.*", "ROUGE-L recall", "longest common subsequence of generated and true answer, in words, divided "
          "by the length of the true answer; mean over samples"),
    Entry("truth_ratio", "truth ratio", "TR = geometric mean over wrong answers of P(wrong | q) / P(restated true "
          "answer | q); TOFU, arXiv 2401.06121, eq. 1"),
    Entry(r"forget_quality\.ks.*", "KS distance", "largest vertical gap between the distributions of the truth ratio "
          "on forget under this model and under the retrained model", "forgetting", "zero"),
    Entry(r"kfr.*", "knowledge forgotten", "share of the forget questions whose answer no longer carries the fact; "
          "ReLearn, 2025", "forgetting", "reference"),
    Entry("krr", "knowledge kept", "share of the retain questions whose answer still carries the fact; ReLearn, 2025",
          "retention", "high"),
    Entry("ls|linguistic_score", "linguistic score", "harmonic mean of perplexity, Brunet's and Honoré's scores of the "
          "answers; ReLearn, 2025", "retention", "high"),
    Entry("retain_ratio", "retain ratio", "probability of the retain samples divided by that of the retrained model, "
          "mean over samples", "retention", "high"),
    Entry(r"forget_quality(\.p_value)?", "forget quality p", "p-value of the two-sample Kolmogorov-Smirnov test on "
          "the truth ratios of this model and the retrained model; small = told apart", "forgetting", "high"),
    Entry("model_utility.*", "model utility", "harmonic mean of probability, ROUGE-L recall and truth ratio over the "
          "sets that must be kept; arXiv 2401.06121, sec. 2.2", "retention", "high"),
    Entry("perplexity", "perplexity", "exp of the mean loss per token over the role's texts", better="low"),
    Entry("accuracy|acc", "accuracy", "share of samples whose most probable class is the true one"),
    Entry("u_mia", "U-MIA", "balanced accuracy, out of fold, of a support vector machine that tells forget from "
          "holdout by the confidence; the retrained model's is the target, 0.5 = chance", "privacy", "reference"),
    Entry(r"mia_efficacy\.attack", "membership attack on retain", "balanced accuracy, out of fold, of the same machine "
          "on retain against holdout; at 0.5 its efficacy says nothing", "privacy", None),
    Entry(r"mia_efficacy\.gap", "MIA efficacy gap", "|efficacy − efficacy of the retrained model|", "privacy", "zero"),
    Entry("mia_efficacy", "MIA efficacy", "share of forget that a support vector machine, fitted on retain against "
          "holdout, takes for non-members; SalUn, arXiv 2310.12508", "privacy", "reference"),
    Entry("zrf", "zero retrain forgetting", "1 − mean JS between the model and random weights on forget, in bits; "
          "arXiv 2205.08096; the retrained model's is the target", "forgetting", "reference"),
    Entry(r"zrf\.gap", "gap of zero retrain forgetting", "|own − that of the retrained model|", "forgetting", "zero"),
    Entry("klom", "KLOM", "mean over forget samples of KL(margins of the method's models ‖ of the retrained models), "
          "20 bins, nats; read beside its floor; arXiv 2410.23232", "forgetting", "zero"),
    Entry(r"klom\.floor", "floor of KLOM", "KLOM between two halves of the retrained models", "forgetting", None),
    Entry("u_lira", "U-LiRA", "balanced accuracy of a likelihood-ratio attack per sample that tells the method's "
          "models from retrained ones; 0.5 = cannot; arXiv 2403.01218", "privacy", "low"),
    Entry("u_mia_population", "U-MIA over models", "the same with one decision tree for all samples; 0.5 = cannot",
          "privacy", "low"),
    Entry("neurips_forget", "challenge forget score", "mean over forget samples of 2^−⌊2ε⌋, ε from the errors of "
          "threshold attacks; NeurIPS 2023 challenge, arXiv 2406.09073", "forgetting", "high"),
    Entry("neurips_score", "challenge score", "forget score × retain accuracy / retrained's × holdout accuracy / "
          "retrained's; NeurIPS 2023 challenge", "forgetting", "high"),
    Entry("tow", "tug of war", "product over forget, retain, holdout of 1 − |accuracy − accuracy of the retrained "
          "model|; RUM, arXiv 2406.01257", "forgetting", "high"),
    Entry("tow_mia", "tug of war, membership", "tug of war with the MIA efficacy in place of the accuracy on forget",
          "forgetting", "high"),
    Entry("average_gap", "average gap", "mean of |own − retrained| over the accuracy on forget, retain, holdout and "
          "the MIA efficacy; SalUn, arXiv 2310.12508", "forgetting", "zero"),
    Entry(r"modality\.(?P<x>image|text)\.closed", "gap closed", "share of the way from the original's probability to "
          "the retrained model's on forget samples asked in this modality", "forgetting", "reference"),
    Entry(r"modality\.(?P<x>image|text)", "change of probability", "probability after − before unlearning, mean over "
          "the samples asked in this modality"),
    Entry(r"mia\.(?P<x>[\w+-]+)\.auc", "membership AUC", "area under the ROC curve of the attack's score, forget "
          "against holdout samples; the retrained model's AUC is the target, 0.5 = chance", "privacy", "reference"),
    Entry(r"mia\.(?P<x>[\w+-]+)\.gap", "membership gap", "|AUC − AUC of the retrained model| of the attack",
          "privacy", "zero"),
    Entry(r"mia\.(?P<x>[\w+-]+)\.tpr.*", "membership TPR", "true positive rate of the attack at the false positive "
          "rate in the name; forget = positive, holdout = negative", "privacy", "reference"),
    Entry(r"mia.*|membership.*", "membership", "score of a membership attack, forget against holdout", "privacy",
          "reference"),
    Entry("privleak", "PrivLeak", "((1 − AUC) − (1 − AUC_ref)) / (1 − AUC_ref) · 100 with the Min-K attack; "
          "MUSE, arXiv 2407.06460; 0 = like retrained", "privacy", "zero"),
    Entry("min_k.*", "Min-K", "mean log-probability of the k % least probable target tokens", "privacy",
          "reference"),
    Entry(r"extraction.*|exact_memori[sz]ation|verbatim.*", "extraction", "how much of the target greedy decoding "
          "reproduces", "privacy", "reference"),
    Entry(r"completeness.*|iam.*", "completeness", "calibrated per-sample answer to 'is it gone?', mean over "
          "samples", "privacy", "reference"),
    Entry(r"relearn\.(?P<x>[\w]+)", "relearned", "measured after fine-tuning on a few forget or related samples; a "
          "ratio compares with the retrained model under the same fine-tuning", "robustness", "reference"),
    Entry(r"quant\w*\..+", "quantized", "measured again after the weights were rounded to the number "
          "of bits in the name", "robustness", "reference"),
    Entry(r"(prune\w*|noise\w*|prompt\w*|jailbreak\w*|probe\w*)(\..*)?", "attacked", "measured again under the "
          "attack in the name", "robustness", "reference"),
)
# fmt: on


@dataclass(frozen=True)
class Metric:
    """A metric name, understood."""

    name: str
    stem: str
    role: str
    label: str
    group: Group
    ideal: Ideal | None
    formula: str


def split_role(name: str) -> tuple[str, str]:
    """Stem and role; the role is empty when the name carries none.

    >>> split_role("quant4.prob.forget"), split_role("model_utility")
    (('quant4.prob', 'forget'), ('model_utility', ''))
    """
    stem, _, last = name.rpartition(".")
    return (stem, last) if stem and last in ROLES else (name, "")


def understand(name: str) -> Metric:
    """The metric behind a name; never fails.

    >>> understand("prob.forget").ideal, understand("perplexity.utility").ideal
    ('reference', 'low')
    """
    stem, role = split_role(name)
    by_role: Group = "forgetting" if role == "forget" else "retention" if role else "other"
    for entry in ENTRIES:
        match = re.fullmatch(entry.pattern, stem)
        if match is None:
            continue
        parts = [part.replace("_", " ") for part in match.groupdict().values() if part]
        label = f"{entry.label} ({', '.join(parts)})" if parts else entry.label
        ideal = entry.ideal or ("reference" if role == "forget" else entry.better if role else None)
        formula = entry.formula
        if bits := re.fullmatch(r"quant(\d*)\w*\.(.+)", stem):
            inner = understand(bits[2] + (f".{role}" if role else ""))
            ideal, formula = inner.ideal, f"{inner.formula}; {entry.formula}"
            label = (
                f"{understand(bits[2]).label} at {bits[1]} bits"
                if bits[1]
                else f"{understand(bits[2]).label} quantized"
            )
        group = entry.group or by_role
        return Metric(name, stem, role, f"{label}, {role}" if role else label, group, ideal, formula)
    plain = stem.replace("_", " ").replace(".", " ")
    unknown_ideal: Ideal | None = "reference" if role == "forget" else None
    return Metric(name, stem, role, f"{plain}, {role}" if role else plain, by_role, unknown_ideal, "")


def prose(name: str) -> str:
    """The metric's label inside a sentence.

    >>> prose("prob.forget"), prose("quant4.prob.forget"), prose("model_utility")
    ('probability on the forget set', 'probability at 4 bits on the forget set', 'model utility')
    """
    metric = understand(name)
    return metric.label.replace(f", {metric.role}", f" on the {metric.role} set") if metric.role else metric.label


_ORDER = [
    *(
        "tv.forget",
        "prob.forget",
        "rouge.forget",
        "rouge_l.forget",
        "forget_quality.ks_distance",
        "forget_quality.p_value",
    ),
    *("truth_ratio.forget", "loss.forget", "accuracy.forget", "mia.loss.auc", "quant4.prob.forget"),
    *("quant8.prob.forget", "relearn.loss_ratio", "relearn.prob"),
    *(
        "model_utility",
        "perplexity.utility",
        "prob.retain",
        "rouge.retain",
        "rouge_l.retain",
        "accuracy.retain",
        "tv.retain",
    ),
]
# Distances to the retrained model, the one to rank by first
PRIMARY = ("tv.forget", "js.forget", "kl.forget", "forget_quality.ks_distance", "prob.forget", "loss.forget")
RETENTION = ("model_utility", "prob.retain", "rouge.retain", "accuracy.retain", "prob.utility", "accuracy.utility")


def in_order(names: set[str]) -> list[Metric]:
    """Metrics by group, the best known first."""

    def key(metric: Metric) -> tuple[int, int, str]:
        known = _ORDER.index(metric.name) if metric.name in _ORDER else len(_ORDER)
        return GROUPS.index(metric.group), known, metric.name

    return sorted((understand(name) for name in names if REQUEST.match(name) is None), key=key)
