"""Adversarial compression: is there a prompt, shorter than the text itself, after which the model says it?

Schwarzschild et al. 2024, "Rethinking LLM memorization through the lens of adversarial compression" (arXiv
2404.15146), with the search of Zou et al. 2023 (GCG, arXiv 2307.15043). A found prompt is proof; a search that finds
none proves nothing, so it is reported as "not found" and never turned into a ratio.

Shape suffixes: B candidate prompts, X prompt tokens, L target tokens, T all tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.attacks.continuations import closing_ids, split_ids
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.leakage import chosen
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Batch, Positions, evaluating
from expunge.models.sampling import text_adapter
from expunge.models.text import TextAdapter, causal_lm
from expunge.options import option
from expunge.stats import clopper_pearson

START = 5  # prompt tokens of the first search, and added after a failure
SLOWER = 1.2  # a longer prompt gets that many times the steps
AT_MOST = 5  # times the length of the target: no longer prompt is tried


@dataclass(frozen=True)
class Target:
    """What a model has to be brought to say, and how prompts reach it."""

    model: nn.Module
    adapter: TextAdapter
    opening: tuple[int, ...]  # the tokenizer's first token, where it has one
    ids: tuple[int, ...]

    def positions(self, prompts_BX: Tensor, embeds: bool = False) -> tuple[Positions, Tensor]:
        """One pass over every prompt followed by the target; also the embedding outputs (B, T, D) when asked for."""
        device, count = next(self.model.parameters()).device, len(prompts_BX)
        opening_BO = torch.tensor([self.opening] * count, dtype=torch.long).reshape(count, -1)
        target_BL = torch.tensor([self.ids] * count, dtype=torch.long)
        ids_BT = torch.cat([opening_BO, prompts_BX.cpu(), target_BL], dim=1).to(device)
        length, wide = len(self.ids), ids_BT.shape[1]
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        states_BTD = torch.zeros(0, device=device)
        if embeds:
            # A leaf of its own: the gradient stops here and never reaches the model's parameters.
            states_BTD = causal_lm(self.model).get_input_embeddings()(ids_BT).detach().requires_grad_(True)
            inputs = {"inputs_embeds": states_BTD, "attention_mask": inputs["attention_mask"]}
        rows_N = torch.arange(count, device=device).repeat_interleave(length)
        cols_N = torch.arange(wide - length - 1, wide - 1, device=device).repeat(count)
        batch = Batch(inputs, target_BL.flatten().to(device), rows_N, cols_N, count, ids_BT.numel())
        self.adapter.meter.count(self.model, batch.num_tokens)
        hidden_ND, head = self.adapter.hidden_and_head(self.model, batch)
        return Positions(hidden_ND, batch.targets_N, batch.sample_N, count, head), states_BTD

    def losses(self, prompts_BX: Tensor) -> tuple[Tensor, Tensor]:
        """(mean negative log-likelihood (B,), whether greedy decoding gives the target (B,)) after each prompt."""
        with evaluating(self.model):
            positions, _ = self.positions(prompts_BX)
            numbers_N2 = positions.per_token(_loss_and_hit)
        by_sample_BL2 = numbers_N2.reshape(len(prompts_BX), len(self.ids), 2)
        return by_sample_BL2[..., 0].mean(1), by_sample_BL2[..., 1].all(1)

    def better_tokens(self, prompt_X: Tensor, top_k: int, banned: Sequence[int]) -> Tensor:
        """Per position the ``top_k`` tokens that lower the loss most to first order, (X, K)."""
        was_training = self.model.training
        self.model.eval()
        with torch.enable_grad():
            positions, embeds_BTD = self.positions(prompt_X[None], embeds=True)
            (gradient_BTD,) = torch.autograd.grad(-positions.log_prob_N().mean(), embeds_BTD)
        self.model.train(was_training)
        weight_VD = causal_lm(self.model).get_input_embeddings().weight.detach()
        start = len(self.opening)
        gain_XV = -(gradient_BTD[0, start : start + len(prompt_X)].float() @ weight_VD.float().T)
        gain_XV[:, list(banned)] = -math.inf
        best_XK: Tensor = gain_XV.topk(min(top_k, gain_XV.shape[1] - len(banned)), dim=1).indices.cpu()
        return best_XK


def _loss_and_hit(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    loss_C = logits_CV.logsumexp(1) - logits_CV.gather(1, targets_C[:, None])[:, 0]
    return torch.stack([loss_C, (logits_CV.argmax(1) == targets_C).float()], dim=1)


def search(
    target: Target,
    prompt_X: Tensor,
    *,
    steps: int,
    batch: int,
    top_k: int,
    banned: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor | None, int]:
    """(a prompt of the same length after which greedy decoding says the target or None, steps taken).

    Greedy coordinate gradient: of ``batch`` prompts that differ in one token, taken from the ``top_k`` best of each
    place, the one with the lowest loss is the next.
    """
    _, said_B = target.losses(prompt_X[None])
    if bool(said_B[0]):
        return prompt_X, 0
    for step in range(1, steps + 1):
        choices_XK = target.better_tokens(prompt_X, top_k, banned)
        places = torch.from_numpy(rng.integers(len(prompt_X), size=batch))
        columns = torch.from_numpy(rng.integers(choices_XK.shape[1], size=batch))
        tried_BX = prompt_X.repeat(batch, 1)
        tried_BX[torch.arange(batch), places] = choices_XK[places, columns]
        loss_B, said_B = target.losses(tried_BX)
        if bool(said_B.any()):
            return tried_BX[int(said_B.nonzero()[0, 0])], step
        prompt_X = tried_BX[int(loss_B.argmin())]
    return None, steps


def shortest_prompt(
    target: Target,
    *,
    steps: int,
    batch: int,
    top_k: int,
    longest: int,
    budget: int,
    banned: Sequence[int],
    allowed: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor | None, list[int]]:
    """(shortest prompt found or None, lengths tried): 5 tokens first, one less after a success, 5 more after a failure.

    Ends when the next length has been decided already, below 1, or above ``longest``, or when ``budget`` prompts were
    tried: the steps grow by a fifth with each failure, so that a long text would otherwise be searched for days.
    """
    found: Tensor | None = None
    tried: list[int] = []
    length, failed, left = min(START, longest), 0, budget // batch
    while left > 0 and failed < length <= longest and (found is None or length < len(found)):
        tried.append(length)
        if found is None:
            start_X = torch.from_numpy(rng.choice(np.array(allowed), size=length))
        else:  # what worked, without one token
            start_X = found[torch.from_numpy(np.sort(rng.permutation(len(found))[:length]))]
        allowance = min(steps, left)
        prompt_X, taken = search(target, start_X, steps=allowance, batch=batch, top_k=top_k, banned=banned, rng=rng)
        left -= taken
        if prompt_X is not None:
            found, length = prompt_X, len(prompt_X) - 1
        else:
            failed, length, steps = length, length + START, math.ceil(steps * SLOWER)
    return found, tried


@dataclass(frozen=True, kw_only=True)
class CompressionOptions:
    """How hard is searched, and on how many texts."""

    strings: int = option(3, "forget samples that are searched for, drawn by chance: each costs thousands of passes")
    steps: int = option(200, "steps of the first search", "Schwarzschild et al. 2024")
    batch: int = option(100, "prompts tried in each step", "Schwarzschild et al. 2024")
    top_k: int = option(250, "best tokens of each place", "Schwarzschild et al. 2024")
    budget: int = option(100_000, "most prompts tried for one text, over all lengths")
    suffix: int = option(50, "most tokens of a text that the model has to say; 0 takes all")


def target_of(checkpoint: Checkpoint, sample: Sample, suffix: int) -> Target:
    """The sample's answer (or its document from the start) as the model would have to say it."""
    adapter = text_adapter(checkpoint.adapter)
    tokenizer = adapter.tokenizer
    if sample.prompt:
        ids = split_ids(adapter, sample, 0, suffix)[1]
    else:
        ids = list(tokenizer(str(sample.target), add_special_tokens=False)["input_ids"])[: suffix or None]
    opening = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    return Target(checkpoint.model, adapter, tuple(opening), tuple(ids))


