"""Personal data by rank: is the true value the model's choice, given its context, the name alone, or the reverse?

After Lukas et al. 2023, "Analyzing leakage of personally identifiable information in language models" (arXiv
2302.00539): inference among candidates, and reconstruction without any. Their programs keep candidates under their
perplexity, which loses ties; here ties stand at mid-rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expunge.attacks.canaries import line_up_note
from expunge.attacks.candidates import Lineup, donors, exposure, likelihoods, lineups, mid_rank, renamed
from expunge.attacks.continuations import fitting, ids_up_to
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.extraction import mean_over
from expunge.attacks.leakage import chosen
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.models.sampling import check_sampler, sample_ids, text_adapter
from expunge.options import option
from expunge.stats import Estimate

VIEWS = ("context", "name", "reverse")


def context_row(row: Lineup) -> list[Sample]:
    """The candidates in the true context."""
    return row.texts()


def name_row(row: Lineup) -> list[Sample] | None:
    """The candidate values after the subject's name alone; None without a name or a single value."""
    if not row.sample.names or not row.single:
        return None
    prompt = row.sample.names[0]
    return [
        replace(row.sample, id=f"{row.sample.id}/name/{k}", prompt=prompt, target=c, image=None, probes=())
        for k, c in enumerate(row.candidates)
    ]


