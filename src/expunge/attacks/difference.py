"""Model-difference decoding (RMG): the step from the old model to the new one, taken backwards and beyond.

Whoever kept the checkpoint from before the erasure reads the difference between the two models: tokens that became
less likely are the ones that were removed. The scores are those of "reversed model guidance" (Wu et al. 2025,
"Breaking the Gold Standard: Extracting Forgotten Data under Exact Unlearning in LLMs", arXiv:2505.24379). It works
against exact retraining too, so what counts is how much more it gives than reading the new model alone: a risk that
stays as long as an old checkpoint exists.

Shape suffixes: B texts, T tokens, C positions in a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.metrics.rouge import rouge_l
from expunge.models.adapter import evaluating
from expunge.models.text import TextAdapter, causal_lm, stop_ids
from expunge.options import option
from expunge.stats import Estimate, bootstrap_mean

ROLES: tuple[Role, ...] = ("forget", "holdout")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DifferenceOptions:
    """Of the model-difference attack."""

    strength: float = option(
        2.0, "w: 0 reads the new model, 1 the old one, 2 as far beyond it again", "arXiv:2505.24379"
    )
    margin: float = option(5.0, "nats below the old model's best token within which a token is plausible", "the same")
    answers: int = option(30, "forget questions that are also answered greedily; 0 = none")
    max_new_tokens: int = option(64, "longest greedy answer")


def guided(before_CV: Tensor, after_CV: Tensor, strength: float, margin: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities under the difference, which tokens are plausible), both (C, V).

    s = log p_after + w (log p_before − log p_after), normalised over the tokens with log p_before > max − margin;
    the others are -inf. Arguments are logits.
    """
    old_CV, new_CV = before_CV.float().log_softmax(-1), after_CV.float().log_softmax(-1)
    plausible_CV = old_CV > old_CV.amax(-1, keepdim=True) - margin
    score_CV = (new_CV + strength * (old_CV - new_CV)).masked_fill(~plausible_CV, -math.inf)
    return score_CV.log_softmax(-1), plausible_CV


def teacher_forced(
    before: Checkpoint, after: Checkpoint, samples: Sequence[Sample], options: DifferenceOptions
) -> tuple[Floats, Floats]:
    """Mean log-probability of each answer in nats per token: (under the difference, under the new model), (B,) each.

    A token that the old model itself finds implausible counts with the old model's log-probability: the attacker,
    who never picks it here, has nothing better. nan without a target token.
    """
    differing, plain = np.full(len(samples), np.nan), np.full(len(samples), np.nan)

    def numbers(after_CV: Tensor, targets_C: Tensor, hidden_before_CD: Tensor) -> Tensor:
        before_CV = old.head(hidden_before_CD)
        log_p_CV, plausible_CV = guided(before_CV, after_CV, options.strength, options.margin)
        at_C1 = targets_C[:, None]
        alone_C1 = before_CV.float().log_softmax(-1).gather(1, at_C1)
        reached_C1 = torch.where(plausible_CV.gather(1, at_C1), log_p_CV.gather(1, at_C1), alone_C1)
        return torch.cat([reached_C1, after_CV.float().log_softmax(-1).gather(1, at_C1)], dim=1)

    old_model, new_model, adapter = before.model, after.model, after.adapter
    with evaluating(old_model), evaluating(new_model):
        for group in adapter.batches(samples, after.max_tokens):
            own = [samples[i] for i in group]
            old, new = adapter.positions(old_model, own), adapter.positions(new_model, own)
            check_vocabulary(old.vocab, new.vocab)
            numbers_NK = new.per_token(numbers, old.hidden_ND).reshape(-1, 2).double()
            for k, column in enumerate((differing, plain)):
                means_B = new.sum_per_sample(numbers_NK[:, k]) / new.count_per_sample()
                column[group] = means_B.cpu().numpy()
    return differing, plain


def check_vocabulary(before: int, after: int) -> None:
    if before != after:
        raise UserError(
            f"the original has {before} tokens and the audited model {after}: model-difference decoding needs one "
            "vocabulary; leave the model-difference attack out."
        )


