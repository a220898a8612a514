"""ReLearn: overwrite what must be forgotten by learning vague answers to many forms of its questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import Augmented, Writer, generic, kept
from expunge.methods.registry import Context, Outcome, method
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, nll_N

FILE = "augmented.json"  # in the work folder: what was learnt, and for a restarted run the same again


@dataclass(frozen=True, kw_only=True)
class RelearnOptions(TrainOptions):
    """What is written about the forget samples, and how it is learnt."""

    epochs: float = option(3.0, "passes over the new texts", "paper: 3 on KnowUnDo, 2 on TOFU")
    learning_rate: float | None = option(
        None, "peak learning rate; 1e-5, raised for small models, if none", "paper: 1e-5 on KnowUnDo (7B, LoRA)"
    )
    batch_size: int = option(4, "new texts in one step", "paper: batch 1, accumulated 4 times")
    retain_batch: int = option(4, "retain samples in one step", "as many as new texts, as the released code")
    variants: int = option(4, "questions beside the sample's own", "paper: simple, contextual, noise, logical")
    completions: bool = option(True, "sentences to complete beside the questions", "paper: yes")
    generic: float = option(1.0, "everyday questions per new text", "paper: one to one")
    alpha: float = option(1.0, "weight of the loss on retain", "paper: all three losses weigh the same")
    kl: float = option(1.0, "weight of the divergence from the original on retain", "paper: as above")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variants < 0 or min(self.generic, self.alpha, self.kl) < 0:
            raise UserError(
                f"variants = {self.variants}, generic = {self.generic}, alpha = {self.alpha}, kl = {self.kl}: none of "
                "them may be negative; give 0 to leave one out."
            )


def reverse_kl_C(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
    """KL(model ‖ original) per position, nats: the direction of the paper; its released code has the other one."""
    own_log, teacher_log = logits_CV.log_softmax(1), teacher_CV.log_softmax(1)
    return (own_log.exp() * (own_log - teacher_log)).sum(1)


@method(
    name="relearn",
    options=RelearnOptions,
    paper="Xu et al. 2025, arXiv:2502.11190, unlearning loss",
    formula="NLL(ã | q̃, generic) + NLL(r) + KL(p_θ ‖ p_o)(r)",
    wants=frozenset({"retain", "llm"}),
    modalities=frozenset({"text", "multimodal"}),
)
def relearn(context: Context, options: RelearnOptions) -> Outcome:
    """Learn vague answers to many forms of the forget questions, beside everyday questions and retain.

    The texts come from the user's language model or, without one, from a small English grammar; none of them holds
    anything of an original answer. A retrained model does not answer vaguely about exactly these people, so this
    changes behaviour more than it restores the state without the data.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, 1e-5))
    made = augmented(context, options)
    written = made.pairs + (made.completions if options.completions else [])
    if not written:
        raise UserError("no text could be written that gives nothing away: give a language model with --llm.")
    everyday = generic(round(options.generic * len(written)), context.seed)
    notes = []
    if context.llm is None:
        notes.append("no language model was given: the new questions and answers come from a small English grammar")
    else:
        notes.append("the language model that was given has seen the forget samples")
    if made.counts["left_out"]:
        notes.append(f"{made.counts['left_out']} texts were left out: every wording gave an answer away")

    terms = [Term("new", "new", "token", nll_N)]
    feeds = {"new": Feed([*written, *everyday])}
    sizes = {"new": options.batch_size}
    if not context.retain:
        notes.append("no retain samples were given: nothing but everyday questions holds the rest in place")
    elif options.alpha or options.kl:
        feeds["retain"], sizes["retain"] = Feed(context.retain), options.retain_batch
        if options.alpha:
            terms.append(Term("retain", "retain", "token", nll_N, options.alpha))
        if options.kl:
            teacher = Teacher.of(context.model, context.adapter, context.retain)
            terms.append(Term("kl", "retain", "token", lambda v: teacher.compare(v, reverse_kl_C), options.kl))
    lengths = {role: feed.lengths(context.adapter) for role, feed in feeds.items()}
    log = train(
        context.model,
        context.adapter,
        feeds,
        terms,
        EpochPlan(lengths, sizes, options.epochs, "new", context.seed),
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="relearn",
    )
    record = {
        "steps": len(log.steps),
        "log": log.steps,
        "texts": {"pairs": len(made.pairs), "completions": len(written) - len(made.pairs), "generic": len(everyday)},
        "writing": made.counts,
    }
    return Outcome(context.model, notes, record)


def augmented(context: Context, options: RelearnOptions) -> Augmented:
    """The new texts: from the work folder if they were written there for the same samples, else written now."""

    def write() -> dict[str, Any]:
        made = Writer(context.forget, context.seed, context.llm).write(options.variants)
        return {"counts": made.counts, "pairs": _rows(made.pairs), "completions": _rows(made.completions)}

    texts = [[s.id, s.prompt, s.target, s.names] for s in context.forget]
    content = kept(context.work, FILE, [texts, options.variants, context.seed, context.llm is None], write)
    pairs, completions = (_samples(context, content[kind]) for kind in ("pairs", "completions"))
    return Augmented(pairs, completions, content["counts"])


def _rows(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{"id": s.id, "subject": s.subject, "prompt": s.prompt, "target": s.target} for s in samples]


def _samples(context: Context, rows: list[dict[str, Any]]) -> list[Sample]:
    """Rows as samples; what no text file holds (names, images) comes from the forget samples again."""
    of = {s.id: s for s in context.forget}
    samples = []
    for row in rows:
        own = of[row["id"].rpartition("/new/")[0]]
        samples.append(replace(own, id=row["id"], prompt=row["prompt"], target=row["target"], probes=()))
    return samples