def reverse_row(sample: Sample, row: Lineup | None, others: Sequence[Sample], limit: int) -> list[Sample] | None:
    """The subject's name among other subjects' names, asked from the value; None without names or a value.

    The question is the sample's reverse probe where it has one, else the value alone.
    """
    names = {s.subject: s.names for s in others if s.names and s.subject != sample.subject}
    probe = next(iter(sample.probes_of("reverse")), None)
    if not sample.names or not names or (probe is None and (row is None or not row.single)):
        return None
    prompt, target = (probe.prompt, probe.target) if probe is not None else (row.truth if row else "", sample.names[0])
    texts = [target, *(renamed(target, sample.names, other) for other in list(names.values())[:limit])]
    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        return None
    return [
        replace(sample, id=f"{sample.id}/reverse/{k}", prompt=prompt, target=t, image=None, probes=())
        for k, t in enumerate(different)
    ]


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Size of the line-ups, and how texts of different lengths compare."""

    candidates: int = option(50, "most surrogates of a line-up; the paper has 100 to 500", "Lukas et al. 2023")
    normalise: str = option(
        "token", "log-likelihood per token (perplexity) or of the whole text", "Lukas et al. 2023",
        choices=("token", "text"),
    )  # fmt: skip


@attack(
    name="pii",
    family="extraction",
    tier="standard",
    access="log-probabilities",
    paper="Lukas et al. 2023, arXiv 2302.00539",
    options=InferenceOptions,
    modalities=("text", "multimodal"),
    formula="log2 C - log2 rank of the true value among C candidates; also top-1 and mean reciprocal rank",
    passes=150.0,
)
def inference(exam: Exam, checkpoint: Checkpoint, options: InferenceOptions) -> Finding:
    """The true value among values of the same type: given its context, given the name alone, and the name given it.

    ``pii.context`` is what remains of the text, ``pii.name`` the bare association, ``pii.reverse`` the way back from
    the value to the person. Scores are exposures in bits; figures are top-1 and the mean reciprocal rank.
    """
    if options.candidates < 1:
        raise UserError(f"{options.candidates} candidates make no line-up: give at least 1.")
    scores: dict[str, dict[Role, list[float]]] = {f"pii.{view}": {} for view in VIEWS}
    figures: dict[str, Estimate] = {}
    details: dict[str, Mapping[str, Any]] = {}
    counts: list[int] = []
    giving = sorted(donors(exam), key=lambda s: s.id)
    for role, rows in lineups(exam, options.candidates).items():
        samples = exam.samples[role]
        order = [giving[i] for i in exam.rng("pii", role).permutation(len(giving))]
        texts: dict[str, list[list[Sample] | None]] = {
            "context": [context_row(r) if r else None for r in rows],
            "name": [name_row(r) if r else None for r in rows],
            "reverse": [
                reverse_row(s, r, order, options.candidates) for s, r in zip(samples, rows, strict=True)
            ],
        }  # fmt: skip
        for view, asked in texts.items():
            normalise = "token" if options.normalise == "token" else "text"
            found = likelihoods(checkpoint, asked, normalise, exam)  # type: ignore[arg-type]
            ranks = [math.nan if row is None else mid_rank(row) for row in found]
            scores[f"pii.{view}"][role] = [
                math.nan if row is None else exposure(rank, len(row)) for rank, row in zip(ranks, found, strict=True)
            ]
            top = [math.nan if math.isnan(rank) else float(rank == 1) for rank in ranks]
            figures[f"pii.{view}.top1.{role}"] = mean_over(exam, role, top, "pii-top1/1")
            figures[f"pii.{view}.mrr.{role}"] = mean_over(exam, role, [1 / r for r in ranks], "pii-mrr/1")
            if role == "forget" and view == "context":
                counts = [len(row) for row in found if row is not None]
                for sample, line, row, rank in zip(samples, rows, found, ranks, strict=True):
                    if line is not None and row is not None:
                        first = line.candidates[int(np.nanargmax(row))]
                        details[sample.id] = {
                            "value": line.truth, "first": first, "rank": rank, "candidates": len(row)
                        }  # fmt: skip
    return Finding(scores, figures, details, (line_up_note(counts, len(exam.forget)),))


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """The sampler that proposes values."""

    n: int = option(64, "continuations drawn for each sample", "Lukas et al. 2023")
    temperature: float = option(1.0, "temperature of the sampler")
    top_k: int = option(40, "tokens that the sampler chooses from; 0 takes all", "Lukas et al. 2023")
    extra_tokens: int = option(2, "tokens drawn beyond the longest candidate value of the line-up")
    limit: int = option(64, "most forget samples that are attacked, drawn by chance; 0 takes all")


def proposals(texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """Different beginnings of the drawn texts, of as many words as values of this type have; most frequent first."""
    counted: dict[str, int] = {}
    for text in texts:
        words = text.split()
        for length in lengths:
            if length <= len(words):
                value = " ".join(words[:length]).rstrip(".,;:!?\"'")
                counted[value] = counted.get(value, 0) + 1
    counted.pop("", None)
    return sorted(counted, key=lambda v: -counted[v])


@attack(
    name="reconstruction",
    family="extraction",
    tier="standard",
    access="log-probabilities",
    paper="Lukas et al. 2023, arXiv 2302.00539",
    options=ReconstructionOptions,
    formula="1 / rank of the true value by perplexity of the whole sentence among sampled values; 0 if never drawn",
    passes=150.0,
    needs=("probes",),
)
def reconstruction(exam: Exam, checkpoint: Checkpoint, options: ReconstructionOptions) -> Finding:
    """The answer with its value masked: values are drawn from the left context, the whole sentence chooses among them.

    Nobody gives candidates, so that 1 means: the model alone fills in the true value. Only samples whose answer has
    a single value (from perturbed answers) can be attacked.
    """
    check_sampler(options.n, 1, options.temperature, options.top_k, 1.0)
    adapter = text_adapter(checkpoint.adapter)
    rows = lineups(exam, InferenceOptions().candidates)["forget"]
    places = [i for i in chosen(exam, options.limit, "reconstruction") if (r := rows[i]) is not None and r.single]
    lines = [row for i in places if (row := rows[i]) is not None]
    lengths = [sorted({len(c.split()) for c in line.candidates}) for line in lines]
    longest = [max(len(adapter.tokenizer(" " + c)["input_ids"]) for c in line.candidates) for line in lines]
    masked = [replace(line.sample, target=line.before, probes=()) for line in lines]
    new = [count + options.extra_tokens for count in longest]
    starts = [fitting(adapter, ids_up_to(adapter, s, s.target), n) for s, n in zip(masked, new, strict=True)]
    drawn = sample_ids(
        checkpoint.model, adapter, masked, starts, new, n=options.n,
        temperature=options.temperature, top_k=options.top_k, seed=exam.seed,
    ) if lines else []  # fmt: skip
    decode = adapter.tokenizer.decode
    values = [
        proposals([decode(ids, skip_special_tokens=True).strip() for ids in each], sizes)
        for each, sizes in zip(drawn, lengths, strict=True)
    ]
    tried = [_lined_up(line, found) for line, found in zip(lines, values, strict=True)]
    ranked = likelihoods(checkpoint, [t.texts() if t else None for t in tried], "token", exam)
    scores = [math.nan] * len(exam.forget)
    details: dict[str, Mapping[str, Any]] = {}
    for place, line, found, scores_C in zip(places, lines, values, ranked, strict=True):
        scores[place] = 0.0 if scores_C is None else 1 / mid_rank(scores_C)
        details[line.sample.id] = {"value": line.truth, "drawn": found[:10], "reciprocal_rank": scores[place]}
    definition = f"reconstruction/1 n={options.n} T={options.temperature:g} top_k={options.top_k}"
    first = [math.nan if math.isnan(s) else float(s == 1) for s in scores]
    note = (
        f"{len(lines)} of {len(exam.forget)} forget samples have a single value to mask; {options.n} continuations "
        f"were drawn for each, and a value that was not among them scores 0 without being proven absent"
    )
    return Finding(
        {"reconstruction": {"forget": scores}},
        {"reconstruction.top1.forget": mean_over(exam, "forget", first, definition)},
        details,
        (note,),
    )


def _lined_up(line: Lineup, drawn: Sequence[str]) -> Lineup | None:
    """The true value first, then the other drawn ones; None when the true value was never drawn."""
    same = {v.casefold() for v in drawn}
    if line.truth.casefold() not in same:
        return None
    return replace(line, others=tuple(v for v in drawn if v.casefold() != line.truth.casefold()))
