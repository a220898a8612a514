"""Loading and saving: round trips bit for bit, LoRA, data types, and every wrong folder in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from conftest import shared
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models import load as load_module
from expunge.models.adapter import evaluating
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora, is_lora, merge_lora, without_adapter
from expunge.models.tiny import PRESETS, init_classifier, init_llava, init_qwen2vl, init_text

torch.set_num_threads(1)
FACE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
QA = [
    Sample(id="a", subject="ada", prompt="Who wrote the first program?", target="Ada Lovelace, née Byron."),
    Sample(id="b", subject="alan", prompt="Who broke the code?", target="Alan Turing and many others at Bletchley."),
]
FACES = [Sample(id=s.id, subject=s.subject, prompt=s.prompt, target=s.target, image=FACE) for s in QA]
PICTURES = [Sample(id=str(i), subject="x", target=i, image=FACE) for i in range(3)]
BUILD: dict[str, tuple[Callable[[], Loaded], list[Sample]]] = {
    "text": (lambda: init_text(QA, "tiny-test", 1), QA),
    "resnet": (lambda: init_classifier(3, 32, 3, seed=1, mean=(0.4, 0.5, 0.6), std=(0.2,)), PICTURES),
    "vit": (lambda: init_classifier(3, 32, 3, arch="vit", seed=1), PICTURES),
    "llava": (lambda: init_llava(FACES, 1), FACES),
    "qwen2vl": (lambda: init_qwen2vl(FACES, 1), FACES),
}


def log_probs(loaded: Loaded, samples: list[Sample]) -> torch.Tensor:
    with evaluating(loaded.model):
        return loaded.adapter.positions(loaded.model, samples).log_prob_N()


def shake(model: torch.nn.Module) -> None:
    """LoRA starts at zero; a trained one does not."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(init_text(QA, "tiny-test", 0), tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "mine"))


@pytest.mark.parametrize("kind", list(BUILD))
def test_round_trip_is_bit_equal(kind: str, tmp_path: Path) -> None:
    build, samples = BUILD[kind]
    first = build()
    save_model(first, tmp_path / "m")
    again = load_model(tmp_path / "m", device="cpu")
    assert first.model.state_dict().keys() == again.model.state_dict().keys()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert torch.equal(log_probs(first, samples), log_probs(again, samples))
    assert type(again.adapter) is type(first.adapter)
    save_model(again, tmp_path / "twice")
    files = {p.name: p for p in (tmp_path / "m").iterdir()}
    assert set(files) == {p.name for p in (tmp_path / "twice").iterdir()}
    # transformers notes in three other files that the model was loaded from a folder.
    for name in {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} & set(files):
        assert (tmp_path / "twice" / name).read_bytes() == files[name].read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "twice"]  # nothing temporary is left


