"""Small models built from nothing, with their own tokenizer: ``--init tiny``.

They train in seconds to minutes on two CPU cores, and are ordinary Hugging Face models otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError, unknown
from expunge.models.am_softmax import MARGIN, SCALE
from expunge.models.classifier import ClassifierAdapter
from expunge.models.images import BICUBIC, Preprocess
from expunge.models.load import Loaded
from expunge.models.multimodal import LlavaAdapter, image_token_count
from expunge.models.qwen2vl import PatchPreprocess, Qwen2VLAdapter
from expunge.models.small_resnet import SmallResNetForImageClassification
from expunge.models.text import TextAdapter

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
Arch = Literal["resnet", "vit", "mlp", "resnet-am-softmax", "vit-am-softmax"]
ARCHS: tuple[Arch, ...] = get_args(Arch)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A Llama of some size; ``vocab`` is the most that the tokenizer may learn."""

    width: int
    inner: int
    layers: int
    heads: int
    vocab: int
    context: int = 512


PRESETS = {
    "tiny-test": Preset(width=16, inner=48, layers=2, heads=2, vocab=300, context=256),  # about 11,000 parameters
    "tiny": Preset(width=96, inner=256, layers=2, heads=4, vocab=1000),  # about 0.32 million
    "small": Preset(width=128, inner=320, layers=3, heads=4, vocab=1500),  # about 0.76 million
}


# What --init can name beside a size, by modality, and what it is.
KINDS: dict[Modality, dict[str, str]] = {
    "text": {},
    "classifier": {
        "resnet": "untrained ResNet for small images",
        "vit": "untrained vision transformer",
        "mlp": "untrained perceptron for feature vectors",
        "resnet-am-softmax": "untrained ResNet that embeds faces: classes by angle, with a margin (AM-softmax)",
        "vit-am-softmax": "untrained vision transformer that embeds faces (AM-softmax)",
    },
    "multimodal": {
        "llava": "untrained LLaVA: a small CLIP tower before a Llama",
        "qwen2vl": "untrained Qwen2-VL",
    },
}

SEEING = Preset(width=64, inner=128, layers=2, heads=4, vocab=400)  # the language model of those that see


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and outside as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train_tokenizer(texts: Sequence[str], vocab: int, special: Sequence[str] = ()) -> Any:
    """Byte-level BPE on the texts: every string can be written, and the same texts give the same tokenizer.

    Special tokens are bos, eos and pad (three different ones), then ``special``. Sequences begin with bos.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = [PAD, BOS, EOS, *special]
    tokenizer = Tokenizer(models.BPE())
    # The binding's properties are assigned; its type stubs know them as such.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab, len(names) + len(alphabet)),
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, names.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _texts(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        raise UserError("a tiny model needs samples, from whose texts its tokenizer is made: none were given.")
    return [f"{s.prompt} {s.target}" if s.prompt else str(s.target) for s in samples]


def _ids(tokenizer: Any) -> dict[str, int]:
    return {f"{k}_token_id": int(getattr(tokenizer, f"{k}_token_id")) for k in ("bos", "eos", "pad")}


def _llama(preset: Preset, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": preset.width,
        "intermediate_size": preset.inner,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.heads,
        "max_position_embeddings": preset.context,
        **_ids(tokenizer),
    }


def init_text(samples: Sequence[Sample], preset: str = "tiny", seed: int = 0) -> Loaded:
    """An untrained Llama with tied head, and a tokenizer made from the samples' prompts and targets.

    The vocabulary says something about the texts that it was learnt from; where that matters, give other texts than
    the private ones.

    Raises:
        UserError: unknown preset, or no samples.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    size = PRESETS[preset]
    tokenizer = train_tokenizer(_texts(samples), size.vocab)
    with seeded(seed):
        model = LlamaForCausalLM(LlamaConfig(**_llama(size, tokenizer), tie_word_embeddings=True))
    model.eval()
    adapter = TextAdapter(tokenizer=tokenizer, template="plain", context=size.context).bind(model)
    return Loaded(model, adapter, f"init:{preset}:{seed}")


