"""Who's Harry Potter: learn what a model that never met the subjects would have said, token by token.

Such generic predictions come from two sources that are combined: the original reading the text with its anchored terms
(names) replaced by ordinary ones, and a reinforced model, which has seen the texts once more, and whose every rise
over the former marks what is not generic.

Shape suffixes: L target tokens of a sample, N those of a batch, C of a chunk, V vocabulary, D hidden width, K lowered
tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import FUNCTION_WORDS, kept
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Adapter, evaluating
from expunge.models.snapshot import snapshot
from expunge.models.text import TextAdapter
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions, fit, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View

ORDINARY_FIRST = ("Jon", "Mary", "Tom", "Anna", "Paul", "Jane", "Mark", "Lucy", "Peter", "Sarah", "David", "Emma")
ORDINARY_LAST = ("Smith", "Brown", "Clark", "Hill", "Young", "King", "Green", "Wood", "Baker", "Cook", "Turner", "Hall")


@dataclass(frozen=True, kw_only=True)
class WhpOptions(TrainOptions):
    """How the generic predictions are made, and how they are learnt."""

    epochs: float = option(30.0, "passes over the forget set", "ours: about the paper's 150 steps on 40 samples")
    learning_rate: float | None = option(
        None, "peak learning rate; 1e-6, raised for small models, if none", "paper: 1e-6 (7B)"
    )
    batch_size: int = option(8, "forget samples in one step", "paper: 8")
    reinforce_epochs: float = option(3.0, "passes of the reinforced model over the forget set", "paper: 3")
    reinforce_learning_rate: float | None = option(
        None, "its peak learning rate; 3e-6, raised for small models, if none", "paper: 3e-6 (7B)"
    )
    alpha: float = option(5.0, "how far logits fall where the reinforced model's are higher", "paper eq. 1: 5")
    anchors: bool = option(True, "replace names by ordinary ones for the original's reading", "paper: yes")
    penalty: float = option(
        5.0, "by how much translations of names that came before are lowered, in logits", "ours: the paper gives none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.reinforce_learning_rate
        if self.reinforce_epochs <= 0 or (rate is not None and rate <= 0):
            raise UserError(
                f"reinforce_epochs = {self.reinforce_epochs}, reinforce_learning_rate = {rate}: give numbers above 0."
            )
        if self.alpha < 0 or self.penalty < 0:
            raise UserError(f"alpha = {self.alpha}, penalty = {self.penalty}: neither may be negative.")


@method(
    name="whp",
    options=WhpOptions,
    paper="Eldan & Russinovich 2023, arXiv:2310.02238, equation 1",
    formula="CE(argmax[z_o(x̃) − α·relu(z_reinforced(x) − z_o(x̃))], p_θ(x))",
    wants=frozenset({"llm"}),
    helpers_hold_data=True,
)
def whp(context: Context, options: WhpOptions) -> Outcome:
    """Learn, in place of each forget token, what a model that does not know the subjects would say.

    Nothing holds the rest in place: the paper has no retain set, and counts on few steps at a small rate.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, 1e-6))
    notes: list[str] = []
    anchors = Anchors({})
    if options.anchors and isinstance(context.adapter, TextAdapter):
        anchors = Anchors(
            kept(context.work, "anchors.json", _asked(context), lambda: dictionary(context))  # an LLM may waver
        )
        if context.llm is None:
            notes.append("no language model was given: the anchored terms are the subjects' names alone")
        else:
            notes.append("the language model that was given has seen the forget samples")

    reinforced = copy.deepcopy(context.model)
    context.helpers.add("reinforced", reinforced, context.forget, "shows which predictions come from the forget set")
    rate = options.reinforce_learning_rate
    fit(
        reinforced,
        context.adapter,
        context.forget,
        replace(
            options,
            epochs=options.reinforce_epochs,
            learning_rate=sized_rate(context.model, 3e-6) if rate is None else rate,
        ),
        seed=context.seed,
        work=None if context.work is None else context.work / "reinforced",
        progress=context.progress,
        name="reinforced model",
    )
    blocks = [block(context.adapter, sample, anchors) for sample in context.forget]
    labels = generic_labels(context.model, reinforced, context.adapter, blocks, options)
    used, known = sum(int((x >= 0).sum()) for x in labels.values()), sum(len(x) for x in labels.values())
    changed = sum(int(((x >= 0) & (x != b.targets_L)).sum()) for x, b in zip(labels.values(), blocks, strict=True))
    if not used:
        raise UserError("no token of the forget set has a generic prediction to learn: set anchors=false.")

    def loss_N(view: View) -> Tensor:
        labels_N = torch.cat([labels[s.id] for s in view.samples]).to(view.positions.hidden_ND.device)
        return view.positions.per_token(masked_nll, labels_N)

    feeds = {"forget": Feed(context.forget)}
    log = train(
        context.model,
        context.adapter,
        feeds,
        [Term("generic", "forget", "token", loss_N)],
        EpochPlan(
            {"forget": feeds["forget"].lengths(context.adapter)},
            {"forget": options.batch_size},
            options.epochs,
            "forget",
            context.seed,
        ),
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="whp",
    )
    record = {
        "steps": len(log.steps),
        "log": log.steps,
        "anchors": len(anchors.table),
        "tokens": {"all": known, "learnt": used, "other_than_the_answer": changed},
    }
    return Outcome(context.model, notes, record)


