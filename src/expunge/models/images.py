"""Images to model inputs in NumPy and Pillow: resize, crop, normalise, as a preprocessor_config.json says.

Shape suffixes: H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from expunge.data.pictures import MOST_PIXELS, on_white, read_picture
from expunge.data.samples import Sample
from expunge.errors import UserError

P = TypeVar("P")
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, which configurations use


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Shortest side to ``edge`` and centre crop when ``edge`` is set, otherwise straight to (height, width).

    An image of the right size and no ``edge`` is left as it is, bit for bit. Without ``resize`` another size is
    refused. ``raw`` is the configuration that this was read from; it is written back unchanged.
    """

    height: int
    width: int
    channels: int = 3
    edge: int | None = None
    resize: bool = True
    resample: int = BILINEAR
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    scale: float = 1 / 255
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        counts = {len(self.mean), len(self.std)}
        numbers = (*self.mean, *self.std, self.scale)
        sound = min(self.height, self.width, self.edge or 1) > 0 and counts <= {1, self.channels}
        if not (sound and all(map(math.isfinite, numbers)) and min(self.std) > 0 and self.resample in range(6)):
            raise UserError(
                f"preprocessor_config.json does not fit the model: allowed are sides above 0, 1 or {self.channels} "
                "finite numbers for image_mean and, above 0, for image_std, and 0 to 5 for resample."
            )

    @classmethod
    def read(cls, config: Mapping[str, Any], *, size: int, channels: int) -> Preprocess:
        """From a preprocessor_config.json; ``size`` and ``channels`` are the model's own where it says nothing.

        Raises:
            UserError: a value of the wrong type, or one that fits no model or not this one.
        """
        return understood(lambda given: cls._read(given, size, channels), config)

    @classmethod
    def _read(cls, config: Mapping[str, Any], size: int, channels: int) -> Preprocess:
        given = config.get("size", size)
        crop = config.get("crop_size", given) if config.get("do_center_crop") else None
        edge = None
        if isinstance(given, Mapping) and "shortest_edge" in given:
            edge = int(given["shortest_edge"])
            height = width = edge
            if crop is not None and crop is not given:
                height, width = _sides(crop, edge)
            elif "crop_pct" in config or str(config.get("image_processor_type", "")).startswith("ConvNext"):
                # ConvNeXt's rule (also ResNet's): below 384, resize a little larger and crop; from 384 on, squash.
                share = float(config.get("crop_pct") or 224 / 256)
                edge = int(edge / share) if edge < 384 else None
            elif crop is None:
                raise UserError(
                    "preprocessor_config.json gives a shortest edge without a crop, which leaves images of unequal "
                    "sizes: set do_center_crop and crop_size."
                )
        else:
            height, width = _sides(given, size)
            if crop is not None and crop is not given and _sides(crop, size) != (height, width):
                raise UserError("preprocessor_config.json crops after a fixed resize, which is not supported.")
        resize = config.get("do_resize") is not False or edge is not None
        if not resize:
            height, width = _sides(given, size)
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        plain = config.get("do_normalize", True) is False
        return cls(
            height=height,
            width=width,
            channels=channels,
            edge=edge,
            resize=resize,
            resample=int(config.get("resample", BILINEAR)),
            mean=(0.0,) if plain else _constants(config.get("image_mean", 0.5)),
            std=(1.0,) if plain else _constants(config.get("image_std", 0.5)),
            scale=scale,
            raw=dict(config),
        )

    def config(self) -> dict[str, Any]:
        """A preprocessor_config.json that transformers reads."""
        if self.raw:
            return dict(self.raw)
        out: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor" if self.edge else "ViTImageProcessor",
            "do_resize": self.resize,
            "size": {"shortest_edge": self.edge} if self.edge else {"height": self.height, "width": self.width},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.edge:
            out |= {"do_center_crop": True, "crop_size": {"height": self.height, "width": self.width}}
        return out

    def pixels(self, sample: Sample) -> np.ndarray:
        """The sample's image, resized: (H, W, C) uint8.

        Raises:
            UserError: no image, a file that cannot be read (see :func:`read_picture`), an array that is not
                (H, W[, C]) uint8, another size where nothing is resized, or a strip too long to be resized.
        """
        from PIL import Image

        array = read_image(sample)
        mode = "L" if self.channels == 1 else "RGB"
        right_size = self.edge is None and array.shape[:2] == (self.height, self.width)
        if right_size and array.shape[2] == self.channels:
            return array
        if not (right_size or self.resize):
            raise UserError(
                f"the image of sample '{sample.id}' is {array.shape[0]} x {array.shape[1]}, and this model reads "
                f"{self.height} x {self.width} without resizing: give data of the size that it was trained on."
            )
        flat = array[:, :, 0] if array.shape[2] == 1 else array
        image = Image.fromarray(np.ascontiguousarray(flat)).convert(mode)
        if self.edge is None:
            image = image.resize((self.width, self.height), resample=self.resample)
        else:
            short = min(image.size)
            sides = [self.edge if s == short else int(self.edge * s / short) for s in image.size]
            if sides[0] * sides[1] > MOST_PIXELS:
                raise UserError(
                    f"the image of sample '{sample.id}' is a strip of {image.size[0]} x {image.size[1]}, which would "
                    f"grow to {sides[0]} x {sides[1]}: cut it."
                )
            image = image.resize((sides[0], sides[1]), resample=self.resample)
            left, top = (sides[0] - self.width) // 2, (sides[1] - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        out = np.asarray(image)
        return out[:, :, None] if out.ndim == 2 else out

    def tensor(self, pixels_BHWC: np.ndarray) -> Tensor:
        """Scaled and normalised: (B, C, H, W) float32."""
        scaled = pixels_BHWC.astype(np.float32) * np.float32(self.scale)
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(0, 3, 1, 2)))

    @property
    def patches(self) -> int:
        """16 x 16 pixel patches: the unit in which image batches are sized."""
        return math.ceil(self.height / 16) * math.ceil(self.width / 16)


def understood(read: Callable[[Mapping[str, Any]], P], config: Mapping[str, Any]) -> P:
    """``read`` of a preprocessor_config.json without its nulls, which stand for what is not said.

    Raises:
        UserError: what :func:`read` finds wrong, or a value of a type that it cannot use.
    """
    try:
        return read({key: value for key, value in config.items() if value is not None})
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"preprocessor_config.json has a value of the wrong type ({error}): copy the file that the model came with."
        ) from error


def _sides(size: Any, default: int) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size.get("height", default)), int(size.get("width", default))
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _constants(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),)


def read_image(sample: Sample) -> np.ndarray:
    """The sample's image as it was given, (H, W, C) uint8, transparency on white.

    Raises:
        UserError: no image, a file that cannot be read, or an array of another form.
    """
    image = sample.image
    if image is None:
        raise UserError(
            f"sample '{sample.id}' has no image: an image model needs one, as a file or an (H, W, C) array."
        )
    if not isinstance(image, np.ndarray):
        return read_picture(Path(image), f"'{image}' of sample '{sample.id}'")
    array = image[:, :, None] if image.ndim == 2 else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"the image of sample '{sample.id}' is {image.dtype} of shape {image.shape}: allowed is uint8 of shape "
            "(H, W), or (H, W, C) with 1, 3 or 4 channels."
        )
    return on_white(array) if array.shape[2] == 4 else array
