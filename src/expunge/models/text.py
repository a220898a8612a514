"""Causal language models: templates, tokens, target masks, generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Batch, Head, evaluating

PLAIN_TEMPLATE = "{prompt} {target}{eos}"
DOCUMENT_TEMPLATE = "{target}{eos}"
FIXED_DATE = "01 Jan 2026"  # chat templates that print today's date would change the data from day to day


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the index of the first target token."""

    ids: tuple[int, ...]
    first: int


@dataclass
class TextAdapter(Adapter):
    """Adapter for any Hugging Face causal language model.

    ``template``: "auto" uses the tokenizer's chat template when there is one and ``{prompt} {target}{eos}``
    otherwise; "chat" and "plain" force either; any string with ``{prompt}`` and ``{target}`` is taken as is.
    ``context``: longest sequence; longer samples are cut at the end and their ids kept in ``truncated``.
    """

    tokenizer: Any = None
    template: str = "auto"
    context: int = 1024
    whole_logits: bool = False
    _plain: bool = field(default=False, repr=False)

    can_generate: bool = True

    def __post_init__(self) -> None:
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if self.template == "chat" and not has_chat:
            raise UserError(
                "template 'chat' was asked for, but the tokenizer has none: use --template plain, or a string "
                "such as '{prompt} {target}{eos}'."
            )
        if self.template not in ("auto", "chat", "plain") and (
            "{prompt}" not in self.template or "{target}" not in self.template
        ):
            raise UserError(
                f"template '{self.template}' lacks {{prompt}} or {{target}}: use auto, chat, plain or a string "
                "such as '{prompt} {target}{eos}'."
            )
        self._plain = self.template == "plain" or (self.template == "auto" and not has_chat)

    # -- text to tokens ------------------------------------------------------------------------------------------

    def texts(self, sample: Sample) -> tuple[str, str, bool]:
        """(text before the target, target with what closes it, whether the tokenizer adds its special tokens)."""
        eos = self.tokenizer.eos_token or ""
        target = str(sample.target)
        if not sample.prompt:
            return "", target + eos, True
        if self._plain or self.template not in ("auto", "chat"):
            form = PLAIN_TEMPLATE if self._plain else self.template
            before, after = form.split("{target}", 1)
            before = before.replace("{prompt}", sample.prompt)
            # The space belongs to the answer: most tokenizers glue it to the following word.
            stripped = before.rstrip(" ")
            return stripped, before[len(stripped) :] + target + after.replace("{eos}", eos), True
        ask = [{"role": "user", "content": sample.prompt}]
        options = {"tokenize": False, "date_string": FIXED_DATE}
        before = self.tokenizer.apply_chat_template(ask, add_generation_prompt=True, **options)
        whole = self.tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": target}], **options)
        if not whole.startswith(before):
            raise UserError(
                "the chat template of this tokenizer rewrites the prompt once an answer follows, so the answer's "
                "tokens cannot be found: use --template plain."
            )
        return before, whole[len(before) :].rstrip("\n"), False

    def encode(self, sample: Sample) -> Encoded:
        before, after, special = self.texts(sample)
        coded = self.tokenizer(
            before + after, add_special_tokens=special, return_offsets_mapping=self.tokenizer.is_fast
        )
        ids = list(coded["input_ids"])
        if self.tokenizer.is_fast:
            # The first token that reaches past the prompt is the first target; special tokens have empty spans.
            starts = coded["offset_mapping"]
            first = next((i for i, (a, b) in enumerate(starts) if b > a and b > len(before)), len(ids))
        else:
            first = len(self.tokenizer(before, add_special_tokens=special)["input_ids"]) if before else 0
        eos = self.tokenizer.eos_token_id
        wants_eos = special and (not sample.prompt or self._plain or "{eos}" in self.template)
        if wants_eos and eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)  # a tokenizer that reads its eos string as plain text has written it as such
        first = max(first, 1)  # the first token of a sequence has nothing before it to be predicted from
        if len(ids) > self.context:
            self.truncated.add(sample.id)
            # A long prompt loses its beginning, so that the answer stays; a long answer loses its end.
            keep_prompt = max(1, self.context - (len(ids) - first))
            cut = max(0, first - keep_prompt)
            ids, first = ids[cut:][: self.context], first - cut
        return Encoded(tuple(ids), first)

    def num_tokens(self, sample: Sample) -> int:
        return len(self.cached(sample).ids)

    def num_targets(self, sample: Sample) -> int:
        coded: Encoded = self.cached(sample)
        return max(0, len(coded.ids) - coded.first)

    # -- batches and passes --------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Sample]) -> Batch:
        coded: list[Encoded] = [self.cached(s) for s in samples]
        longest = max(len(c.ids) for c in coded)
        pad = self.tokenizer.pad_token_id
        fill = pad if pad is not None else 0
        ids_BT = torch.full((len(coded), longest), fill, dtype=torch.long)
        # From lengths, never from `ids != pad`: pad is often eos, and real eos tokens must stay visible.
        mask_BT = torch.zeros_like(ids_BT)
        rows, cols, targets = [], [], []
        for row, c in enumerate(coded):
            ids_BT[row, : len(c.ids)] = torch.tensor(c.ids)
            mask_BT[row, : len(c.ids)] = 1
            span = range(c.first, len(c.ids))
            rows += [row] * len(span)
            cols += [t - 1 for t in span]
            targets += [c.ids[t] for t in span]
        return Batch(
            {"input_ids": ids_BT, "attention_mask": mask_BT},
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(rows, dtype=torch.long),
            torch.tensor(cols, dtype=torch.long),
            len(coded),
            ids_BT.numel(),
        )

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        inner = causal_lm(model)
        if self.whole_logits:
            logits_BTV = inner(**batch.inputs, use_cache=False).logits
            return logits_BTV[batch.sample_N, batch.cols_N], Head(nn.Identity())
        states_BTD = inner.base_model(**batch.inputs, use_cache=False).last_hidden_state
        return states_BTD[batch.sample_N, batch.cols_N], head_of(inner)

    def bind(self, model: nn.Module) -> TextAdapter:
        """Check that head(hidden) equals the model's own logits; where a model does more, use whole logits."""
        inner = causal_lm(model)
        device = next(model.parameters()).device
        ids = torch.arange(1, 6, device=device)[None] % int(inner.config.get_text_config().vocab_size)
        with evaluating(inner):
            own_TV = inner(input_ids=ids, use_cache=False).logits[0].float()
            states = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours_TV = head_of(inner)(states)
        same = own_TV.shape == ours_TV.shape and torch.allclose(own_TV, ours_TV, rtol=1e-2, atol=1e-2)
        self.whole_logits = not same
        return self

    def generate(self, model: nn.Module, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """Greedy continuations; prompts are padded on the left, with a mask."""
        texts: list[str] = [""] * len(samples)
        device = next(model.parameters()).device
        pad = self.tokenizer.pad_token_id
        fill = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        for group in self.batches(samples, max_tokens=8192):
            prompts = []
            for i in group:
                coded: Encoded = self.cached(samples[i])
                prompts.append(coded.ids[: coded.first][-max(1, self.context - max_new_tokens) :])
            longest = max(map(len, prompts))
            ids_BT = torch.full((len(group), longest), fill, dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for row, prompt in enumerate(prompts):
                ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            self.meter.tokens_forward += ids_BT.numel() + len(group) * max_new_tokens
            with evaluating(model):
                generator: Any = model
                out_BT = generator.generate(
                    input_ids=ids_BT.to(device),
                    attention_mask=mask_BT.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=fill,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
            for row, i in enumerate(group):
                texts[i] = self.tokenizer.decode(out_BT[row, longest:], skip_special_tokens=True).strip()
        return texts

    def save(self, folder: Any) -> None:
        self.tokenizer.save_pretrained(folder)


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside a LoRA wrapper (its layers carry the adapters), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(inner: Any) -> Head:
    """Output embeddings with the final scaling and soft-capping that some configurations ask for."""
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return Head(inner.get_output_embeddings(), softcap=softcap, scale=float(scale))