def init_classifier(
    num_classes: int,
    image_size: int | tuple[int, int] = 32,
    channels: int = 3,
    arch: Arch = "resnet",
    seed: int = 0,
    *,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    hidden_sizes: Sequence[int] = (128, 64),
) -> Loaded:
    """An untrained image classifier of 50,000 to 80,000 parameters; images are resized to ``image_size`` squared.

    Those with ``am-softmax`` are face embedders: see :mod:`expunge.models.am_softmax`.
    ``mean`` and ``std`` are of pixels scaled to [0, 1]: one number, or one per channel. ``mlp`` is for feature vectors,
    which are pictures of one row, ``image_size`` (1, D): nothing is resized, and ``hidden_sizes`` are its layers.

    Raises:
        UserError: fewer than 2 classes, an unknown architecture, channels other than 1 and 3, or a size below 8 (which
            ``mlp`` takes).
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = 1 if arch == "mlp" else 8
    if num_classes < 2 or channels not in (1, 3) or min(height, width) < least:
        raise UserError(
            f"a classifier of {num_classes} classes on {height} x {width} px images of {channels} channels: allowed "
            f"are 2 classes or more, 1 or 3 channels, and {least} px or more (1 with the architecture mlp)."
        )
    if any(len(c) not in (1, channels) for c in (mean, std)) or min(std) <= 0:
        raise UserError(f"mean {tuple(mean)} and std {tuple(std)}: give 1 or {channels} numbers, std above 0.")
    if arch not in ARCHS:
        raise unknown("architecture", arch, ARCHS)
    with seeded(seed):
        model = _built(arch, num_classes, height, width, channels, hidden_sizes)
    model.eval()
    # One number per channel is what every reader of the file understands.
    preprocess = Preprocess(
        height=height,
        width=width,
        channels=channels,
        resize=arch != "mlp",
        mean=tuple(mean) * (channels // len(mean)),
        std=tuple(std) * (channels // len(std)),
    )
    adapter = ClassifierAdapter(preprocess=preprocess, num_classes=num_classes).bind(model)
    return Loaded(model, adapter, f"init:{arch}:{seed}")


def _built(arch: Arch, classes: int, height: int, width: int, channels: int, hidden_sizes: Sequence[int]) -> Any:
    """The model; each library is imported where it is needed."""
    if arch == "mlp":
        from expunge.models.mlp import MlpConfig, MlpForImageClassification

        sides = [height, width]
        return MlpForImageClassification(
            MlpConfig(num_channels=channels, image_size=sides, hidden_sizes=list(hidden_sizes), num_labels=classes)
        )
    from transformers import ViTForImageClassification

    from expunge.models.embedders import EMBEDDERS

    kind = arch.removesuffix("-am-softmax")
    config = (_resnet if kind == "resnet" else _vit)(classes, height, width, channels)
    if kind == arch:
        return (SmallResNetForImageClassification if kind == "resnet" else ViTForImageClassification)(config)
    config.am_softmax_scale, config.am_softmax_margin = SCALE, MARGIN
    return EMBEDDERS[kind](config)


def _resnet(classes: int, height: int, width: int, channels: int) -> Any:
    return ResNetConfig(
        num_channels=channels,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=classes,
        small_stem=True,
        image_size=height if height == width else [height, width],
    )


def _vit(classes: int, height: int, width: int, channels: int) -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=height if height == width else (height, width),
        patch_size=next(p for p in (4, 7, 5, 3, 2, 1) if height % p == 0 and width % p == 0),
        num_channels=channels,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def classifier_for(samples: Sequence[Sample], arch: Arch | None = None, seed: int = 0) -> Loaded:
    """An untrained classifier that fits the samples: classes from the highest label, size and channels of the images.

    Files, and images of unequal sizes or of more than 32 pixels, get 32 x 32 in colour. ``arch`` is by default ``mlp``
    for feature vectors (one row, one channel; they are read as 0 to 1) and ``resnet`` for pictures. Give the samples of
    all roles, or a label that only one of them has is none of the model's.

    Raises:
        UserError: no samples, a target that is no class number, or what :func:`init_classifier` finds wrong.
    """
    wrong = next((s for s in samples if not isinstance(s.target, int)), None)
    if wrong is not None or not samples:
        given = "none were given" if wrong is None else f"'{wrong.id}' has the target {wrong.target!r}"
        raise UserError(f"a classifier is built for samples whose targets are class numbers, and {given}.")
    classes = 1 + max(int(s.target) for s in samples)
    shapes = {s.image.shape if isinstance(s.image, np.ndarray) else () for s in samples}
    shape = shapes.pop() if len(shapes) == 1 else ()
    channels = 1 if len(shape) == 2 or shape[2:] == (1,) else 3
    if shape and shape[0] == 1 and channels == 1:
        return init_classifier(classes, (1, shape[1]), 1, arch or "mlp", seed, mean=(0.0,), std=(1.0,))
    if not shape or max(shape[:2]) > 32:
        return init_classifier(classes, 32, 3, arch or "resnet", seed)
    return init_classifier(classes, (shape[0], shape[1]), channels, arch or "resnet", seed)


def init_llava(samples: Sequence[Sample], seed: int = 0, *, image_size: int = 32) -> Loaded:
    """An untrained LLaVA of at most 0.17 million parameters: CLIP vision tower, projector, Llama, and a tokenizer.

    An image is 16 tokens, whatever its size.

    Raises:
        UserError: no samples, or an image size that is no multiple of 4.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    if image_size < 8 or image_size % 4:
        raise UserError(f"image size {image_size}: allowed are multiples of 4 from 8 on.")
    tokenizer = train_tokenizer(_texts(samples), SEEING.vocab, special=[IMAGE])
    token_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=image_size // 4,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_llama(SEEING, tokenizer)),
        image_token_index=token_id,
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = _speaking(LlavaForConditionalGeneration, config, tokenizer, seed)
    adapter = LlavaAdapter(
        tokenizer=tokenizer,
        template="plain",
        context=SEEING.context,
        preprocess=Preprocess(height=image_size, width=image_size, resample=BICUBIC, mean=(0.5,) * 3, std=(0.5,) * 3),
        image_token=IMAGE,
        image_token_id=token_id,
        image_tokens=image_token_count(config),
        files={
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "image_token": IMAGE,
                "patch_size": image_size // 4,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,  # the class token, which the strategy then drops
            }
        },
    )
    adapter.bind(model)
    return Loaded(model, adapter, f"init:llava:{seed}")


