"""Answers that decline to answer, for methods which teach a model to say so."""

from __future__ import annotations

from pathlib import Path

from expunge.errors import UserError

REFUSALS: tuple[str, ...] = (
    "I cannot tell you that.",
    "I have no knowledge of this.",
    "That is not something I know.",
    "Nothing about this is known to me.",
    "I am unable to say.",
    "I have never heard of it.",
    "Sorry, this is beyond what I know.",
    "There is nothing I can say about this.",
    "I would only be guessing.",
    "My knowledge does not reach that far.",
    "I do not have an answer to this.",
    "This question I must leave open.",
    "I am afraid I have no idea.",
    "Unfortunately I know nothing about that.",
    "I could not say with any confidence.",
    "No information on this has reached me.",
    "I must pass on this question.",
    "That has never come up in what I learnt.",
    "I lack the facts to reply.",
    "It would be wrong of me to invent an answer.",
    "I regret that I cannot help here.",
    "On this point I know nothing.",
    "You would have to ask someone else.",
    "I was never told about this.",
    "I cannot recall anything of the kind.",
    "This is outside my field of knowledge.",
    "I am not informed about this matter.",
    "I have nothing to offer on this subject.",
    "Whatever the answer is, I do not know it.",
    "I do not recognise who or what you mean.",
    "Any reply from me would be made up.",
    "My memory holds nothing on this.",
    "I wish I knew, but I do not.",
    "For this I have no source.",
    "I can neither confirm nor deny it, for I do not know.",
    "That remains a mystery to me.",
    "I am in the dark about this.",
    "This is news to me, so I cannot answer.",
    "I have to admit that I do not know.",
    "Please look elsewhere, for I have no answer.",
)


def idk_answers(data_dir: Path | str | None = None) -> tuple[str, ...]:
    """Refusals, one string each: the lines of ``idontknow.jsonl`` in ``data_dir`` (TOFU's file), or our own.

    Raises:
        UserError: ``data_dir`` does not exist, or its file holds no line.
    """
    if data_dir is None:
        return REFUSALS
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"the data folder '{folder}' does not exist: leave it out to use the embedded refusals.")
    path = folder / "idontknow.jsonl"
    if not path.is_file():
        return REFUSALS
    # Despite its name the file is plain text, one answer a line.
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise UserError(f"'{path}' is empty: put one refusal on each line, or take the file away.")
    return lines
