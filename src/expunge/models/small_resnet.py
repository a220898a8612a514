"""ResNet for small images, which the usual stem would shrink to nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ResNetForImageClassification


class SmallResNetForImageClassification(ResNetForImageClassification):  # type: ignore[misc]
    """ResNet (He et al. 2015) with the stem of its CIFAR form: one 3 x 3 convolution, no pooling.

    The usual stem divides the sides by 4, which leaves nothing of a 28-pixel image. ``small_stem`` in config.json
    tells :func:`load_model` to build this class.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shrink_stem(self)


def shrink_stem(model: Any) -> None:
    """Give a ResNet of transformers the small stem in place, with weights drawn as the model draws its others."""
    config, stem = model.config, model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    model.post_init()
