"""Causal language models: templates, tokens, target masks, generation.

Shape suffixes: B samples, T tokens, N target positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Batch, Head, evaluating
from expunge.models.attached import attachments

PLAIN_TEMPLATE = "{prompt} {target}{eos}"
FIXED_DATE = "01 Jan 2026"  # chat templates that print today's date would change the data from day to day


# Plain greedy decoding, whatever generation settings a model ships with.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Encoded:
    """Token ids, the index of the first target token, the uncut prompt, and its leading ids that are never cut."""

    ids: tuple[int, ...]
    first: int
    prompt: tuple[int, ...] = ()
    keep: int = 0


@dataclass
class TextAdapter(Adapter):
    """Adapter for any Hugging Face causal language model.

    ``template``: "auto" uses the tokenizer's chat template when there is one and ``{prompt} {target}{eos}``
    otherwise; "chat" and "plain" force either; any string with ``{prompt}`` and ``{target}`` is taken as is.
    A sample without a prompt is a document: ``{target}{eos}``.
    ``context``: longest sequence. Of a longer sample the answer's end is cut, and the prompt's beginning, but the
    prompt keeps half of the context at least; the ids of such samples are kept in ``truncated``.
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
        own = self.template not in ("auto", "chat", "plain")
        if own and not 0 <= self.template.find("{prompt}") < self.template.find("{target}"):
            raise UserError(
                f"template '{self.template}' lacks {{prompt}} and, after it, {{target}}: use auto, chat, plain or a "
                "string such as '{prompt} {target}{eos}'."
            )
        if self.context < 2:
            raise UserError(f"context {self.context} is too short: a sample needs at least 2 tokens.")
        self._plain = self.template == "plain" or (self.template == "auto" and not has_chat)

    @property
    def pad_id(self) -> int:
        """The padding token; without one, eos; the attention mask hides it in any case."""
        tok = self.tokenizer
        return int(next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0))

    # -- text to tokens ------------------------------------------------------------------------------------------

    def texts(self, sample: Sample) -> tuple[str, str, bool]:
        """(text before the target, target with what closes it, whether the tokenizer adds its special tokens)."""
        eos = self.tokenizer.eos_token or ""
        target = str(sample.target)
        opening = self.opening(sample)
        if not sample.prompt:
            return opening, target + eos, True
        if self._plain or self.template not in ("auto", "chat"):
            form = PLAIN_TEMPLATE if self._plain else self.template
            before, after = form.split("{target}", 1)
            before = before.replace("{eos}", eos).replace("{prompt}", opening + sample.prompt)
            # The space belongs to the answer: most tokenizers glue it to the following word.
            stripped = before.rstrip(" ")
            return stripped, before[len(stripped) :] + target + after.replace("{eos}", eos), True
        ask = [{"role": "user", "content": self.content(sample)}]
        answer = {"role": "assistant", "content": self.content_of_text(target)}
        options = {"tokenize": False, "date_string": FIXED_DATE, "enable_thinking": False}
        before = self.tokenizer.apply_chat_template(ask, add_generation_prompt=True, **options)
        whole = self.tokenizer.apply_chat_template([*ask, answer], **options)
        if not whole.startswith(before):
            raise UserError(
                "the chat template of this tokenizer rewrites the prompt once an answer follows, so the answer's "
                "tokens cannot be found: use --template plain."
            )
        return before, whole[len(before) :].rstrip("\n"), False

    def opening(self, sample: Sample) -> str:
        """What stands before the prompt outside of chat templates (an image's place)."""
        return ""

    def content(self, sample: Sample) -> Any:
        """The user's turn as chat templates want it."""
        return sample.prompt

    def content_of_text(self, text: str) -> Any:
        """The assistant's turn as chat templates want it."""
        return text

    def encode(self, sample: Sample) -> Encoded:
        """Token ids and where the target begins.

        Raises:
            UserError: an image where the model sees none, or a class number for target: they would be dropped, or
                learnt as digits, in silence.
        """
        if sample.image is not None and self.modality == "text":
            raise UserError(
                f"sample '{sample.id}' has an image, and a text model sees none: give a vision-language model or a "
                "classifier, or data without images."
            )
        if isinstance(sample.target, int):
            raise UserError(
                f"the target of sample '{sample.id}' is the class number {sample.target}, and a {self.modality} model "
                "answers in texts: give a classifier, or texts for targets."
            )
        before, after, special = self.texts(sample)
        wants_eos = special and (not sample.prompt or self._plain or self.template.endswith("{eos}"))
        ids, first, whole_start = self.split(before, after, special)
        eos = self.tokenizer.eos_token_id
        if wants_eos and eos is not None:
            while len(ids) > 1 and ids[-1] == ids[-2] == eos:
                ids.pop()  # the template has written eos and the tokenizer has added its own
            if not ids or ids[-1] != eos:
                ids.append(eos)  # a tokenizer that reads its eos string as plain text has written it as such
        ids, first, keep = self.expand(sample, ids, first, whole_start)
        first = max(first, 1)  # the first token of a sequence has nothing before it to be predicted from
        prompt = tuple(ids[:first])
        if len(ids) > self.context:
            self.truncated.add(sample.id)
            room = max(self.context - (len(ids) - first), min(first, self.context // 2), keep + 1)
            start = cut_middle(list(prompt), room, keep)
            ids, first = (start + ids[first:])[: self.context], len(start)
        return Encoded(tuple(ids), first, prompt, keep)

    def split(self, before: str, after: str, special: bool) -> tuple[list[int], int, int]:
        """(ids of ``before + after``, index of the first id that reaches into ``after``, leading special ids).

        The two are tokenized together, as the model will see them; a token across the border belongs to the target.
        """
        tok = self.tokenizer
        lead = 0
        if tok.is_fast:
            coded = tok(before + after, add_special_tokens=special, return_offsets_mapping=True)
            ids = list(coded["input_ids"])
            # Special tokens that the tokenizer adds have empty spans; the text's own tokens never have.
            first = next((i for i, (a, b) in enumerate(coded["offset_mapping"]) if b > a and b > len(before)), len(ids))
        else:
            ids = list(tok(before + after, add_special_tokens=special)["input_ids"])
            alone = list(tok(before, add_special_tokens=special)["input_ids"])
            # The longest common beginning: `alone` may end in its own eos, or in a token that merges with the answer.
            first = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))
        if ids and ids[0] == tok.bos_token_id:
            lead = 1
        if not before:
            first = lead
        return ids, first, lead

    def expand(self, sample: Sample, ids: list[int], first: int, lead: int) -> tuple[list[int], int, int]:
        """Put in what stands for more than one token; the last number is how many leading ids may never be cut."""
        return ids, first, lead

    def num_tokens(self, sample: Sample) -> int:
        return len(self.cached(sample).ids)

    def num_targets(self, sample: Sample) -> int:
        coded: Encoded = self.cached(sample)
        return max(0, len(coded.ids) - coded.first)

    # -- batches and passes --------------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Sample]) -> Batch:
        coded: list[Encoded] = [self.cached(s) for s in samples]
        longest = max(len(c.ids) for c in coded)
        ids_BT = torch.full((len(coded), longest), self.pad_id, dtype=torch.long)
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
            {"input_ids": ids_BT, "attention_mask": mask_BT, **self.extra_inputs(samples, ids_BT)},
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(rows, dtype=torch.long),
            torch.tensor(cols, dtype=torch.long),
            len(coded),
            ids_BT.numel(),
        )

    def extra_inputs(self, samples: Sequence[Sample], ids_BT: Tensor) -> dict[str, Tensor]:
        """Model inputs beside the tokens (pixels); ``ids_BT`` are the samples' tokens as padded."""
        return {}

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        inner = causal_lm(model)
        for attachment in attachments(inner):
            attachment.see(batch)
        if self.whole_logits or getattr(inner, "whole_logits", False):  # a model may know that it does more
            logits_BTV = inner(**batch.inputs, use_cache=False).logits
            return logits_BTV[batch.sample_N, batch.cols_N], Head(nn.Identity())
        states_BTD = inner.base_model(**batch.inputs, use_cache=False).last_hidden_state
        return states_BTD[batch.sample_N, batch.cols_N], head_of(inner)

    def bind(self, model: nn.Module) -> Self:
        """Check that head(hidden) equals the model's own logits; where a model does more, use whole logits."""
        inner = causal_lm(model)
        device = next(model.parameters()).device
        ids = torch.arange(1, 6, device=device)[None] % int(inner.config.get_text_config().vocab_size)
        ids[ids == getattr(inner.config, "image_token_id", None)] = 0
        with evaluating(inner):
            own_TV = inner(input_ids=ids, use_cache=False).logits[0].float()
            states = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours_TV = head_of(inner)(states) if inner.get_output_embeddings() is not None else states
        self.whole_logits = not same_logits(own_TV, ours_TV, inner.dtype)
        return self

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, input side first."""
        inner = causal_lm(model)
        layers = int(getattr(inner.config.get_text_config(), "num_hidden_layers", 0))
        for module in inner.modules():
            # The first list of that length: lists inside a layer (experts) come later.
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                return list(module)
        return super().blocks(model)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(self, model: nn.Module, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """Greedy continuations; prompts are padded on the left, with a mask."""
        texts: list[str] = [""] * len(samples)
        device = next(model.parameters()).device
        generator: Any = model
        stops = stop_ids(self.tokenizer, causal_lm(model))
        for group in self.batches(samples, max_tokens=8192):
            prompts = [self.prompt_ids(samples[i], max_new_tokens) for i in group]
            longest = max(map(len, prompts))
            ids_BT = torch.full((len(group), longest), self.pad_id, dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for row, prompt in enumerate(prompts):
                ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            extra = self.extra_inputs([samples[i] for i in group], ids_BT)
            with evaluating(model):
                out_BT = generator.generate(
                    input_ids=ids_BT.to(device),
                    attention_mask=mask_BT.to(device),
                    **{k: v.to(device) for k, v in extra.items()},
                    max_new_tokens=max_new_tokens,
                    **GREEDY,
                    pad_token_id=self.pad_id,
                    eos_token_id=stops or None,
                )
                self.meter.count(model, out_BT.numel())
            for row, i in enumerate(group):
                new = out_BT[row, longest:].tolist()
                end = next((t for t, token in enumerate(new) if token in stops), len(new))
                texts[i] = self.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
        return texts

    def prompt_ids(self, sample: Sample, max_new_tokens: int) -> list[int]:
        """What generation starts from; a prompt that leaves no room for the answer loses its beginning."""
        coded: Encoded = self.cached(sample)
        return cut_middle(list(coded.prompt), max(coded.keep + 1, self.context - max_new_tokens), coded.keep)

    def save(self, folder: Any) -> None:
        self.tokenizer.save_pretrained(folder)


def cut_middle(ids: list[int], room: int, keep: int) -> list[int]:
    """At most ``room`` ids: the first ``keep`` of them (bos, image), then the last ones.

    >>> cut_middle([1, 2, 3, 4, 5], 3, 1)
    [1, 4, 5]
    """
    if len(ids) <= room:
        return ids
    return ids[:keep] + ids[len(ids) - (room - keep) :]


def stop_ids(tokenizer: Any, inner: Any) -> list[int]:
    """End-of-sequence ids of tokenizer and model; chat models end turns with more than one token."""
    configured = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *listed) if i is not None})


def same_logits(own: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of ``dtype``, measured against the largest logit."""
    if own.shape != ours.shape:
        return False
    room = 1e-4 if dtype == torch.float32 else 3e-2
    return bool((own - ours).abs().max() <= room * own.abs().max().clamp_min(1e-6))


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model inside a LoRA wrapper (its layers carry the adapters), or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(inner: Any) -> Head:
    """Output embeddings with the final scaling and soft-capping that some configurations ask for."""
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    return Head(inner.get_output_embeddings(), softcap=softcap, scale=float(scale))