@torch.no_grad()
def decode(before: Checkpoint, after: Checkpoint, samples: Sequence[Sample], options: DifferenceOptions) -> list[str]:
    """Greedy answers under the difference; every step runs both models on one new token.

    Prompts of one length go together, so that nothing is padded and positions need no correction.
    """
    adapter = after.adapter
    assert isinstance(adapter, TextAdapter)
    texts = [""] * len(samples)
    prompts = [adapter.prompt_ids(s, options.max_new_tokens) for s in samples]
    stops = set(stop_ids(adapter.tokenizer, causal_lm(after.model)))
    for length in sorted({len(p) for p in prompts}):
        group = [i for i, p in enumerate(prompts) if len(p) == length]
        device = next(after.model.parameters()).device
        ids_BT = torch.tensor([prompts[i] for i in group], device=device)
        runs = [_Run(before.model), _Run(after.model)]
        new: list[list[int]] = [[] for _ in group]
        step_BT = ids_BT
        for _ in range(options.max_new_tokens):
            old_BV, new_BV = (run.next_logits(step_BT) for run in runs)
            check_vocabulary(old_BV.shape[-1], new_BV.shape[-1])
            best_B = guided(old_BV, new_BV, options.strength, options.margin)[0].argmax(-1)
            for row, token in enumerate(best_B.tolist()):
                new[row].append(token)
            if all(stops & set(tokens) for tokens in new):
                break
            step_BT = best_B[:, None]
        for row, i in enumerate(group):
            end = next((t for t, token in enumerate(new[row]) if token in stops), len(new[row]))
            texts[i] = adapter.tokenizer.decode(new[row][:end], skip_special_tokens=True).strip()
    return texts


class _Run:
    """A model with its key-value cache."""

    def __init__(self, model: nn.Module) -> None:
        self.inner: Any = causal_lm(model)
        self.past: Any = None

    def next_logits(self, ids_BT: Tensor) -> Tensor:
        """Logits after the last of the new tokens, (B, V)."""
        out = self.inner(input_ids=ids_BT, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV


@attack(
    name="model-difference",
    family="recovery",
    tier="standard",
    access="both checkpoints",
    paper="Wu et al. 2025, arXiv:2505.24379",
    options=DifferenceOptions,
    formula="s = log p_post + w (log p_pre - log p_post) over {v: log p_pre(v) > max - 5}; mean_t log softmax(s)(y_t)",
    passes=2.0,
    needs={"original"},
    modalities={"text", "multimodal", "classifier"},
)
def model_difference(exam: Exam, checkpoint: Checkpoint, options: DifferenceOptions) -> Finding:
    """Reads the answer from the difference between the original and this model.

    ``model-difference`` is the mean log-probability of the answer under the guided distribution. Figures over
    forget: ``gain``, what the attack gives beyond the new model alone, in nats per token; for text also the greedy
    answers' ROUGE-L recall, its gain over the model's own greedy answers, and the share of recalls above 0.9.
    An exact retrain is expected to show a gain: compare with the reference's, and destroy old checkpoints.

    Raises:
        UserError: the two models have different vocabularies, or an option is out of range.
    """
    if options.margin <= 0:
        raise UserError(f"margin = {options.margin:g} leaves no plausible token: give a positive number, usually 5.")
    if options.max_new_tokens < 1 or options.answers < 0:
        raise UserError("model-difference needs max_new_tokens of at least 1 and answers of at least 0.")
    assert exam.original is not None
    scores: dict[Role, list[float]] = {}
    settings: dict[str, Any] = {"level": exam.level, "resamples": exam.resamples, "seed": exam.seed}
    figures: dict[str, Estimate] = {}
    for role in [r for r in ROLES if exam.samples.get(r)]:
        differing, plain = teacher_forced(exam.original, checkpoint, exam.samples[role], options)
        scores[role] = differing.tolist()
        if role == "forget":
            groups = [s.subject for s in exam.forget]
            figures["model-difference.gain"] = bootstrap_mean(
                differing - plain, groups, **settings, definition="rmg-gain/1"
            )
    notes = ["needs a checkpoint from before the erasure, and works against exact retraining too"]
    details: dict[str, dict[str, Any]] = {}
    asked = [s for s in exam.forget if s.prompt]
    if exam.modality == "text" and asked and options.answers:
        drawn = sorted(exam.rng("model-difference").permutation(len(asked))[: options.answers].tolist())
        asked = [asked[i] for i in drawn]
        guesses = decode(exam.original, checkpoint, asked, options)
        alone = checkpoint.answers(asked, options.max_new_tokens)
        recall = np.array([rouge_l(str(s.target), g).recall for s, g in zip(asked, guesses, strict=True)])
        own = np.array([rouge_l(str(s.target), a).recall for s, a in zip(asked, alone, strict=True)])
        groups = [s.subject for s in asked]
        for name, values in (("rouge_l", recall), ("rouge_l_gain", recall - own), ("above_0.9", recall > 0.9)):
            figures[f"model-difference.{name}"] = bootstrap_mean(
                values.astype(float), groups, **settings, definition=f"rmg-{name}/1"
            )
        details = {s.id: {"answer": a, "difference": g} for s, a, g in zip(asked, alone, guesses, strict=True)}
        notes.append(f"greedy answers of {len(asked)} forget questions, at most {options.max_new_tokens} tokens")
    return Finding({"model-difference": scores}, figures, details, notes)
