"""Load and save models: ``load_model`` gives a model with the adapter of its modality, ``save_model`` keeps both.

Weights are read from safetensors only, and code from a model's folder is never run.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.errors import UserError, unknown
from expunge.models.adapter import Adapter
from expunge.models.attached import ATTACHED, attachments, load_attached, save_attached
from expunge.models.classifier import ClassifierAdapter
from expunge.models.folder import (
    QWEN_TYPES,
    ModelFolder,
    check_tokenizer_files,
    first_line,
    inspect,
    read_json,
    resolve,
    tensor_shapes,
)
from expunge.models.images import Preprocess
from expunge.models.lora import LoraOptions, apply_lora, is_lora, merge_lora
from expunge.models.multimodal import LlavaAdapter, image_token_count
from expunge.models.quiet import quiet
from expunge.models.qwen2vl import PatchPreprocess, Qwen2VLAdapter
from expunge.models.text import TextAdapter, causal_lm

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
ZONE = "zone.json"  # beside the weights of a base: the model is that base with a zone
MAX_CONTEXT = 1024  # longest sequence unless --context says otherwise
STRICT: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass
class Loaded:
    """A model, the adapter that feeds it, and where it came from (a folder, a hub name, "tiny" and a seed)."""

    model: nn.Module
    adapter: Adapter
    source: str


def load_model(
    name_or_folder: str | Path,
    *,
    dtype: str = "fp32",
    device: str = "auto",
    template: str = "auto",
    context: int | None = None,
    lora: LoraOptions | None = None,
    seed: int = 0,
) -> Loaded:
    """Load a causal language model, image classifier, LLaVA or Qwen2-VL model, a LoRA adapter or a zone with its base.

    Args:
        name_or_folder: a local folder; where there is none, a hub name (only then is the network used).
        dtype: fp32, bf16, fp16, or auto for the one that the weights are stored in.
        device: auto, cpu, cuda, cuda:N or mps.
        template: see :class:`TextAdapter`. context: longest sequence in tokens, by default the model's own, at most
            1024.
        lora: wrap the model in a fresh LoRA adapter, initialised from ``seed``.

    Raises:
        UserError: one sentence for everything that can be wrong with the folder or the options.
    """
    number_type, place = dtype_of(dtype), device_of(device)
    folder = inspect(resolve(name_or_folder))
    if folder.is_adapter and lora is not None:
        raise UserError(f"'{name_or_folder}' is a LoRA adapter already: leave --lora out, or merge it first.")
    base = base_of(folder) if folder.is_adapter else folder
    model = _weights(base, number_type)
    adapter = _adapter(base, folder, model, template, context)
    if folder.is_adapter:
        model = _with_adapter(model, folder)
    elif lora is not None:
        model = apply_lora(model, lora, seed=seed)
    model.to(place)
    model.eval()
    if (folder.path / ATTACHED).is_file():
        _attach(model, folder.path)
    if (folder.path / ZONE).is_file():
        model = _with_zone(model, folder, lora)
    if isinstance(adapter, (TextAdapter, ClassifierAdapter)):
        adapter.bind(model)
    return Loaded(model, adapter, str(name_or_folder))


def dtype_of(name: str) -> torch.dtype | None:
    """The torch dtype of an option; None for auto. Raises UserError for an unknown one."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise unknown("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """The device of an option. Raises UserError for an unknown one, or one that is not there."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdecimal()):
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:0", "mps"])
    if kind == "cuda" and int(number or 0) >= cuda:
        raise UserError(f"device '{name}' is not there: torch sees {cuda} CUDA device(s); use --device auto or cpu.")
    if kind == "mps" and not mps:
        raise UserError("device 'mps' is not there: use --device auto or cpu.")
    return torch.device(name)


def base_of(folder: ModelFolder) -> ModelFolder:
    """The base of an adapter folder; a relative path is taken from the working folder, then from the adapter's.

    Raises:
        UserError: the base is not named, not there, or itself an adapter.
    """
    name = folder.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"'{folder.path / 'adapter_config.json'}' names no base model: add base_model_name_or_path.")
    beside = folder.path / name
    try:
        base = inspect(beside if not Path(name).is_dir() and beside.is_dir() else resolve(name))
    except UserError as error:
        raise UserError(f"the base of adapter '{folder.path}' cannot be loaded: {error}") from error
    if base.is_adapter:
        raise UserError(f"the base '{name}' of adapter '{folder.path}' is an adapter itself: merge that one first.")
    return base


def _weights(folder: ModelFolder, dtype: torch.dtype | None) -> nn.Module:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
    )

    from expunge.models import mlp  # noqa: F401 - makes its model type known to transformers

    builder: Any = {
        "text": AutoModelForCausalLM,
        "classifier": AutoModelForImageClassification,
        "multimodal": AutoModelForImageTextToText,
    }[folder.modality]
    options: dict[str, Any] = {
        "dtype": dtype or "auto",
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that they are listed, and refused below by name
    }
    own = _own_class(folder.config)
    try:
        with quiet():
            if own is not None:
                model, info = own.from_pretrained(folder.path, local_files_only=True, **options)
            else:
                model, info = builder.from_pretrained(folder.path, **options, **STRICT)
    except Exception as error:  # transformers raises from a dozen places; all of them mean a folder that is not sound
        raise UserError(f"'{folder.path}' cannot be loaded: {first_line(error)}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"the weights in '{folder.path}' lack {len(missing)} tensor(s) that config.json asks for, first "
            f"'{missing[0]}': configuration and weights are not of the same model."
        )
    wrong = [str(m[0] if isinstance(m, tuple) else m) for m in info["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensor(s) in '{folder.path}' have another shape than config.json says, first "
            f"'{sorted(wrong)[0]}': configuration and weights are not of the same model."
        )
    loaded: nn.Module = model
    return loaded


def _own_class(config: Mapping[str, Any]) -> Any:
    """The class of ours that a configuration asks for, or None."""
    from expunge.models.embedders import EMBEDDERS
    from expunge.models.small_resnet import SmallResNetForImageClassification

    if "am_softmax_scale" in config:
        if config["model_type"] not in EMBEDDERS:
            raise unknown("model type with an AM-softmax head", str(config["model_type"]), EMBEDDERS)
        return EMBEDDERS[config["model_type"]]
    return SmallResNetForImageClassification if config.get("small_stem") else None


def _adapter(base: ModelFolder, folder: ModelFolder, model: nn.Module, template: str, context: int | None) -> Adapter:
    config: Any = model.config
    if base.modality == "classifier":
        return _classifier(base, config)
    with_tokenizer = folder.path if (folder.path / "tokenizer_config.json").is_file() else base.path
    tokenizer = _tokenizer(with_tokenizer)
    vocabulary = tokenizer.get_vocab()
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    top = max(vocabulary.values(), default=0)
    if top >= rows:
        raise UserError(
            f"the tokenizer in '{with_tokenizer}' has ids up to {top} and the model {rows} embeddings: it is not "
            "the tokenizer of this model."
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_CONTEXT
    if context is not None and not 2 <= context <= longest:
        raise UserError(f"context {context}: allowed are 2 to {longest}, the positions of this model.")
    context = context or min(longest, MAX_CONTEXT)
    if base.modality == "text":
        return TextAdapter(tokenizer=tokenizer, template=template, context=context)
    files = {n: read_json(base.path / n) for n in PROCESSOR_FILES if (base.path / n).is_file()}
    if not _image_processor(files):
        raise _unscaled(base)
    token_id = int(config.image_token_id)
    names = {number: word for word, number in vocabulary.items()}
    if token_id not in names:
        raise UserError(f"the tokenizer in '{with_tokenizer}' has no image token (id {token_id} of config.json).")
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": template,
        "context": context,
        "image_token": names[token_id],
        "image_token_id": token_id,
        "files": files,
    }
    return (_qwen if config.model_type in QWEN_TYPES else _llava)(config, names, files, common)


def _llava(config: Any, _: Mapping[int, str], files: Mapping[str, Any], common: dict[str, Any]) -> LlavaAdapter:
    size, last = int(config.vision_config.image_size), int(config.vision_config.num_hidden_layers)
    layers = config.vision_feature_layer
    for layer in layers if isinstance(layers, list) else [layers]:
        if not -last - 1 <= layer <= last:
            raise UserError(
                f"config.json takes image features from layer {layer} (vision_feature_layer): allowed are {-last - 1} "
                f"to {last}, the vision tower has {last} layers."
            )
    preprocess = Preprocess.read(_image_processor(files), size=size, channels=int(config.vision_config.num_channels))
    if (preprocess.height, preprocess.width) != (size, size):
        raise UserError(
            f"the image processor makes images of {preprocess.height} x {preprocess.width} and the model takes {size} "
            f"x {size}: image tokens would not match the image; copy the file that belongs to the model."
        )
    return LlavaAdapter(**common, preprocess=preprocess, image_tokens=image_token_count(config))


def _qwen(config: Any, names: Mapping[int, str], files: Mapping[str, Any], common: dict[str, Any]) -> LlavaAdapter:
    lost = [i for i in (config.vision_start_token_id, config.vision_end_token_id) if i not in names]
    if lost:
        raise UserError(f"the tokenizer has no mark of id {lost[0]}, between which config.json has images stand.")
    marks = (names[config.vision_start_token_id], names[config.vision_end_token_id])
    preprocess = PatchPreprocess.of(_image_processor(files), config.vision_config)
    return Qwen2VLAdapter(**common, preprocess=preprocess, marks=marks)


def _image_processor(files: Mapping[str, Any]) -> Any:
    nested = files.get("processor_config.json", {}).get("image_processor")  # where transformers 5 writes it
    return files.get("preprocessor_config.json") or nested


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def _classifier(folder: ModelFolder, config: Any) -> ClassifierAdapter:
    size = getattr(config, "image_size", None) or 224
    side = int(size if isinstance(size, int) else size[0])
    file = folder.path / "preprocessor_config.json"
    given = read_json(file) if file.is_file() else {}
    if not given:
        raise _unscaled(folder)
    names = {str(k): int(v) for k, v in (config.label2id or {}).items()}
    return ClassifierAdapter(
        preprocess=Preprocess.read(given, size=side, channels=int(getattr(config, "num_channels", 3))),
        num_classes=int(config.num_labels),
        label_ids=names,
    )


def _unscaled(folder: ModelFolder) -> UserError:
    return UserError(
        f"'{folder.path}' has no preprocessor_config.json, or an empty one, so how images are scaled is not known: "
        "copy it from the model that this one was trained from."
    )


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    check_tokenizer_files(path)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **STRICT)
    except Exception as error:  # as above
        raise UserError(f"the tokenizer in '{path}' cannot be loaded: {first_line(error)}.") from error
    older = path / "chat_template.json"  # processors once kept the template here
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = read_json(older).get("chat_template")
    return tokenizer


def _with_adapter(model: nn.Module, folder: ModelFolder) -> nn.Module:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    try:
        with quiet():
            # The file is there (checked), and peft takes safetensors before anything else.
            wrapped = PeftModel.from_pretrained(model, str(folder.path), is_trainable=True, torch_device="cpu")
    except Exception as error:  # as above
        raise UserError(f"the adapter '{folder.path}' does not fit its base: {first_line(error)}.") from error
    stored = {name for name in tensor_shapes(folder.weights[0]) if ".lora_" in name}
    # Without False, peft would ask the hub whether the base's vocabulary was resized.
    built = {n for n in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if ".lora_" in n}
    lost = sorted(built ^ stored)
    if lost:
        raise UserError(f"the adapter '{folder.path}' does not fit its base: '{lost[0]}' is only on one side.")
    out: nn.Module = wrapped
    return out


def _attach(model: nn.Module, folder: Path) -> None:
    # Kinds are registered by the methods that make them, which stand above models in the house.
    from expunge.methods.registry import all_methods

    all_methods()
    load_attached(causal_lm(model), folder)


def _with_zone(model: nn.Module, folder: ModelFolder, lora: LoraOptions | None) -> nn.Module:
    # Zones stand above models in the house, and only this folder's content says that one is needed.
    from expunge.zones.model import ZonedModel
    from expunge.zones.storage import load_zone

    if lora is not None:
        raise UserError(f"'{folder.path}' is a base with a zone, whose weights are frozen: leave --lora out.")
    return ZonedModel(model, load_zone(folder.path, model))


def save_model(loaded: Loaded, folder: str | Path, *, merge: bool = False) -> Path:
    """Write weights, configuration, and tokenizer or processor; atomic: the folder is whole or not there.

    A LoRA model is written as an adapter that names its base; ``merge`` writes full weights instead and leaves the
    model in memory as it is. A folder that holds an earlier model is replaced.

    Raises:
        UserError: the folder holds something that is no model, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and not _replaceable(target):
        raise UserError(f"'{target}' exists and holds no model: give a new folder, nothing was overwritten.")
    part, old = (target.parent / f".{target.name}.{os.getpid()}.{end}" for end in ("part", "old"))
    try:
        part.mkdir(parents=True)
        _write(loaded, part, merge)
        if target.exists():
            target.rename(old)
        part.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise UserError(f"the model cannot be written to '{target}': {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir()}
    return not names or bool(names & {"config.json", "adapter_config.json"})


def _write(loaded: Loaded, part: Path, merge: bool) -> None:
    model: Any = loaded.model
    with quiet():
        if is_lora(model) and not merge:
            if not causal_lm(model).name_or_path:
                raise UserError(
                    "this LoRA model's base was never saved, so an adapter alone could not be loaded: save with "
                    "merge, or save the base first and load it with --lora."
                )
            for config in model.peft_config.values():
                named = Path(str(config.base_model_name_or_path))
                if named.is_dir():  # the adapter must find its base from any working folder
                    config.base_model_name_or_path = str(named.resolve())
            # "auto" would ask the hub about the base's vocabulary.
            model.save_pretrained(part, save_embedding_layers=False)
        else:
            plain: Any = merge_lora(copy.deepcopy(model)) if is_lora(model) else model
            held = plain._modules.pop("attached", None)  # not among the weights, where nothing else could read them
            try:
                plain.save_pretrained(part)
            finally:
                if held is not None:
                    plain._modules["attached"] = held
    if attachments(model):
        save_attached(model, part)
    loaded.adapter.save(part)