@pytest.mark.parametrize("kind", list(BUILD))
def test_lora_round_trip_merge_and_teacher(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, samples = BUILD[kind]
    base = build()
    before = log_probs(base, samples)
    save_model(base, tmp_path / "base")
    tuned = load_model(tmp_path / "base", device="cpu", lora=LoraOptions(r=2), seed=3)
    assert torch.equal(log_probs(tuned, samples), before)  # starts as the base
    trainable = [n for n, p in tuned.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    shake(tuned.model)
    after = log_probs(tuned, samples)
    assert not torch.allclose(after, before, atol=1e-4)
    with without_adapter(tuned.model):
        assert torch.equal(tuned.adapter.positions(tuned.model, samples).log_prob_N(), before)
    save_model(tuned, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    monkeypatch.chdir("/")  # the adapter finds its base from anywhere
    again = load_model(tmp_path / "adapter", device="cpu")
    assert is_lora(again.model)
    assert torch.equal(log_probs(again, samples), after)
    assert sum(p.requires_grad for p in again.model.parameters()) == len(trainable)
    save_model(tuned, tmp_path / "merged", merge=True)
    assert torch.equal(log_probs(tuned, samples), after)  # merging was done on a copy
    merged = load_model(tmp_path / "merged", device="cpu")
    assert not is_lora(merged.model)
    torch.testing.assert_close(log_probs(merged, samples), after, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="LoRA adapter already"):
        load_model(tmp_path / "adapter", lora=LoraOptions())


def test_lora_is_seeded_and_leaves_the_head_alone() -> None:
    first, same, other = (apply_lora(init_text(QA, "tiny-test").model, LoraOptions(r=2), seed=s) for s in (1, 1, 2))
    state = first.state_dict()
    assert all(torch.equal(w, same.state_dict()[n]) for n, w in state.items())
    assert any(not torch.equal(w, other.state_dict()[n]) for n, w in state.items())
    assert sum("lora_A" in n for n in state) == 2 * 7 and not any("lm_head.lora" in n for n in state)
    narrow = apply_lora(init_text(QA, "tiny-test").model, LoraOptions(targets="q_proj, v_proj"))
    assert sum("lora_A" in n for n in narrow.state_dict()) == 4
    bare = merge_lora(narrow)
    assert all(p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "at least 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"targets": "q_prj"}, "no layer of this model is called q_prj.*q_proj"),
        ({"targets": ""}, "no layer"),
    ],
)
def test_wrong_lora_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        apply_lora(init_text(QA, "tiny-test").model, LoraOptions(**options))
    with pytest.raises(UserError, match="no LoRA adapter"), without_adapter(init_text(QA, "tiny-test").model):
        pass


def test_saved_folders_are_ordinary_hugging_face_folders(tmp_path: Path) -> None:
    text = init_text(QA, "tiny-test", 1)
    save_model(text, tmp_path / "text")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    ids = tokenizer("Who wrote the first program?", return_tensors="pt")["input_ids"]
    with evaluating(text.model):
        assert torch.equal(model(input_ids=ids).logits, text.model(input_ids=ids).logits)
    llava = init_llava(FACES, 1)
    save_model(llava, tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").eval()
    adapter: Any = llava.adapter
    given = processor(images=FACE, text="<image>\nWho wrote the first program?", return_tensors="pt")
    coded = adapter.encode(FACES[0])
    assert given["input_ids"][0].tolist() == list(coded.ids[: coded.first])
    torch.testing.assert_close(given["pixel_values"], adapter.collate(FACES[:1]).inputs["pixel_values"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "auto"])
def test_data_types(saved: Path, dtype: str, tmp_path: Path) -> None:
    exact = load_model(saved, device="cpu")
    loaded = load_model(saved, device="cpu", dtype=dtype)
    assert next(loaded.model.parameters()).dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    torch.testing.assert_close(log_probs(loaded, QA), log_probs(exact, QA), atol=2e-2, rtol=0)
    assert not loaded.adapter.whole_logits  # type: ignore[attr-defined]
    assert loaded.adapter.generate(loaded.model, QA, 4) == [
        loaded.adapter.generate(loaded.model, [s], 4)[0] for s in QA
    ]
    save_model(loaded, tmp_path / "b")
    kept = load_model(tmp_path / "b", device="cpu", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(kept.model.parameters(), loaded.model.parameters(), strict=True))


def test_real_model_with_tied_weights(tmp_path: Path) -> None:
    loaded = load_model(shared("models/stories260k"), device="cpu")
    assert loaded.adapter.context == 512  # type: ignore[attr-defined]
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # type: ignore[union-attr]
    save_model(loaded, tmp_path / "copy")
    assert "lm_head.weight" not in load_file(tmp_path / "copy" / "model.safetensors")
    again = load_model(tmp_path / "copy", device="cpu")
    assert torch.equal(log_probs(loaded, QA), log_probs(again, QA))


def test_presets_and_seeds() -> None:
    sizes = {"tiny-test": (9_000, 13_000), "tiny": (270_000, 350_000), "small": (700_000, 800_000)}
    texts = [
        Sample(id=str(i), subject="x", target=" ".join(f"w{(i * 37 + j * 101) % 3000}ord" for j in range(60)))
        for i in range(120)
    ]
    assert set(sizes) == set(PRESETS)
    for name, (low, high) in sizes.items():
        loaded = init_text(texts, name)
        assert low < sum(p.numel() for p in loaded.model.parameters()) < high, name
    first, same, other = (init_text(QA, "tiny-test", s) for s in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), same.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
    tok: Any = first.adapter.tokenizer  # type: ignore[attr-defined]
    assert tok.get_vocab() == same.adapter.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert len({tok.bos_token_id, tok.eos_token_id, tok.pad_token_id}) == 3
    assert tok.decode(tok("Ünïcode 你好 🎉\n\ttab")["input_ids"], skip_special_tokens=True) == "Ünïcode 你好 🎉\n\ttab"
    state = torch.random.get_rng_state()
    init_text(QA, "tiny-test", 9)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        init_text(QA, "tinny")
    with pytest.raises(UserError, match="none were given"):
        init_text([], "tiny")


# -- what can be wrong -----------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def only_pickle(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def drop_tensor(folder: Path, end: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith(end)}, folder / "model.safetensors", {"format": "pt"})


def more_words(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new", "words"])
    tokenizer.save_pretrained(folder)


def truncate(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])


def forget_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "no model type": (lambda f: edit(f / "config.json", model_type=None), "has no model_type"),
    "strange model type": (
        lambda f: edit(f / "config.json", model_type="lama", architectures=None),
        "did you mean 'llama'",
    ),
    "own code": (
        lambda f: edit(f / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}),
        "needs code from its own folder, which is never run",
    ),
    "an encoder": (lambda f: edit(f / "config.json", architectures=["BertModel"]), "is a BertModel: supported are"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle bin": (lambda f: only_pickle(f, "pytorch_model.bin"), "a pickle, which can run code"),
    "pickle pt": (lambda f: only_pickle(f, "model.pt"), "a pickle.*convert it"),
    "pickle pkl": (lambda f: only_pickle(f, "model.pkl"), "a pickle"),
    "gguf": (lambda f: only_pickle(f, "model.gguf"), "cannot be trained"),
    "other name": (lambda f: only_pickle(f, "weights.safetensors"), "rename 'weights.safetensors'"),
    "empty weights": (lambda f: truncate(f, 0), "is damaged"),
    "cut header": (lambda f: truncate(f, 100), "is damaged"),
    "cut data": (lambda f: truncate(f, -1), "is damaged"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}xx"), "is damaged"),
    "missing tensor": (lambda f: drop_tensor(f, "down_proj.weight"), r"lack 2 tensor\(s\)"),
    "other shape": (lambda f: edit(f / "config.json", intermediate_size=40), r"6 tensor\(s\) .* have another shape"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "lack 9 tensor"),
    "no tokenizer": (forget_tokenizer, "has no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer in .* cannot be loaded"),
    "bigger tokenizer": (more_words, "ids up to 301 and the model 300 embeddings"),
    "lost shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        "lacks 1 of 1 weight files",
    ),
    "vision and text": (lambda f: edit(f / "config.json", vision_config={}, architectures=["XForY"]), "multimodal"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_folders(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, words = WRONG[case]
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(UserError, match=words) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 450


def test_missing_folders_and_hub_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def offline(name: str, **options: Any) -> str:
        asked.append(name)
        assert "*.bin" not in options["allow_patterns"]
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in (tmp_path / "mien", "./mien", "../" + tmp_path.name + "/mien"):
        with pytest.raises(UserError, match=r"does not exist: did you mean '.*mine'\?$"):
            load_model(name)
    with pytest.raises(UserError, match="is a file"):
        load_model(folder / "config.json")
    assert asked == []  # a path is never asked for on the hub
    with pytest.raises(UserError, match="no local folder: did you mean 'mine', and the hub did not give it"):
        load_model("mien")
    with pytest.raises(UserError, match="no route to host"):
        load_model("someone/some-model")
    assert asked == ["mien", "someone/some-model"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    assert load_model("someone/some-model", device="cpu").source == "someone/some-model"
    with pytest.raises(UserError, match=r"has no config.json: did you mean '.*mine'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bf61"}, "unknown dtype 'bf61': did you mean 'bf16'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:x"}, "unknown device"),
        ({"device": "cuda:99"}, "is not there"),
        ({"context": 100_000}, "allowed are 2 to 256"),
        ({"template": "chat"}, "has none"),
    ],
)
def test_wrong_options(saved: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_model(saved, **options)


def test_wrong_adapters(folder: Path, tmp_path: Path) -> None:
    tuned = load_model(folder, device="cpu", lora=LoraOptions(r=2))
    adapter = save_model(tuned, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    edit(config, base_model_name_or_path="../mine")  # relative to the adapter
    assert is_lora(load_model(adapter, device="cpu").model)
    edit(config, base_model_name_or_path="../gone")
    with pytest.raises(UserError, match=r"the base of adapter .* cannot be loaded"):
        load_model(adapter)
    edit(config, base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match="is an adapter itself"):
        load_model(adapter)
    edit(config, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base model"):
        load_model(adapter)
    edit(config, base_model_name_or_path=str(folder), r=3)
    with pytest.raises(UserError, match="does not fit its base"):
        load_model(adapter)
    edit(config, r=2)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is only on one side"):
        load_model(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_model(adapter)
    fresh = init_text(QA, "tiny-test")
    fresh.model = apply_lora(fresh.model, LoraOptions(r=2))
    with pytest.raises(UserError, match="base was never saved"):
        save_model(fresh, tmp_path / "orphan")
    assert not (tmp_path / "orphan").exists()


def test_saving_replaces_models_only_and_is_whole_or_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = init_text(QA, "tiny-test", 5)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no model"):
        save_model(loaded, tmp_path / "papers")
    with pytest.raises(UserError, match="holds no model"):
        save_model(loaded, tmp_path / "papers" / "thesis.tex")
    old = (folder / "model.safetensors").read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(load_module, "_write", fails)
        with pytest.raises(UserError, match="No space left"):
            save_model(loaded, folder)
    assert (folder / "model.safetensors").read_bytes() == old
    save_model(loaded, folder)
    assert (folder / "model.safetensors").read_bytes() != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "papers"]


def test_classifier_without_its_preprocessing_is_refused(tmp_path: Path) -> None:
    save_model(init_classifier(3, 32), tmp_path / "c")
    (tmp_path / "c" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config.json"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("layer", [-4, 3])
def test_image_features_come_from_a_layer_that_exists(tmp_path: Path, layer: int) -> None:
    save_model(init_llava(FACES, 1), tmp_path)
    edit(tmp_path / "config.json", vision_feature_layer=layer)
    with pytest.raises(UserError, match=r"vision_feature_layer\): allowed are -3 to 2, the vision tower has 2 layers"):
        load_model(tmp_path)
