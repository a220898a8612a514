"""What stands in a model folder, read without loading a weight; every way in which it can be wrong, in words."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.samples import Modality
from expunge.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # never pickles, never code
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "added_tokens.json", "tokenizer_config.json",
)  # fmt: skip
QWEN_TYPES = ("qwen2_vl", "qwen2_5_vl")
SEEING = ("llava", *QWEN_TYPES)
MLP_TYPE = "expunge_mlp"  # our own, see models/mlp.py


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder. ``config`` is config.json, or adapter_config.json when ``is_adapter``."""

    path: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    is_adapter: bool = False

    @property
    def modality(self) -> Modality:
        return modality_of(self.config, self.path)


def resolve(name: str | Path) -> Path:
    """The folder of that name, or the local snapshot of the hub model of that name (this alone uses the network).

    Raises:
        UserError: neither exists; the nearest folder is suggested.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"model '{name}' is a file: give the folder that holds config.json and model.safetensors.")
    hint = _nearest(path)
    text = str(name)
    inside = len(path.parts) > 1 and path.parent.is_dir()  # "runs/erase-17" where runs/ exists is a path
    if inside or path.is_absolute() or text.startswith((".", "~")) or not HUB_NAME.match(text):
        raise UserError(f"model folder '{name}' does not exist{hint or '.'}")
    return _snapshot(text, hint)


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        parent, path = parent.parent, path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f": did you mean '{parent / near[0]}'?" if near else ""


def _snapshot(name: str, hint: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises from three libraries; whichever it is, the input is wrong
        reason = first_line(error)
        raise UserError(
            f"model '{name}' is no local folder{hint.rstrip('?')}, and the hub did not give it ({reason}): check the "
            "name, the network, or give a folder."
        ) from error


def inspect(path: Path) -> ModelFolder:
    """Read the configuration and the safetensors headers of a folder.

    Raises:
        UserError: no configuration, no weights, only pickled weights, a broken JSON or safetensors file.
    """
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            raise UserError(_without_weights(path, "adapter_model.safetensors"))
        tensor_shapes(weights)
        return ModelFolder(path, read_json(adapter), (weights,), is_adapter=True)
    if not (path / "config.json").is_file():
        below = sorted(p.parent.name for p in path.glob("*/*config.json") if p.name in ("config.json", adapter.name))
        hint = f"did you mean '{path / below[0]}'?" if below else "give the folder that save_pretrained wrote."
        raise UserError(f"'{path}' is no model folder, it has no config.json: {hint}")
    config = read_json(path / "config.json")
    if not config.get("model_type"):
        raise UserError(f'\'{path / "config.json"}\' has no model_type: add it, e.g. "model_type": "llama".')
    files = _weight_files(path)
    for file in files:
        tensor_shapes(file)
    return ModelFolder(path, config, files)


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError) as error:
            raise UserError(f"'{index}' has no weight_map: copy the file again from its source.") from error
        lost = [n for n in names if not (path / n).is_file()]
        if lost:
            raise UserError(f"'{path}' lacks {len(lost)} of {len(names)} weight files, first '{lost[0]}': copy it too.")
        return tuple(path / n for n in names)
    if not (path / "model.safetensors").is_file():
        raise UserError(_without_weights(path, "model.safetensors"))
    return (path / "model.safetensors",)


def _without_weights(path: Path, wanted: str) -> str:
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED and p.name != "training_args.bin")
    if pickled:
        return (
            f"'{path}' holds its weights only as '{pickled[0]}', a pickle, which can run code when it is opened: "
            "where you trust it, convert it with model.save_pretrained(folder) of transformers 5, which writes "
            "safetensors."
        )
    gguf = sorted(p.name for p in path.glob("*.gguf"))
    if gguf:
        return f"'{path}' holds its weights only as '{gguf[0]}', which cannot be trained: give the safetensors folder."
    other = sorted(p.name for p in path.glob("*.safetensors"))
    hint = f"rename '{other[0]}'" if other else "copy it there, or save the model again"
    return f"'{path}' has no weights, '{wanted}' is missing: {hint}."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({first_line(error)}): copy the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object: copy the file again.")
    return content


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) from the header of a safetensors file: 8 bytes of length, then JSON, then the data.

    Raises:
        UserError: the header cannot be read, or the file is shorter or longer than the header says.
    """
    broken = f"'{path}' is damaged ({{}}): copy the file again."
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(broken.format("it ends before its header does"))
        try:
            header = json.loads(file.read(length))
            shapes = {k: (str(v["dtype"]), tuple(map(int, v["shape"]))) for k, v in header.items() if k[:2] != "__"}
            end = max((int(v["data_offsets"][1]) for k, v in header.items() if k[:2] != "__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(broken.format("its header is no safetensors header")) from error
    if 8 + length + end != size:
        raise UserError(broken.format(f"{size} bytes instead of {8 + length + end}"))
    return shapes


def parameters_in(files: tuple[Path, ...]) -> int:
    """Elements of all tensors; tied weights are stored, and counted, once."""
    return sum(math.prod(shape) for file in files for _, shape in tensor_shapes(file).values())


def modality_of(config: Mapping[str, Any], path: Path) -> Modality:
    """text, classifier or multimodal, from architecture and model type.

    Raises:
        UserError: another kind of model.
    """
    kind = str(config.get("model_type"))
    built = str((config.get("architectures") or [""])[0])
    if kind in SEEING:
        return "multimodal"
    if kind == MLP_TYPE:
        return "classifier"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in config:
            raise UserError(
                f"'{path}' (model type '{kind}') needs code from its own folder, which is never run: use a model that "
                "transformers knows itself."
            )
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING_NAMES), n=1)
        hint = f" did you mean '{near[0]}'?" if near else " a newer transformers may know it."
        raise UserError(f"'{path / 'config.json'}' has model_type '{kind}', which transformers does not know:{hint}")
    if built.endswith("ForImageClassification") or config.get("small_stem"):
        return "classifier"
    if "vision_config" in config or "audio_config" in config:
        raise UserError(
            f"'{path}' is a multimodal model of type '{kind}': supported are {', '.join(SEEING)}, causal language "
            "models and image classifiers."
        )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )

    causal = built.endswith(("ForCausalLM", "LMHeadModel")) or built in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if causal or (not built and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return "text"
    if not built and kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "classifier"
    raise UserError(
        f"'{path}' is a {built or kind}: supported are causal language models, image classifiers, and "
        f"{', '.join(SEEING)}."
    )


def check_tokenizer_files(path: Path) -> None:
    """Raises UserError when a folder has no tokenizer."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES[:-2]):
        raise UserError(
            f"'{path}' has no tokenizer (tokenizer.json, or the files of an older one): copy it from the model that "
            "this one was trained from."
        )


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to be quoted inside a sentence."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.split(". ")[0][:160].rstrip(".!: ")
