"""In-context unlearning: forget examples with wrong answers, and right ones of retain, stand before every query.

The examples are a prefix that an attachment puts before whatever the model reads: their keys and values go into the
cache first, so that layers, hidden states and logits are those of the query alone. Weights stay as they were.

Shape suffixes: B samples, P tokens of the prefix, T tokens of the call, S tokens in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import name_of, words
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import evaluating
from expunge.models.attached import Attachment, attach
from expunge.models.text import causal_lm, same_logits
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class IcuOptions:
    """What stands before the query."""

    correct: int = option(6, "right examples of retain after the wrong ones", "ours: the paper tries a handful")
    share: float = option(0.5, "largest share of the context that the examples may take", "ours: half is for the query")

    def __post_init__(self) -> None:
        if self.correct < 0 or not 0 < self.share < 1:
            raise UserError(
                f"correct = {self.correct}, share = {self.share}: correct is 0 or more, and share above 0 and below 1."
            )


class Prefix(Attachment):
    """Tokens that the model has always read already. ``limit``: positions of the model, 0 if there is no limit."""

    kind = "prefix"

    def __init__(self, length: int, limit: int = 0) -> None:
        super().__init__()
        self.limit = limit
        self.own_cache = False
        self.ids_P: Tensor
        self.register_buffer("ids_P", torch.zeros(length, dtype=torch.long))

    def arguments(self) -> dict[str, Any]:
        return {"length": len(self.ids_P), "limit": self.limit}

    def install(self, model: Any) -> None:
        model.base_model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.base_model.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """The first call of a sequence gets a cache that holds the prefix; every call its mask and positions."""
        from transformers import DynamicCache

        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        read: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        rows, length = read.shape[:2]
        mask_BS, places_BT, cache = (given.get(k) for k in ("attention_mask", "position_ids", "past_key_values"))
        if mask_BS is not None and getattr(mask_BS, "ndim", 0) != 2:
            raise UserError("a prefix cannot stand before a call with a mask of its own shape: use a dynamic cache.")
        self.own_cache = cache is None
        if cache is None or cache.get_seq_length() == 0:
            cache = DynamicCache(config=module.config.get_text_config()) if cache is None else cache
            added = min(len(self.ids_P), max(0, self.limit - length)) if self.limit else len(self.ids_P)
            if added:  # through `forward`, so that this hook is not called again
                module.forward(input_ids=self.ids_P[:added].expand(rows, -1), past_key_values=cache, use_cache=True)
        else:
            added = len(self.ids_P) if mask_BS is None else cache.get_seq_length() - (mask_BS.shape[1] - length)
        if mask_BS is not None:
            mask_BS = torch.cat([mask_BS.new_ones(rows, added), mask_BS], 1)
        if places_BT is not None:
            places_BT = places_BT + added
            places_BT = places_BT.clamp_max(self.limit - 1) if self.limit else places_BT
        return (), given | {"attention_mask": mask_BS, "position_ids": places_BT, "past_key_values": cache}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """A cache that the caller did not ask for is not given back."""
        if self.own_cache and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None
        return output


@method(
    name="icu",
    options=IcuOptions,
    paper="Pawelczyk et al. 2023, arXiv:2310.07579, prompt of ICUL",
    formula="p_θ(· | f with wrong answers, r with right ones, query)",
    needs=frozenset({"retain"}),
    modalities=frozenset({"text"}),
    removes_from_weights=False,
    changes="beside",
)
def icu(context: Context, options: IcuOptions) -> Outcome:
    """Put forget examples with wrong answers before every query; a guard, whose weights still know everything.

    The paper writes a prefix for one query whose sample is to be forgotten; here one prefix stands before all queries,
    with as many forget samples as fit. It counts on a model that learns from examples in its context: a small one that
    has only ever read single samples forgets and keeps by accident. Every query costs the prefix's tokens more.
    """
    adapter: Any = context.adapter
    chosen, wrong = examples(context, options)
    prefix = [token for sample in chosen for token in adapter.encode(sample).ids]
    inner = causal_lm(context.model)
    text_config = inner.config.get_text_config()
    attachment = Prefix(len(prefix), int(getattr(text_config, "max_position_embeddings", 0) or 0))
    attachment.ids_P.copy_(torch.tensor(prefix))
    check(inner, adapter.encode(context.forget[0]).ids, attachment)
    attach(inner, attachment)
    notes = [
        f"the forget prompts and {len(chosen) - wrong} retain answers stand in a prefix that is kept with the model",
        f"every query is read after {len(prefix)} tokens of examples, which the cost does not count",
    ]
    if wrong < len(context.forget):
        notes.append(f"{wrong} of {len(context.forget)} forget samples stand in the prefix: the others do not fit")
    return Outcome(context.model, notes, {"wrong": wrong, "correct": len(chosen) - wrong, "tokens": len(prefix)})


def examples(context: Context, options: IcuOptions) -> tuple[list[Sample], int]:
    """The prefix's samples and how many of them have wrong answers, which come first.

    Raises:
        UserError: not even one forget sample fits.
    """
    adapter: Any = context.adapter
    rng = np.random.default_rng(context.seed)
    room = int(options.share * adapter.context)
    correct: list[Sample] = []
    for i in rng.permutation(len(context.retain))[: options.correct]:
        # At most half of the room: the wrong answers are what it is about.
        if sum(map(adapter.num_tokens, [*correct, context.retain[i]])) <= room // 2:
            correct.append(context.retain[i])
    room -= sum(map(adapter.num_tokens, correct))
    wrong: list[Sample] = []
    for i in rng.permutation(len(context.forget)):
        sample = flipped(context.forget[i], context.retain, rng)
        if (size := len(adapter.encode(sample).ids)) <= room:
            wrong.append(sample)
            room -= size
    if not wrong:
        raise UserError(
            f"no forget sample fits into {options.share:g} of a context of {adapter.context} tokens: raise share or "
            "--context."
        )
    return [*wrong, *correct], len(wrong)


def flipped(sample: Sample, retain: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """The sample with another answer: that of a retain sample whose question is most alike, with the name put in.

    Forget answers are never used, so that none of them stands in the prefix; if every answer is the sample's own, it
    is a refusal.
    """
    own = set(words(sample.prompt)) - set(words(name_of(sample)))

    def alike(other: Sample) -> float:
        asked = set(words(other.prompt)) - set(words(name_of(other)))
        return len(own & asked) / max(1, len(own | asked))

    answers: dict[str, float] = {}
    for other in retain:
        said = str(other.target)
        for theirs, mine in zip(other.names, sample.names, strict=False):
            said = said.replace(theirs, mine)
        if words(said) != words(str(sample.target)):
            answers[said] = max(answers.get(said, 0.0), alike(other))
    best = [said for said, near in answers.items() if near >= max(answers.values()) - 1e-9]
    pool = best or list(REFUSALS)
    return replace(sample, id=f"{sample.id}/wrong", target=pool[int(rng.integers(len(pool)))], probes=())


def check(inner: Any, query: Sequence[int], prefix: Prefix) -> None:
    """Raise UserError for a model that has no cache of keys and values in which a prefix could stand.

    The logits of a query after the prefix must be those of both read in one piece.
    """
    from transformers import DynamicCache

    device = next(inner.parameters()).device
    room = prefix.limit or len(query) + len(prefix.ids_P)
    head, rest = prefix.ids_P[: room // 2].to(device)[None], torch.tensor([query[: room // 2]], device=device)
    try:
        with evaluating(inner):
            whole = inner(input_ids=torch.cat([head, rest], 1), use_cache=False).logits[0, head.shape[1] :]
            cache = DynamicCache(config=inner.config.get_text_config())
            inner(input_ids=head, past_key_values=cache, use_cache=True)
            after = inner(input_ids=rest, past_key_values=cache, use_cache=True).logits[0]
        good = same_logits(whole.float(), after.float(), inner.dtype)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # each architecture fails in its own way
        good = False
    if not good:
        raise UserError(
            "this model keeps no cache of keys and values, where the examples would stand: use eco instead."
        )
