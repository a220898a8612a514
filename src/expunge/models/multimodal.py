"""LLaVA-type models (Liu et al. 2023, arXiv 2304.08485): images are tokens in front of the prompt.

The language side is that of :class:`TextAdapter`; samples with and without an image may stand in one batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError
from expunge.models.classifier import KEEP_BYTES
from expunge.models.images import Preprocess
from expunge.models.text import Encoded, TextAdapter, causal_lm


@dataclass
class LlavaAdapter(TextAdapter):
    """Adapter for ``LlavaForConditionalGeneration``.

    Outside of chat templates, the image stands before the prompt as ``<image>`` and a line break (a document sample,
    such as a caption, has the image alone before it); ``<image>`` inside the prompt puts it there. The token is then
    repeated ``image_tokens`` times, once for each feature that the vision tower gives.
    """

    preprocess: Preprocess = field(default_factory=lambda: Preprocess(height=336, width=336))
    image_token: str = "<image>"
    image_token_id: int = 0
    image_tokens: int = 576
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # processor's JSON, kept as is

    modality: Modality = "multimodal"
    _pixels: dict[int, tuple[Any, np.ndarray]] = field(default_factory=dict, repr=False)

    # -- text ----------------------------------------------------------------------------------------------------

    @property
    def image_text(self) -> str:
        """What stands for an image in a text, before it is repeated."""
        return self.image_token

    @property
    def place(self) -> str:
        """What the author of a prompt writes where the image stands."""
        return self.image_token

    def tokens_of(self, sample: Sample) -> int:
        """How many tokens the sample's image takes."""
        return self.image_tokens

    def opening(self, sample: Sample) -> str:
        if sample.image is None or self.image_token in sample.prompt:
            return ""
        return self.image_text + ("\n" if sample.prompt else "")

    def content(self, sample: Sample) -> Any:
        text = sample.prompt.replace(self.image_text, "").replace(self.image_token, "").strip()
        image = [{"type": "image"}] if sample.image is not None else []
        return [*image, {"type": "text", "text": text}]

    def content_of_text(self, text: str) -> Any:
        return [{"type": "text", "text": text}]

    def texts(self, sample: Sample) -> tuple[str, str, bool]:
        before, after, special = super().texts(sample)
        if sample.prompt and not special:
            # LLaVA's chat template writes neither bos nor the eos after an answer; its processor adds the first,
            # its training data had both.
            bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
            after = after if eos in after else after.rstrip() + eos
            special = bool(bos) and not before.startswith(bos)
        return before, after, special

    def encode(self, sample: Sample) -> Encoded:
        if self.image_token in str(sample.target):
            raise UserError(f"the target of sample '{sample.id}' contains {self.image_token}: images stand in prompts.")
        return super().encode(sample)

    def expand(self, sample: Sample, ids: list[int], first: int, lead: int) -> tuple[list[int], int, int]:
        """Repeat the image token; everything up to its end is never cut.

        Raises:
            UserError: more or fewer image tokens than images, or no room for an image in the context.
        """
        places = [i for i, token in enumerate(ids) if token == self.image_token_id]
        wanted = 0 if sample.image is None else 1
        if len(places) != wanted:
            raise UserError(
                f"sample '{sample.id}' has {wanted} image(s) and {len(places)} {self.place} in its text: "
                f"give one {self.place} with an image and none without, or leave it out of the prompt."
            )
        if not places:
            return ids, first, lead
        at, count = places[0], self.tokens_of(sample)
        if at + count + 2 > self.context:
            raise UserError(f"an image takes {count} tokens and the context is {self.context}: raise --context.")
        longer = ids[:at] + [self.image_token_id] * count + ids[at + 1 :]
        return longer, first + count - 1, at + count

    # -- images --------------------------------------------------------------------------------------------------

    def extra_inputs(self, samples: Sequence[Sample], ids_BT: Tensor) -> dict[str, Tensor]:
        """``pixel_values`` (images, C, H, W) float32, in the order of the samples that have one."""
        rows = [self.pixels(s) for s in samples if s.image is not None]
        return {"pixel_values": self.preprocess.tensor(np.stack(rows))} if rows else {}

    def pixels(self, sample: Sample) -> np.ndarray:
        """The resized image, (H, W, C) uint8; small ones are kept."""
        key = id(sample.image)
        if key in self._pixels and self._pixels[key][0] is sample.image:
            return self._pixels[key][1]
        pixels = self.preprocess.pixels(sample)
        if pixels.nbytes <= KEEP_BYTES:
            self._pixels[key] = (sample.image, pixels)
        return pixels

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers of the language model; the vision tower's are not among them."""
        inner = causal_lm(model)
        return list(inner.base_model.language_model.layers)

    def save(self, folder: Any) -> None:
        super().save(folder)
        files = {"preprocessor_config.json": self.preprocess.config(), **self.files}
        for name, content in files.items():
            text = json.dumps(content, indent=2, sort_keys=True)
            (Path(folder) / name).write_text(text + "\n", encoding="utf-8")


def image_token_count(config: Any) -> int:
    """Features per image: (side / patch)², plus one for the class token with the strategy "full"."""
    vision = config.vision_config
    side = int(vision.image_size) // int(vision.patch_size)
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return side * side + int(full)