def init_qwen2vl(samples: Sequence[Sample], seed: int = 0, *, image_size: int = 32) -> Loaded:
    """An untrained Qwen2-VL of at most 0.17 million parameters, and a tokenizer.

    A square image is 16 tokens, whatever its size; another one keeps its shape and takes about as many.

    Raises:
        UserError: no samples, or an image size that is no multiple of 8.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    if image_size < 8 or image_size % 8:
        raise UserError(f"image size {image_size}: allowed are multiples of 8 from 8 on.")
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer = train_tokenizer(_texts(samples), SEEING.vocab, special=list(names.values()))
    ids = {kind: int(tokenizer.convert_tokens_to_ids(word)) for kind, word in names.items()}
    patch, half = image_size // 8, SEEING.width // SEEING.heads // 2
    vision = {
        "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": SEEING.width,
        "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    # Of the half width that positions turn, a quarter goes to time and the rest in equal parts to rows and columns.
    sections = [half // 4, (half - half // 4) // 2, (half - half // 4 + 1) // 2]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config={**_llama(SEEING, tokenizer), "rope_parameters": rope},
        tie_word_embeddings=False,
        **{f"{kind}_token_id": number for kind, number in ids.items()},
    )
    model = _speaking(Qwen2VLForConditionalGeneration, config, tokenizer, seed)
    preprocess = PatchPreprocess.of({"min_pixels": image_size**2, "max_pixels": image_size**2}, config.vision_config)
    adapter = Qwen2VLAdapter(
        tokenizer=tokenizer,
        template="plain",
        context=SEEING.context,
        preprocess=replace(preprocess, raw={}),
        image_token_id=ids["image"],
    )
    adapter.bind(model)
    return Loaded(model, adapter, f"init:qwen2vl:{seed}")


def _speaking(kind: Any, config: Any, tokenizer: Any, seed: int) -> Any:
    """A vision-language model in eval mode that ends its answers with this tokenizer's tokens."""
    with seeded(seed):
        model = kind(config)
    for name, value in _ids(tokenizer).items():
        setattr(model.generation_config, name, value)
    return model.eval()
