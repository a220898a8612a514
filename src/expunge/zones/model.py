"""A frozen base with a zone, as one transformers model: ``forward``, ``generate``, ``save_pretrained``.

Its logits are log-probabilities: the base's where no block is open, mixed with the zone's where one is. The base's
weights are ordinary parameters and are never changed here; a save whose base has been changed is refused.

Shape suffixes: B sequences, T positions of a pass, S positions so far, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from expunge.errors import UserError, unknown
from expunge.zones.router import Router
from expunge.zones.storage import digest_weights, save_zone
from expunge.zones.zone import Routes, Seen, Zone


class ZonedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """See the module's docstring. ``zone.blocks`` is what it knows beyond its base."""

    base_model_prefix = "base"
    whole_logits = True  # head(hidden) is the base's answer, not this model's
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, base: Any, zone: Zone | None = None) -> None:
        if zone is None:
            raise UserError("a zoned model is a base with a zone, not weights to start from: give its base instead.")
        super().__init__(base.config)
        self.base = base
        self.zone = zone
        self.generation_config = base.generation_config
        self.allowed: frozenset[str] | None = None
        self._about: list[str | None] | None = None
        self._router: Router | None = None
        self._router_version = -1
        self.eval()

    # -- what transformers asks of a model -----------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The decoder without its head, whose hidden states zones and attacks look at."""
        return self.base.base_model

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.base.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        found: nn.Module | None = self.base.get_output_embeddings()
        return found

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> Any:
        """The base's inputs, and the whole text so far, which routing reads."""
        inputs = self.base.prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **more)
        return {**inputs, "zone_ids": input_ids, "zone_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        zone_ids: Tensor | None = None,
        zone_mask: Tensor | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """One pass; arguments as of the base, and ``zone_ids``, ``zone_mask`` (B, S): the whole text so far.

        With a cache and without ``zone_ids`` the text is the one that this model has put into that cache.

        Raises:
            UserError: a cache that somebody else has filled, and no ``zone_ids``.
        """
        if isinstance(logits_to_keep, Tensor):
            raise UserError("a zoned model keeps the logits of the last positions: give logits_to_keep as a number.")
        more["return_dict"] = True
        out = self.base(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, output_hidden_states=True, logits_to_keep=logits_to_keep, **more,
        )  # fmt: skip
        given_BT = input_ids if input_ids is not None else self._tokens_of(inputs_embeds)
        ids_BS = self._text(given_BT, out.past_key_values, zone_ids)
        mask_BS = zone_mask if zone_mask is not None else attention_mask
        if mask_BS is None or mask_BS.shape != ids_BS.shape:
            mask_BS = torch.ones_like(ids_BS)
        log_probs_BTV = out.logits.float().log_softmax(-1)
        kept = log_probs_BTV.shape[1]
        routes = self.routes(ids_BS, mask_BS, kept)
        if routes.opened:
            hidden = out.hidden_states
            if hidden[0].shape[1] != kept:
                hidden = [h[:, -kept:] for h in hidden]
            log_probs_BTV = self.zone.adjust(Seen(self.base, ids_BS, mask_BS, hidden, log_probs_BTV, routes))
        loss = None
        if labels is not None:
            loss = nn.functional.nll_loss(
                log_probs_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=log_probs_BTV,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=out.attentions,
        )

    def _tokens_of(self, embeds_BTD: Tensor | None) -> Tensor:
        """Ids of embeddings that are rows of the table; -1 for others (a soft prompt)."""
        if embeds_BTD is None:
            raise UserError("a pass needs input_ids or inputs_embeds: give one of them.")
        embedding: Any = self.get_input_embeddings()
        table_VD = embedding.weight.detach()
        flat_ND = embeds_BTD.detach().flatten(0, 1).to(table_VD.dtype)
        distance_N, nearest_N = torch.cdist(flat_ND, table_VD).min(1)
        close_N = distance_N <= 1e-3 * flat_ND.norm(dim=1).clamp_min(1e-9)
        return torch.where(close_N, nearest_N, -1).view(embeds_BTD.shape[:2])

    def _text(self, given_BT: Tensor, cache: Any, zone_ids: Tensor | None) -> Tensor:
        total = int(cache.get_seq_length()) if cache is not None else given_BT.shape[1]
        if zone_ids is not None and zone_ids.shape[1] == total:
            ids_BS = zone_ids
        elif total == given_BT.shape[1]:
            ids_BS = given_BT
        else:
            before = getattr(cache, "zone_ids", None)
            if before is None or before.shape[0] != given_BT.shape[0] or before.shape[1] + given_BT.shape[1] != total:
                raise UserError(
                    "this cache does not say which text it holds, so the zone cannot tell whom it is about: give "
                    "zone_ids, the token ids of the whole text so far."
                )
            ids_BS = torch.cat([before, given_BT], dim=1)
        if cache is not None:
            cache.zone_ids = ids_BS
        return ids_BS

    # -- routing and access ------------------------------------------------------------------------------------------

    def routes(self, ids_BS: Tensor, mask_BS: Tensor, last: int) -> Routes:
        """Which block each of the last positions may read."""
        about = self._about
        if about is not None and len(about) != len(ids_BS):
            if len(ids_BS) % len(about):
                raise UserError(f"{len(about)} subjects were given for {len(ids_BS)} sequences: give one for each.")
            about = [who for who in about for _ in range(len(ids_BS) // len(about))]  # beams of one sequence
        return self.router().route(ids_BS, mask_BS, last, allowed=self.allowed, about=about)

    def router(self) -> Router:
        """The index over the zone's blocks, built anew after every change of them."""
        if self._router is None or self._router_version != self.zone.version:
            public = self.zone.public
            self._router = Router(
                public.arrays["idf"], public.arrays["gate"], public.constants["threshold"], public.constants["typical"]
            ).index(self.zone.blocks)
            self._router_version = self.zone.version
        return self._router

    def allow(self, subjects: Iterable[str] | None) -> Self:
        """Open only these subjects' blocks from now on; None for all. Returns the model itself.

        Raises:
            UserError: a subject that the zone does not have.
        """
        chosen = None if subjects is None else frozenset(subjects)
        for who in sorted(chosen or ()):
            if who not in self.zone.blocks:
                raise unknown("subject", who, self.zone.blocks)
        self.allowed = chosen
        return self

    @contextmanager
    def about(self, subjects: Sequence[str | None]) -> Iterator[Self]:
        """Within the block, sequence i of every pass is about ``subjects[i]``; None leaves it to the router."""
        before, self._about = self._about, list(subjects)
        try:
            yield self
        finally:
            self._about = before

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **more: Any) -> None:
        """The base as an ordinary model, and beside its files zone.json, zone.safetensors and the sealed blocks.

        Raises:
            UserError: the base's weights are not those that the zone was built on.
        """
        if digest_weights(self.base) != self.zone.base_digest:
            raise UserError(
                "the base of this zone has been changed since the zone was built, so its rows no longer fit: use a "
                "zone method, or unlearn the base alone."
            )
        self.base.save_pretrained(save_directory, **more)
        save_zone(self.zone, Path(save_directory))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *_: Any, **options: Any) -> ZonedModel:
        """The zoned model of a folder; ``options`` as of :func:`expunge.models.load.load_model`."""
        from expunge.models.load import load_model

        model = load_model(Path(folder), **options).model
        if not isinstance(model, ZonedModel):
            raise UserError(f"'{folder}' holds no zone: load it as an ordinary model.")
        return model