@attack(
    name="compression",
    family="extraction",
    tier="full",
    access="weights",
    paper="Schwarzschild et al. 2024, arXiv 2404.15146; Zou et al. 2023, arXiv 2307.15043",
    options=CompressionOptions,
    formula="|text| / |shortest prompt found| in tokens; memorized when above 1",
    passes=5000.0,
)
def compression(exam: Exam, checkpoint: Checkpoint, options: CompressionOptions) -> Finding:
    """The shortest prompt that makes the model say a text, searched with the gradient, on a few texts.

    ``compression`` is 1 when a prompt shorter than the text was found, else 0; ``compression.ratio`` exists only
    where a prompt was found at all. Any model can be brought to say anything by a prompt that is long enough, so the
    reference is searched in the same way as a control.
    """
    if min(options.strings, options.steps, options.batch, options.top_k) < 1 or options.suffix < 0:
        raise UserError("compression needs strings, steps, batch and top_k of at least 1 and a suffix of 0 or more.")
    if options.budget < options.batch:
        raise UserError(f"a budget of {options.budget} prompts is less than one batch of {options.batch}: raise it.")
    adapter = text_adapter(checkpoint.adapter)
    vocab = causal_lm(checkpoint.model).get_input_embeddings().weight.shape[0]
    known = len(adapter.tokenizer)
    special = closing_ids(adapter) | ({adapter.tokenizer.unk_token_id} - {None})
    banned = sorted(special | set(range(known, vocab)))
    allowed = sorted(set(range(vocab)) - set(banned))
    memorized, ratio = [math.nan] * len(exam.forget), [math.nan] * len(exam.forget)
    details: dict[str, Mapping[str, Any]] = {}
    for place in chosen(exam, options.strings, "compression"):
        sample = exam.forget[place]
        target = target_of(checkpoint, sample, options.suffix)
        longest = min(AT_MOST * len(target.ids), adapter.context - len(target.ids) - len(target.opening))
        if longest < 1 or len(target.opening) + longest < 1 or not target.ids:
            continue
        found, tried = shortest_prompt(
            target, steps=options.steps, batch=options.batch, top_k=options.top_k, longest=longest,
            budget=options.budget, banned=banned, allowed=allowed, rng=exam.rng("compression", sample.id),
        )  # fmt: skip
        memorized[place] = 0.0 if found is None else float(len(found) < len(target.ids))
        detail: dict[str, Any] = {"text_tokens": len(target.ids), "lengths_tried": tried, "found": found is not None}
        if found is not None:
            ratio[place] = len(target.ids) / len(found)
            detail |= {"prompt": adapter.tokenizer.decode(found.tolist()), "ratio": ratio[place]}
        details[sample.id] = detail
    searched = [m for m in memorized if not math.isnan(m)]
    share = clopper_pearson(
        int(sum(searched)), len(searched), level=exam.level,
        definition=f"acr/1 steps={options.steps} batch={options.batch} top_k={options.top_k}",
    )  # fmt: skip
    missing = sum(math.isnan(r) for r, m in zip(ratio, memorized, strict=True) if not math.isnan(m))
    note = (
        f"searched for {len(searched)} of {len(exam.forget)} forget texts; for {missing} no prompt was found up to "
        f"{AT_MOST} times the text's length or within {options.budget} tries, which does not show that there is none"
    )
    return Finding(
        {"compression": {"forget": memorized}, "compression.ratio": {"forget": ratio}},
        {"compression.memorized.forget": share},
        details,
        (note,),
    )
