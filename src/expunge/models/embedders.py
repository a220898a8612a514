"""Face embedders: image classifiers of transformers with an AM-softmax head, in ordinary folders.

``am_softmax_scale`` in config.json tells :func:`load_model` to build them; ``am_softmax_margin`` stands beside it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ResNetForImageClassification, ViTForImageClassification

from expunge.models.am_softmax import MARGIN, CosineHead
from expunge.models.small_resnet import shrink_stem


def _head(config: Any, width: int) -> CosineHead:
    margin = float(getattr(config, "am_softmax_margin", MARGIN))
    return CosineHead(width, config.num_labels, float(config.am_softmax_scale), margin)


class AmSoftmaxResNetForImageClassification(ResNetForImageClassification):  # type: ignore[misc]
    """The embedding is the mean over places of the last feature map."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "small_stem", False):
            shrink_stem(self)
        self.classifier = nn.Sequential(nn.Flatten(), _head(config, config.hidden_sizes[-1]))


class AmSoftmaxViTForImageClassification(ViTForImageClassification):  # type: ignore[misc]
    """The embedding is the class token after the last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = _head(config, config.hidden_size)


EMBEDDERS = {"resnet": AmSoftmaxResNetForImageClassification, "vit": AmSoftmaxViTForImageClassification}
