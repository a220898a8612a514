"""``medical``: research questions with the conclusions of their abstracts (PubMedQA, Jin et al. 2019)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.carve import Sizes, carve
from expunge.data.hub import hub_rows, local_file
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Probe, Sample
from expunge.errors import UserError
from expunge.options import option

HUB = "qiaojin/PubMedQA"
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True, kw_only=True)
class MedicalOptions(Sizes):
    """Sizes count articles; there are 1000."""

    form: str = option(
        "answer",
        "answer: the conclusion; decision: yes, no or maybe; document: the whole abstract",
        choices=("answer", "decision", "document"),
    )
    context: bool = option(False, "put the abstract before the question")


def read_articles(data_dir: Path | None) -> dict[str, Mapping[str, Any]]:
    """PubMed id -> question, contexts, conclusion, decision.

    Raises:
        UserError: the file or the hub is missing, or a record lacks a field.
    """
    if data_dir is None:
        rows = hub_rows(HUB, "pqa_labeled", "train")
        return {
            str(row["pubid"]): {
                "question": row["question"],
                "contexts": list(row["context"]["contexts"]),
                "conclusion": row["long_answer"],
                "decision": row["final_decision"],
            }
            for row in rows
        }
    path = local_file(data_dir, ("ori_pqal.json",), "medical")
    try:
        return {
            number: {
                "question": record["QUESTION"],
                "contexts": record["CONTEXTS"],
                "conclusion": record["LONG_ANSWER"],
                "decision": record["final_decision"],
            }
            for number, record in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not PubMedQA's ori_pqal.json ({type(error).__name__}: {error}).") from None


def sample_of(number: str, article: Mapping[str, Any], options: MedicalOptions) -> Sample:
    """One article as one sample; the two other decisions are wrong answers of the same type."""
    abstract = " ".join(article["contexts"])
    if options.form == "document":
        text = f"{article['question']} {abstract} {article['conclusion']}"
        return Sample(id=f"pmid-{number}", subject=f"PMID {number}", target=text)
    prompt = f"{abstract} {article['question']}" if options.context else article["question"]
    if options.form == "answer":
        return Sample(id=f"pmid-{number}", subject=f"PMID {number}", prompt=prompt, target=article["conclusion"])
    return Sample(
        id=f"pmid-{number}",
        subject=f"PMID {number}",
        prompt=prompt,
        target=article["decision"],
        probes=tuple(
            Probe(kind="perturbed", prompt=prompt, target=word) for word in DECISIONS if word != article["decision"]
        ),
    )


@dataset(
    name="medical",
    options=MedicalOptions,
    summary="1000 biomedical research questions with the conclusions of their abstracts",
    origin=f"local ori_pqal.json; hub: {HUB} (pqa_labeled); Jin et al. 2019, arXiv:1909.06146",
    licence="MIT",
)
def load(options: MedicalOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """PubMedQA in roles by article. ``seed`` is not used; ``split_seed`` chooses the articles."""
    samples = [sample_of(number, article, options) for number, article in read_articles(data_dir).items()]
    source = str(data_dir) if data_dir else f"hub: {HUB}"
    return Dataset(name="medical", roles=carve(samples, options, "medical"), source=source)