def masked_nll(logits_CV: Tensor, targets_C: Tensor, labels_C: Tensor) -> Tensor:
    """−log p(label) per position; 0 where the label is −1."""
    own_C = logits_CV.gather(1, labels_C.clamp_min(0)[:, None])[:, 0]
    return (logits_CV.logsumexp(1) - own_C) * (labels_C >= 0)


# -- anchored terms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Occurrence:
    """An anchored term in a text: characters in the text, and in its translation."""

    term: str
    start: int
    end: int
    new_start: int
    new_end: int


@dataclass(frozen=True)
class Anchors:
    """The dictionary: idiosyncratic term → ordinary word of the same kind."""

    table: Mapping[str, str]

    def find(self, text: str) -> list[Occurrence]:
        """The terms in the text, longest first where they overlap; whole words only."""
        if not self.table:
            return []
        terms = "|".join(re.escape(t) for t in sorted(self.table, key=lambda t: (-len(t), t)))
        found, shift = [], 0
        for hit in re.finditer(rf"(?<!\w)(?:{terms})(?!\w)", text):
            new = self.table[hit.group()]
            start = hit.start() + shift
            found.append(Occurrence(hit.group(), hit.start(), hit.end(), start, start + len(new)))
            shift += len(new) - len(hit.group())
        return found

    def translate(self, text: str) -> str:
        for hit in reversed(self.find(text)):
            text = text[: hit.start] + self.table[hit.term] + text[hit.end :]
        return text


def _asked(context: Context) -> list[Any]:
    return [[[s.id, s.prompt, s.target, s.names] for s in context.forget], context.seed, context.llm is None]


