"""What a run will need, before it starts: memory and disk from configuration and safetensors headers alone.

Bytes everywhere; the activation figure is an estimate for one batch, the rest is arithmetic.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.errors import UserError, unknown
from expunge.models.adapter import CHUNK_ELEMENTS
from expunge.models.folder import ModelFolder, inspect, parameters_in, resolve, tensor_shapes
from expunge.models.load import base_of, device_of, dtype_of
from expunge.models.lora import ALL_LINEAR, LoraOptions
from expunge.models.towers import TOWERS

STATES = {
    "adamw": 2,
    "adam": 2,
    "sophia": 2,
    "muon": 2,
    "sgd": 0,
    "momentum": 1,
    "none": 0,
}  # optimizer values per parameter
SHORT = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GIB = 1 << 30
OVERHEAD = 0.4 * GIB  # Python with torch and transformers imported


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes for one model in use; ``copies`` counts further models of the same size held beside it (a teacher)."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    disk: int
    copies: int = 0

    @property
    def memory(self) -> int:
        """Bytes of device memory, all together."""
        return self.weights * (1 + self.copies) + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        inside = ", ".join(f"{name} {size(getattr(self, name))}" for name in parts)
        return f"{self.parameters:,} parameters, memory {size(self.memory)} ({inside}), disk {size(self.disk)}"


def size(number: float) -> str:
    """Bytes in words.

    >>> size(3 * 2**30), size(5_000_000), size(800)
    ('3.0 GiB', '4.8 MiB', '1 KiB')
    """
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{math.ceil(number / 1024)} KiB"


def estimate(
    name: str | Path,
    *,
    dtype: str = "fp32",
    train: bool = True,
    optimizer: str = "adamw",
    batch_tokens: int = 4096,
    lora: LoraOptions | None = None,
    copies: int = 0,
    outputs: int = 1,
) -> MemoryEstimate:
    """Memory and disk for loading, and with ``train`` for training, the model of that name or folder.

    Args:
        batch_tokens: tokens of one batch, padding included. copies: further models held at the same time.
        outputs: models that the run writes.

    Raises:
        UserError: see :func:`load_model`; nothing is loaded.
    """
    if optimizer not in STATES:
        raise unknown("optimizer", optimizer, STATES)
    if batch_tokens < 1 or copies < 0 or outputs < 0:
        raise UserError(f"batch tokens {batch_tokens}, copies {copies}, outputs {outputs}: at least 1, 0 and 0.")
    folder = inspect(resolve(name))
    base = base_of(folder) if folder.is_adapter else folder
    added = parameters_in(folder.weights) if folder.is_adapter else _lora_parameters(base, lora) if lora else 0
    total = parameters_in(base.weights) + added
    trainable = (added or total) if train else 0
    each = (dtype_of(dtype) or _stored(base)).itemsize
    activations = _activations(base.config, batch_tokens, each, train)
    return MemoryEstimate(
        parameters=total,
        trainable=trainable,
        weights=total * each,
        gradients=trainable * each,
        optimizer=trainable * each * STATES[optimizer],
        activations=activations,
        disk=(added or total) * each * outputs,
        copies=copies,
    )


def _stored(folder: ModelFolder) -> torch.dtype:
    """The type of most stored tensors, which is what ``--dtype auto`` loads."""
    kinds = [kind for file in folder.weights for kind, _ in tensor_shapes(file).values()]
    most = max(set(kinds), key=kinds.count) if kinds else "F32"
    found: torch.dtype = getattr(torch, SHORT.get(most, "float32"))
    return found


def _lora_parameters(folder: ModelFolder, lora: LoraOptions) -> int:
    """r·(in + out) per matrix and r·(in·k² + out) per k x k convolution, of the layers that ``apply_lora`` takes."""
    wanted = [t.strip() for t in lora.targets.split(",")]
    images = folder.modality == "classifier"
    outside: tuple[str, ...] = ("embed", "wte", "wpe", "lm_head")
    if images:  # only a cosine head stays as it is
        outside = ("classifier",) if "am_softmax_scale" in folder.config else ()
    total = 0
    for file in folder.weights:
        for name, (_, shape) in tensor_shapes(file).items():
            layer = name.removesuffix(".weight")
            fits = len(shape) == 2 or (images and len(shape) == 4)
            if wanted[0] in (ALL_LINEAR, *TOWERS):
                sees = any(part in layer for part in ("vision", "visual", "projector"))
                there = wanted[0] == ALL_LINEAR or sees == (wanted[0] == "vision")
                fits = fits and there and not any(part in layer for part in outside)
            else:
                fits = fits and any(layer == w or layer.endswith("." + w) for w in wanted)
            if fits:
                total += lora.r * (shape[0] + math.prod(shape[1:]))
    return total


def _activations(config: Mapping[str, Any], tokens: int, each: int, train: bool) -> int:
    """Bytes that the forward pass of one batch leaves for the backward pass (a vision tower's not counted).

    Per token and layer, autograd was seen to keep 10 values of the hidden width and 4 of the inner width in Llama
    and Qwen2 (norms, queries, keys, values, attention and its output; gate, its activation, up, their product), 14
    and 4 in Gemma 2, 10 and 5 in GPT-2; the largest of each are taken. Attention scores are not
    kept (fused attention). Without gradients one layer at a time is alive. Beside it stand the logits of one chunk,
    with their log-softmax and gradient. For images the tokens are 16 x 16 patches, see ``_image_activations``.
    """
    text = config.get("text_config") or config
    width = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0)
    layers = int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
    if not width or not layers:
        return _image_activations(config, tokens, each, train)
    inner = int(text.get("intermediate_size") or text.get("n_inner") or 4 * width)
    vocab = int(text.get("vocab_size") or 0)
    patch = config.get("patch_size")
    if isinstance(patch, int) and not vocab:  # a vision transformer: batches are sized in 16 x 16 patches
        tokens = math.ceil(tokens * (16 / patch) ** 2)
    logits = min(CHUNK_ELEMENTS, tokens * vocab) * 4 * (3 if train else 2)
    return tokens * (14 * width + 5 * inner) * each * (layers if train else 1) + logits


def _image_activations(config: Mapping[str, Any], tokens: int, each: int, train: bool) -> int:
    """A residual network: each block of width w keeps about 7 maps (convolutions, norms, activations, the sum).

    A 16 x 16 patch has 256 places at full resolution; every stage after the first halves both sides.
    """
    widths = [int(w) for w in config.get("hidden_sizes", [64])]
    depths = [int(d) for d in config.get("depths", [1] * len(widths))]
    places = 256.0 if config.get("small_stem") else 256.0 / 16
    bottleneck = 1.5 if config.get("layer_type") == "bottleneck" else 1.0
    stem = 3 * int(config.get("embedding_size", 64)) * (places if config.get("small_stem") else 4 * places)
    stages = [7 * bottleneck * w * d * places / 4**i for i, (w, d) in enumerate(zip(widths, depths, strict=False))]
    return int(tokens * each * (stem + (sum(stages) if train else max(stages, default=0.0))))


def available_memory(device: str = "auto") -> int:
    """Free bytes of the device: what CUDA says, or of main memory what the system and the container leave."""
    place = device_of(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    return min(_system_memory(), _container_memory())


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62  # nothing known (Windows): nothing is refused


def _container_memory() -> int:
    """What a memory limit of control groups (version 2, then 1) leaves."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return 1 << 62


def check_resources(needed: MemoryEstimate, out_folder: str | Path, *, device: str = "auto") -> None:
    """Refuse to start what cannot end.

    Raises:
        UserError: less memory or disk is free than the estimate says.
    """
    free = available_memory(device)
    room = OVERHEAD if device_of(device).type != "cuda" else 0
    if needed.memory + room > free:
        raise UserError(
            f"about {size(needed.memory + room)} of memory are needed ({needed}) and {size(free)} are free: use "
            "--dtype bf16, --lora, a smaller batch, or another machine."
        )
    place = Path(out_folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    left = shutil.disk_usage(place).free
    if needed.disk * 1.05 > left:
        raise UserError(
            f"about {size(needed.disk * 1.05)} of disk are needed and {size(left)} are free at '{place}': make room, "
            "or choose another --out."
        )
