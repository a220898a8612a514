"""Qwen2-VL and Qwen2.5-VL: images of any size, cut into patches and numbered by us, so that no torchvision is needed.

An image keeps its shape: both sides become multiples of patch x merge, and its tokens are rows x columns / merge² of
them (Wang et al. 2024, arXiv 2409.12191, section 2.1). Shape suffixes: B samples, T tokens, H height, W width,
P patches of the batch, F numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.images import BICUBIC, Preprocess, read_image, understood
from expunge.models.multimodal import LlavaAdapter

PLACE = "<image>"  # what marks an image's place in a prompt, whatever the model calls it
LONGEST_STRIP = 200  # times that the longer side may be of the shorter one
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class PatchPreprocess(Preprocess):
    """Sides to multiples of ``patch * merge``, pixels between ``least`` and ``most``; ``height`` and ``width`` are the
    sides of a patch. A still image stands in each of ``temporal`` frames.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    least: int = 56 * 56
    most: int = 28 * 28 * 1280
    resample: int = BICUBIC

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.least <= self.most:
            raise UserError(
                f"preprocessor_config.json allows images of {self.least} to {self.most} pixels: give the smaller first."
            )

    @classmethod
    def of(cls, config: Mapping[str, Any], vision: Any) -> Self:
        """From a preprocessor_config.json (empty: the model family's defaults) and the model's vision configuration.

        Raises:
            UserError: the file cuts images into other patches than the model takes, or has values of wrong types.
        """
        return understood(lambda given: cls._of(given, vision), config)

    @classmethod
    def _of(cls, config: Mapping[str, Any], vision: Any) -> Self:
        sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        sizes["temporal_patch_size"] = vision.temporal_patch_size
        for name, own in sizes.items():
            if int(config.get(name, own)) != int(own):
                raise UserError(
                    f"preprocessor_config.json has {name} {config[name]} and the model {own}: image tokens would not "
                    "match the image; copy the file that belongs to the model."
                )
        size = config.get("size") or {}
        return cls(
            height=int(vision.patch_size),
            width=int(vision.patch_size),
            patch=int(vision.patch_size),
            merge=int(vision.spatial_merge_size),
            temporal=int(vision.temporal_patch_size),
            least=int(config.get("min_pixels") or size.get("shortest_edge") or cls.least),
            most=int(config.get("max_pixels") or size.get("longest_edge") or cls.most),
            resample=int(config.get("resample", BICUBIC)),
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            scale=float(config.get("rescale_factor", 1 / 255)),
            raw=dict(config),
        )

    def config(self) -> dict[str, Any]:
        """A preprocessor_config.json that transformers reads."""
        return dict(self.raw) or {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": self.least, "longest_edge": self.most},
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.temporal,
            "resample": self.resample,
            "rescale_factor": self.scale,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that an image of these sides is resized to."""
        unit = self.patch * self.merge
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif rows * columns * unit**2 < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
        return rows * unit, columns * unit

    def pixels(self, sample: Sample) -> np.ndarray:
        """The sample's image, resized: (H, W, 3) uint8.

        Raises:
            UserError: no readable image, or a strip.
        """
        height, width = read_image(sample).shape[:2]
        if max(height, width) > LONGEST_STRIP * min(height, width):
            raise UserError(
                f"the image of sample '{sample.id}' is a strip of {width} x {height}: one side may be at most "
                f"{LONGEST_STRIP} times the other; cut it."
            )
        height, width = self.sides(height, width)
        return Preprocess(height=height, width=width, resample=self.resample).pixels(sample)

    def patches_PF(self, pixels_HWC: np.ndarray) -> Tensor:
        """Patches in the order of their tokens, merge x merge of a token together; F = (colour, frame, y, x)."""
        image_CHW = self.tensor(pixels_HWC[None])[0]
        channels, height, width = image_CHW.shape
        p, m = self.patch, self.merge
        cut = image_CHW.view(channels, height // (p * m), m, p, width // (p * m), m, p)
        ordered = cut.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        frames = ordered.expand(*ordered.shape[:5], self.temporal, p, p)
        return frames.reshape(height // p * (width // p), channels * self.temporal * p * p)


@dataclass
class Qwen2VLAdapter(LlavaAdapter):
    """Adapter for ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    As :class:`LlavaAdapter`, with two differences: an image takes as many tokens as its size asks for, and it stands
    between two marks. ``<image>`` in a prompt puts it there.
    """

    preprocess: PatchPreprocess = field(default_factory=lambda: PatchPreprocess(height=14, width=14))
    image_token: str = "<|image_pad|>"
    marks: tuple[str, str] = ("<|vision_start|>", "<|vision_end|>")

    @property
    def image_text(self) -> str:
        return self.marks[0] + self.image_token + self.marks[1]

    @property
    def place(self) -> str:
        return PLACE

    def texts(self, sample: Sample) -> tuple[str, str, bool]:
        return super().texts(replace(sample, prompt=sample.prompt.replace(PLACE, self.image_text)))

    def tokens_of(self, sample: Sample) -> int:
        height, width = self.pixels(sample).shape[:2]
        return int(height * width) // (self.preprocess.patch * self.preprocess.merge) ** 2

    def expand(self, sample: Sample, ids: list[int], first: int, lead: int) -> tuple[list[int], int, int]:
        ids, first, keep = super().expand(sample, ids, first, lead)
        return ids, first, keep + (sample.image is not None)  # the mark behind an image is never cut from it

    def extra_inputs(self, samples: Sequence[Sample], ids_BT: Tensor) -> dict[str, Tensor]:
        """``pixel_values`` (P, F) float32 of all images one after another, ``image_grid_thw`` (images, 3), and
        ``mm_token_type_ids`` (B, T), 1 where an image stands; nothing for texts alone."""
        shown = [self.pixels(s) for s in samples if s.image is not None]
        if not shown:
            return {}
        patch = self.preprocess.patch
        return {
            "pixel_values": torch.cat([self.preprocess.patches_PF(pixels_HWC) for pixels_HWC in shown]),
            "image_grid_thw": torch.tensor([(1, p.shape[0] // patch, p.shape[1] // patch) for p in shown]),
            "mm_token_type_ids": (ids_BT == self.image_token_id).long(),
        }
