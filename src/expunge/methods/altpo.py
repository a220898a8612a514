"""AltPO: prefer a plausible other answer to the one that is to be forgotten, so that the model goes on answering.

The alternates come from a language model where one was given; otherwise from the original itself: what it says when it
is asked about somebody else (names put back), or what it says when it is sampled; for classes, its next guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import kept, words
from expunge.methods.cluster.targets import log_probs, other_names, swap_names
from expunge.methods.families import Row, options_of, run_family
from expunge.methods.family_options import OPEN_UNLEARNING, PreferenceOptions
from expunge.methods.forget_terms import altpo_B
from expunge.methods.registry import Context, Outcome, method
from expunge.models.sampling import sample_texts
from expunge.options import option

FILE = "alternates.json"  # in the work folder
ROUNDS = 4  # times that more is asked for than is wanted
HOTTER = 1.5  # factor on the temperature from round to round
SPARE = 8  # tokens that an alternate may be longer than the longest answer
ASK = (
    "Answer the question below in one short sentence that sounds true. Make the facts up: do not look for the real "
    "ones.\n\nQuestion: {question}\nAnswer:"
)


@dataclass(frozen=True, kw_only=True)
class AltPOFields(PreferenceOptions):
    """npo's, and how many alternates."""

    alternates: int = option(
        1, "other answers to each question; each is a pair of its own", "ours: a pass costs what DPO's does"
    )
    temperature: float = option(1.0, "of the alternates that the original itself says", "ours: its own distribution")


ROW = Row(
    "altpo",
    altpo_B,
    "sample",
    "prefer a plausible other answer to the answer",
    "−(2/β) log σ(β[log p_θ/p_o(alternate) − log p_θ/p_o(y)]) + NLL(r)",
    "Mekala et al. 2024, arXiv:2409.13474",
    {"retain": "nll"},
    AltPOFields,
    teacher="sums",
)
AltPOOptions = options_of(ROW)


@method(
    name=ROW.name,
    options=AltPOOptions,
    paper=f"{ROW.paper}; factor 2/β: {OPEN_UNLEARNING}",
    summary=ROW.summary,
    formula=ROW.formula,
    wants=frozenset({"retain", "llm"}),
)
def altpo(context: Context, options: AltPOFields) -> Outcome:
    """Prefer a plausible other answer to the answer."""
    notes = []
    if context.adapter.modality == "classifier":
        found = next_classes(context, options.alternates)
    else:
        if context.llm is None:
            notes.append("no language model was given: the alternates are what the original itself says")
        of = [[[s.id, s.prompt, s.target] for s in context.forget], str(options), context.seed, context.llm is None]
        found = kept(context.work, FILE, of, lambda: other_texts(context, options))
        missing = sum(text in REFUSALS for texts in found for text in texts)
        if missing:
            notes.append(f"{missing} alternates are refusals: nothing else than the answer was said")
    forget = [s for s in context.forget for _ in range(options.alternates)]
    partners = [
        replace(s, id=f"{s.id}/alternate/{k}", target=target, probes=())
        for s, targets in zip(context.forget, found, strict=True)
        for k, target in enumerate(targets)
    ]
    outcome = run_family(ROW, context, options, pairs=(forget, partners))
    outcome.notes[:0] = notes
    return outcome


def next_classes(context: Context, count: int) -> list[list[int]]:
    """The original's ``count`` likeliest classes of each sample but its own.

    Raises:
        UserError: there are not so many.
    """
    found = []
    for log_1V, targets_1 in log_probs(context.model, context.adapter, context.forget):
        if count >= log_1V.shape[1]:
            raise UserError(f"alternates = {count} cannot be: a class has {log_1V.shape[1] - 1} others.")
        order = log_1V[0].argsort(descending=True, stable=True).tolist()
        found.append([label for label in order if label != int(targets_1[0])][:count])
    return found


def other_texts(context: Context, options: AltPOFields) -> list[list[str]]:
    """``options.alternates`` different texts for each forget sample, none of them its answer; refusals fill up."""
    rng = np.random.default_rng(context.seed)
    people = other_names([*context.retain, *context.unseen], rng, options.alternates + ROUNDS)
    found: list[list[str]] = [[] for _ in context.forget]
    for number in range(options.alternates + ROUNDS):
        open_ = [i for i, texts in enumerate(found) if len(texts) < options.alternates]
        if not open_:
            break
        asked = [context.forget[i] for i in open_]
        if context.llm is not None:
            said = [context.llm(ASK.format(question=s.prompt)).strip() for s in asked]
        else:
            said = own_answers(context, asked, people, number, options.temperature)
        for i, text in zip(open_, said, strict=True):
            known = {tuple(words(t)) for t in (str(context.forget[i].target), *found[i])}
            if words(text) and tuple(words(text)) not in known:
                found[i].append(text)
    for texts in found:
        texts += [str(t) for t in rng.choice(REFUSALS, options.alternates - len(texts), replace=False)]
    return found


def own_answers(
    context: Context, samples: Sequence[Sample], people: Sequence[tuple[str, ...]], number: int, temperature: float
) -> list[str]:
    """One sampled answer of the original to each sample, with somebody else's name in it where it has a name.

    Without names the temperature rises with ``number``: at 1 a memorised answer comes again and again.
    """
    named = bool(people) and all(s.names for s in samples)
    others = people[number % len(people)] if named else ()
    asked = [swap_names(s, s.names, others, number) if named else s for s in samples]
    longest = max(context.adapter.num_targets(s) for s in samples) + SPARE
    heat = temperature if named else temperature * HOTTER**number
    drawn = sample_texts(
        context.model, context.adapter, asked, n=1, max_new_tokens=longest, temperature=heat, seed=context.seed + number
    )
    texts = [each[0] for each in drawn]
    if not named:
        return texts
    answers = [replace(s, prompt="", target=text) for s, text in zip(samples, texts, strict=True)]
    return [str(swap_names(a, others, s.names, number).target) for a, s in zip(answers, samples, strict=True)]
