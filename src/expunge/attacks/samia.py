"""SaMIA: given half of a text, how much of the other half does the model say by itself?

Needs answers only, no probabilities. Every text is averaged over its own samples.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.attacks.context import measured
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.metrics.rouge import rouge_1, words
from expunge.models.sampling import sample_ids, text_adapter
from expunge.models.text import TextAdapter, stop_ids
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class SamiaOptions:
    """Options of SaMIA."""

    n: int = option(10, "sampled continuations per text", "Meeus et al. 2024 (arXiv:2406.17975)")
    share: float = option(0.5, "part of the answer that the model is given", "Kaneko et al. 2024")
    temperature: float = option(1.0, "temperature of sampling")
    top_k: int = option(50, "most probable tokens to sample from, 0 for all", "Meeus et al. 2024")
    top_p: float = option(1.0, "probability mass to sample from")
    seed: int = option(0, "seed of sampling")


@attack(
    name="samia",
    family="membership",
    tier="full",
    access="text",
    paper="Kaneko et al. 2024, Sampling-based Pseudo-Likelihood for Membership Inference Attacks (arXiv:2404.11262)",
    options=SamiaOptions,
    formula="mean over n continuations of ROUGE-1 recall of the true rest; samia.zlib: each weighted by its "
    "compressed length over that of the true rest",
    passes=50.0,
    modalities={"text", "multimodal"},
)
def samia(exam: Exam, checkpoint: Checkpoint, options: SamiaOptions) -> Finding:
    """Overlap of sampled continuations with the true rest of the text.

    A question is asked with the first half of its answer's tokens; of a document, half is given. Continuations end
    where the true rest does, so that long ones do not gain by length. nan where the rest holds no word.
    The weight of samia.zlib, which takes the worth from repeated words, is relative to the true rest here (the paper
    multiplies by the bare length, by which texts of unequal length cannot be compared): a perfect copy has 1.
    """
    if not 0 <= options.share < 1:
        raise UserError(f"share {options.share} is not at least 0 and below 1: give for example 0.5.")
    plain: dict[Role, list[float]] = {}
    weighted: dict[Role, list[float]] = {}
    short = 0
    for role, samples in measured(exam).items():
        pairs = overlaps(checkpoint, samples, options, exam.seed)
        plain[role], weighted[role] = [p for p, _ in pairs], [w for _, w in pairs]
        short += sum(math.isnan(p) for p in plain[role])
    notes = [f"{options.n} continuations per text, temperature {options.temperature:g}, top-k {options.top_k}, "
             f"top-p {options.top_p:g}"]  # fmt: skip
    notes += [f"{short} text(s) have no word left after the given part and no score"] if short else []
    return Finding(scores={"samia": plain, "samia.zlib": weighted}, notes=notes)


def overlaps(
    checkpoint: Checkpoint, samples: Sequence[Sample], options: SamiaOptions, seed: int = 0
) -> list[tuple[float, float]]:
    """(mean ROUGE-1 recall, mean of recall times relative compressed length) of every sample."""
    adapter = text_adapter(checkpoint.adapter)
    halves = [halved(adapter, s, options.share) for s in samples]
    drawn = sample_ids(
        checkpoint.model,
        adapter,
        samples,
        [given for given, _ in halves],
        [len(rest) for _, rest in halves],
        n=options.n,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed + options.seed,
    )
    found = []
    for (_, rest), continuations in zip(halves, drawn, strict=True):
        truth = adapter.tokenizer.decode(rest, skip_special_tokens=True)
        texts = [adapter.tokenizer.decode(ids, skip_special_tokens=True) for ids in continuations]
        found.append(overlap(truth, texts))
    return found


def overlap(truth: str, texts: Sequence[str]) -> tuple[float, float]:
    """(mean recall, mean of recall times compressed length over the truth's); nan when the truth has no word."""
    if not words(truth, stemming=False):
        return math.nan, math.nan
    recalls = [rouge_1(truth, text, stemming=False).recall for text in texts]
    weights = [_compressed(text) / _compressed(truth) for text in texts]
    return statistics.fmean(recalls), statistics.fmean(r * w for r, w in zip(recalls, weights, strict=True))


def halved(adapter: TextAdapter, sample: Sample, share: float) -> tuple[list[int], list[int]]:
    """(what the model is given, the true rest) as ids: the same tokens that it saw in training, end marks left out."""
    coded = adapter.cached(sample)
    stops = set(stop_ids(adapter.tokenizer, None)) | {adapter.tokenizer.pad_token_id}
    end = len(coded.ids)
    while end > coded.first and coded.ids[end - 1] in stops:
        end -= 1
    cut = coded.first + int((end - coded.first) * share)
    return list(coded.ids[:cut]), list(coded.ids[cut:end])


def _compressed(text: str) -> int:
    return len(zlib.compress(text.strip().encode(), 6))