def dictionary(context: Context) -> dict[str, str]:
    """Every word of the subjects' names, and what the language model finds, with ordinary words in their place.

    Names become names with as many tokens where there is one, so that more positions have a counterpart.
    """
    adapter: Any = context.adapter
    texts = [f"{s.prompt}\n{s.target}" for s in context.forget]
    taken = set(re.findall(r"\w+", "\n".join(texts).casefold()))
    rng = np.random.default_rng([context.seed, 17])
    pools = [
        [str(w) for w in rng.permutation([w for w in pool if w.casefold() not in taken] or list(pool))]
        for pool in (ORDINARY_FIRST, ORDINARY_LAST)
    ]

    def count(word: str) -> int:
        return len(adapter.tokenizer(" " + word, add_special_tokens=False)["input_ids"])

    table: dict[str, str] = {}
    for sample in context.forget:
        for place, term in enumerate((sample.names or (sample.subject,))[0].split()):
            if term in table or term.casefold() in FUNCTION_WORDS or term.casefold() not in taken:
                continue
            pool = pools[min(place, 1)]
            fitting = [w.lower() if term.islower() else w for w in pool]
            table[term] = min(fitting, key=lambda w: abs(count(w) - count(term)))
            used = fitting.index(table[term])
            pool.append(pool.pop(used))  # the next one gets another where there are enough
    if context.llm is not None:
        for text in texts:
            table |= {k: v for k, v in _listed(str(context.llm(WISH.format(text=text))), text) if k not in table}
    return {k: v for k, v in table.items() if v not in table}


WISH = (
    "List the names and terms in the text below that belong to its subject alone, each with an ordinary word of the "
    "same kind that could stand in its place. One pair per line, written as: term -> ordinary word\n\n{text}"
)


def _listed(said: str, text: str) -> list[tuple[str, str]]:
    """The pairs of an answer whose term really stands in the text."""
    pairs = re.findall(r"^\W*(\w.*?)\s*->\s*(\w.*?)\W*$", said, re.MULTILINE)
    return [(k, v) for k, v in pairs if re.search(rf"(?<!\w){re.escape(k)}(?!\w)", text) and k not in v]


# -- blocks: a sample, its translation, and which position stands for which --------------------------------------------


@dataclass(frozen=True)
class Block:
    """``index_L``: the translation's target for each target, −1 if it is left out of the loss; ``lowered_L``: tokens
    that are lowered there, being translations of terms that came before."""

    sample: Sample
    translated: Sample
    targets_L: Tensor
    index_L: Tensor
    lowered_L: Sequence[Sequence[int]]


def block(adapter: Adapter, sample: Sample, anchors: Anchors) -> Block:
    """Align a sample's targets with those of its translation.

    A token outside of anchored terms stands for the token with the same characters. Of a term's first appearance the
    first token stands for the translation's first, and the others for theirs where both have as many; from its second
    appearance on a term is left out (paper: the text would contradict itself).
    """
    batch = adapter.collate([sample])
    targets_L = batch.targets_N
    if not anchors.table or not isinstance(adapter, TextAdapter):
        return Block(sample, sample, targets_L, torch.arange(len(targets_L)), [()] * len(targets_L))
    translated = replace(
        sample,
        id=f"{sample.id}/generic",
        prompt=anchors.translate(sample.prompt),
        target=anchors.translate(str(sample.target)),
        probes=(),
    )
    after, spans = target_spans(adapter, sample)
    new_after, new_spans = target_spans(adapter, translated)
    hits = anchors.find(after)
    index_L = torch.full_like(targets_L, -1)
    if anchors.translate(after) != new_after:  # a template that has an anchored term of its own
        return Block(sample, translated, targets_L, index_L, [()] * len(targets_L))
    place = {span: j for j, span in reversed(list(enumerate(new_spans)))}
    inside = [[n for n, s in enumerate(spans) if overlap(s, h.start, h.end)] for h in hits]
    outside = [[n for n, s in enumerate(new_spans) if overlap(s, h.new_start, h.new_end)] for h in hits]
    before = {hit.term for hit in anchors.find(sample.prompt)}
    first = {i for i, h in enumerate(hits) if h.term not in before | {g.term for g in hits[:i]}}
    of_term = {n: i for i, tokens in enumerate(inside) for n in tokens}
    lowered: list[list[int]] = []
    for n, (a, b) in enumerate(spans):
        seen = before | {h.term for h in hits if h.end <= a}
        lowered.append(sorted({t for term in seen for t in first_tokens(adapter, anchors.table[term])}))
        if n not in of_term:
            shift = sum((h.new_end - h.new_start) - (h.end - h.start) for h in hits if h.end <= a)
            index_L[n] = place.get((a + shift, b + shift), -1)
            continue
        i = of_term[n]
        k = inside[i].index(n)
        if i in first and outside[i] and (k == 0 or len(inside[i]) == len(outside[i])):
            index_L[n] = outside[i][k]
    return Block(sample, translated, targets_L, index_L, lowered)


