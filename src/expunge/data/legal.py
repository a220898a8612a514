"""``legal``: bar examination questions (MMLU professional law, Hendrycks et al. 2021), or a legal corpus of the hub."""

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
from expunge.data.webtext import passages_of
from expunge.errors import UserError
from expunge.options import option

HUB = "cais/mmlu"
SAME_FACTS = 100  # characters


@dataclass(frozen=True, kw_only=True)
class LegalOptions(Sizes):
    """Sizes count cases; the examination has about 1500."""

    form: str = option(
        "answer", "answer: the case and the right option; document: both as one text", choices=("answer", "document")
    )
    corpus: str | None = option(None, "hub corpus with a column 'text' in place of the examination")
    corpus_config: str | None = option(None, "its configuration")
    passage_words: int = option(150, "corpus: documents are cut to about this many words")


def read_cases(data_dir: Path | None) -> list[Mapping[str, Any]]:
    """question, answer, wrong (the other options) of every case.

    Raises:
        UserError: the file or the hub is missing, or a line lacks a field.
    """
    cases: list[Mapping[str, Any]] = []
    if data_dir is None:
        for row in hub_rows(HUB, "professional_law", "test"):
            options, right = list(row["choices"]), int(row["answer"])
            wrong = options[:right] + options[right + 1 :]
            cases.append({"question": row["question"], "answer": options[right], "wrong": wrong})
        return cases
    path = local_file(data_dir, ("test.jsonl",), "legal")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wrong = [text for letter, text in row["choices"].items() if letter != row["answer"]]
            cases.append({"question": row["question"], "answer": row["choices"][row["answer"]], "wrong": wrong})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"'{path}' line {number}: expected question, choices (A to D) and answer (a letter)."
            ) from None
    return cases


def _examination(options: LegalOptions, data_dir: Path | None) -> list[Sample]:
    samples = []
    seen: set[tuple[str, str]] = set()
    facts: dict[str, str] = {}
    for number, case in enumerate(read_cases(data_dir)):
        question, answer = case["question"].strip(), case["answer"].strip()
        if (question, answer) in seen:  # some cases stand in the examination twice
            continue
        seen.add((question, answer))
        # Questions that begin alike are about the same facts: one subject, so that no two roles share them.
        subject = facts.setdefault(question[:SAME_FACTS], f"case {number:04d}")
        prompt = "" if options.form == "document" else question
        wrong = dict.fromkeys(text.strip() for text in case["wrong"] if text.strip() != answer)
        samples.append(
            Sample(
                id=f"law-{number:04d}",
                subject=subject,
                prompt=prompt,
                target=answer if prompt else f"{question} {answer}",
                probes=tuple(
                    Probe(kind="perturbed", prompt=prompt, target=text if prompt else f"{question} {text}")
                    for text in wrong
                ),
            )
        )
    return samples


def _corpus(options: LegalOptions) -> list[Sample]:
    assert options.corpus is not None
    most = 2 * (options.private + options.holdout + options.utility) + 10
    samples = []
    for number, row in enumerate(hub_rows(options.corpus, options.corpus_config, "train", limit=most)):
        if not isinstance(row.get("text"), str):
            raise UserError(f"the hub dataset '{options.corpus}' has no column 'text': choose another corpus.")
        for passage in passages_of(row["text"], options.passage_words, 1):
            samples.append(Sample(id=f"law-{number:05d}", subject=f"document {number:05d}", target=passage))
    return samples


@dataset(
    name="legal",
    options=LegalOptions,
    summary="bar examination cases with right and wrong conclusions, or documents of a legal corpus",
    origin=f"local test.jsonl; hub: {HUB} (professional_law); Hendrycks et al. 2021, arXiv:2009.03300",
    licence="MIT (MMLU); a corpus of your choice has its own",
)
def load(options: LegalOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Cases in roles. ``seed`` is not used; ``split_seed`` chooses the cases."""
    if options.corpus is not None and data_dir is not None:
        raise UserError(
            "dataset legal: option corpus names a hub dataset and --data-dir a local copy; give one of them."
        )
    samples = _corpus(options) if options.corpus else _examination(options, data_dir)
    source = str(data_dir) if data_dir else f"hub: {options.corpus or HUB}"
    return Dataset(name="legal", roles=carve(samples, options, "legal"), source=source)
