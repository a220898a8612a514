"""Fully connected classifier, for feature vectors: to the rest of the house, pictures of one row of pixels.

Shape suffixes: B samples, T places (one), D width, V classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from expunge.models.folder import MLP_TYPE


class MlpConfig(PreTrainedConfig):  # type: ignore[misc]
    """``image_size`` is (H, W): (1, D) for vectors of D features.

    Tanh between layers that shrink to the classes is the network of Shokri et al. 2017 (arXiv 1610.05820) for Purchase,
    Texas and Location; IAM (arXiv 2506.06112) has 1024, 512, 256, 128.
    """

    model_type = MLP_TYPE
    num_channels: int = 1
    image_size: Sequence[int] = (1, 600)
    hidden_sizes: Sequence[int] = (128, 64)
    hidden_act: str = "tanh"


class MlpBlock(nn.Module):
    """Linear layer and activation."""

    def __init__(self, inputs: int, outputs: int, act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.act = ACT2FN[act]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out: Tensor = self.act(self.dense(hidden_BTD))
        return out


class MlpForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """``pixel_values`` (B, C, H, W) flattened, blocks, linear head."""

    config_class = MlpConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        widths = [config.num_channels * height * width, *config.hidden_sizes]
        self.blocks = nn.ModuleList(MlpBlock(a, b, config.hidden_act) for a, b in itertools.pairwise(widths))
        self.classifier = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)  # Glorot and Bengio 2010, made for tanh
            initialization.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        hidden_BTD = pixel_values.flatten(1)[:, None]  # one place, as methods that read blocks expect places
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        logits_BV = self.classifier(hidden_BTD[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits_BV, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits_BV)


# So that AutoModelForImageClassification builds it from a folder, as load_model does with every classifier.
AutoConfig.register(MLP_TYPE, MlpConfig, exist_ok=True)
AutoModelForImageClassification.register(MlpConfig, MlpForImageClassification, exist_ok=True)