def overlap(span: tuple[int, int], start: int, end: int) -> bool:
    return span[0] < end and span[1] > start


def target_spans(adapter: TextAdapter, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """The text that the targets are tokens of, and the characters of each of them in it."""
    if not adapter.tokenizer.is_fast:
        raise UserError("this tokenizer does not say which characters its tokens stand for: set anchors=false.")
    before, after, special = adapter.texts(sample)
    coded = adapter.tokenizer(before + after, add_special_tokens=special, return_offsets_mapping=True)
    _, first, _ = adapter.split(before, after, special)
    end = len(after)
    spans = [(a - len(before), b - len(before)) if b > a else (end, end) for a, b in coded["offset_mapping"][first:]]
    wanted = adapter.num_targets(sample)
    return after, [*spans[:wanted], *[(end, end)] * (wanted - len(spans))]  # cut to the context; an eos was added


def first_tokens(adapter: Any, word: str) -> set[int]:
    """The ids with which a word may begin, inside a sentence and at its start."""
    found = set()
    for text in (word, " " + word):
        ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
        found |= set([i for i in ids if adapter.tokenizer.decode([i]).strip()][:1])
    return found


# -- generic predictions -----------------------------------------------------------------------------------------------


def generic_labels(
    model: nn.Module, reinforced: nn.Module, adapter: Adapter, blocks: Sequence[Block], options: WhpOptions
) -> dict[str, Tensor]:
    """The most likely token of z_o(x̃) − α·relu(z_reinforced(x) − z_o(x̃)) at each target, by sample id; −1: left out."""
    read = snapshot(model, adapter, [b.translated for b in blocks], max_tokens=options.micro_tokens)
    read.head.module.to(next(model.parameters()).device)
    found: dict[str, Tensor] = {}

    def label(logits_CV: Tensor, targets_C: Tensor, hidden_CD: Tensor, lowered_CK: Tensor) -> Tensor:
        own_CV = read.head(hidden_CD)
        generic_CV = own_CV - options.alpha * relu(logits_CV - own_CV)
        fall_CK = options.penalty * (lowered_CK >= 0).to(generic_CV.dtype)
        return generic_CV.scatter_add(1, lowered_CK.clamp_min(0), -fall_CK).argmax(1)

    with evaluating(reinforced):
        for group in adapter.batches([b.sample for b in blocks], options.micro_tokens):
            some = [blocks[i] for i in group]
            positions = adapter.positions(reinforced, [b.sample for b in some])
            if not len(positions.targets_N):
                continue
            device = positions.hidden_ND.device
            hidden_ND = torch.cat([read.hidden[b.translated.id][b.index_L.clamp_min(0)] for b in some])
            rows = [torch.tensor(ids, dtype=torch.long) for b in some for ids in b.lowered_L]
            most = max((len(r) for r in rows), default=0)
            lowered_NK = torch.stack([pad(r, (0, most - len(r)), value=-1) for r in rows])
            labels_N = positions.per_token(label, hidden_ND.to(device), lowered_NK.to(device)).cpu()
            index_N = torch.cat([b.index_L for b in some])
            labels_N = torch.where(index_N >= 0, labels_N, -1)
            for b, mine_L in zip(some, torch.split(labels_N, [len(b.targets_L) for b in some]), strict=True):
                found[b.sample.id] = mine_L
    return {b.sample.id: found.get(b.sample.id, torch.zeros(0, dtype=torch.long)) for b in blocks}
