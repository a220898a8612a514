"""Classifier and LLaVA adapters: the seam, batches, preprocessing against transformers' own, wrong inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.images import BICUBIC, BILINEAR, Preprocess
from expunge.models.load import load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora, without_adapter
from expunge.models.multimodal import LlavaAdapter
from expunge.models.tiny import init_classifier, init_llava

torch.set_num_threads(1)
RNG = np.random.default_rng(0)


def pictures(number: int, size: int = 28, channels: int = 3) -> list[Sample]:
    return [
        Sample(
            id=str(i), subject=str(i), target=i % 4, image=RNG.integers(0, 256, (size, size, channels), dtype=np.uint8)
        )
        for i in range(number)
    ]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_classifier_seam(arch: Any, lora: bool) -> None:
    loaded = init_classifier(4, 28, 1, arch=arch, seed=3)
    model, adapter = loaded.model, loaded.adapter
    if lora:
        model = apply_lora(model, LoraOptions(r=2), seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        adapter.bind(model)  # type: ignore[attr-defined]
    assert not adapter.whole_logits  # type: ignore[attr-defined]
    samples = pictures(7, 28, 1)
    batch = adapter.collate(samples)
    with evaluating(model):
        own = model(**batch.inputs, labels=batch.targets_N)
        seam = adapter.positions(model, samples)
        assert seam.vocab == 4 and seam.targets_N.tolist() == [i % 4 for i in range(7)]
        assert float(-seam.log_prob_N().mean()) == pytest.approx(float(own.loss), abs=1e-6)
        for i, sample in enumerate(samples):
            alone = adapter.positions(model, [sample]).log_prob_N()
            torch.testing.assert_close(alone, seam.log_prob_N()[i : i + 1], atol=1e-5, rtol=0)
    model.train()
    (-adapter.positions(model, samples).log_prob_N().mean()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert len(adapter.blocks(model)) == 3


def test_classifier_with_a_head_that_is_not_linear_uses_whole_logits() -> None:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    from expunge.models.classifier import ClassifierAdapter

    torch.manual_seed(0)
    model = MobileNetV1ForImageClassification(MobileNetV1Config(image_size=32, depth_multiplier=0.1, num_labels=4))
    model.eval()
    model.classifier = torch.nn.Sequential(model.classifier, torch.nn.Softplus())
    adapter = ClassifierAdapter(preprocess=Preprocess(height=32, width=32), num_classes=4).bind(model)
    assert adapter.whole_logits
    batch = adapter.collate(pictures(3, 32))
    with evaluating(model):
        seam = adapter.positions(model, pictures(3, 32))
        assert seam.vocab == 4
        hidden, head = adapter.hidden_and_head(model, batch)
        own = cross_entropy(model(**batch.inputs).logits, batch.targets_N)
        ours = cross_entropy(head(hidden), batch.targets_N)
    assert float(ours) == pytest.approx(float(own))


def test_classifier_learns_and_flops_are_those_of_the_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    loaded = init_classifier(4, 16, 3, seed=0)
    samples = pictures(16, 16)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    loaded.model.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss = -loaded.adapter.positions(loaded.model, samples).log_prob_N().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    with evaluating(loaded.model):
        before = loaded.adapter.meter.flops
        with FlopCounterMode(display=False) as counter:
            loaded.adapter.positions(loaded.model, samples)
        assert loaded.adapter.meter.flops - before == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 64, 3), (64, 40, 3), (28, 28, 3), (20, 17, 3)])
@pytest.mark.parametrize("name", ["CLIP", "ViT", "ConvNext", "ConvNextLarge"])
def test_preprocessing_equals_transformers(name: str, shape: tuple[int, int, int]) -> None:
    import transformers as hf

    constants = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]}
    processor: Any
    if name == "CLIP":
        processor = hf.CLIPImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, resample=BICUBIC, **constants
        )
    elif name == "ViT":
        processor = hf.ViTImageProcessorPil(size={"height": 24, "width": 20}, resample=BILINEAR, **constants)
    else:
        edge = 28 if name == "ConvNext" else 384
        processor = hf.ConvNextImageProcessorPil(
            size={"shortest_edge": edge}, crop_pct=0.875, resample=BICUBIC, **constants
        )
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    ours = Preprocess.read(processor.to_dict(), size=24, channels=3)
    got = ours.tensor(ours.pixels(Sample(id="x", subject="x", target=0, image=image))[None])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    again = Preprocess.read(ours.config(), size=24, channels=3)
    assert again == ours


def test_images_from_files_arrays_and_other_modes(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    plain = Preprocess(height=28, width=28)
    sample = Sample(id="x", subject="x", target=0, image=array)
    np.testing.assert_array_equal(plain.pixels(sample), array)
    np.testing.assert_array_equal(plain.pixels(Sample(id="x", subject="x", target=0, image=tmp_path / "a.png")), array)
    grey = Preprocess(height=28, width=28, channels=1)
    assert grey.pixels(sample).shape == (28, 28, 1)
    flat = Sample(id="x", subject="x", target=0, image=array[:, :, 0])
    np.testing.assert_array_equal(plain.pixels(flat), np.repeat(array[:, :, :1], 3, axis=2))
    assert plain.pixels(Sample(id="x", subject="x", target=0, image=np.dstack([array, array[:, :, :1]]))).shape[2] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": None}, "has no image"),
        ({"image": Path("nowhere.png")}, "does not exist"),
        ({"image": Path(__file__)}, "no readable image"),
        ({"image": np.zeros((4, 4, 3))}, "float64"),
        ({"image": np.zeros((4, 4, 2), np.uint8)}, r"\(4, 4, 2\)"),
        ({"target": 4}, "0 to 3"),
        ({"target": -1}, "0 to 3"),
        ({"target": "cat"}, "no class"),
    ],
)
def test_wrong_classifier_samples(change: dict[str, Any], words: str) -> None:
    adapter = init_classifier(4, 16, 3).adapter
    fields: dict[str, Any] = {"id": "s7", "subject": "s", "target": 0, "image": np.zeros((16, 16, 3), np.uint8)}
    with pytest.raises(UserError, match=words):
        adapter.collate([Sample(**{**fields, **change})])


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"channels": 2}, {"image_size": 4}, {"arch": "resnot"}])
def test_wrong_classifier_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        init_classifier(**{"num_classes": 4, **options})
    with pytest.raises(UserError):
        init_classifier(4, 16, 3, mean=(0.5, 0.5))


def test_same_id_other_image_is_another_sample() -> None:
    adapter = init_classifier(4, 16, 3).adapter
    for value in range(50):  # arrays die at once, so that their ids are used again
        sample = Sample(id="x", subject="x", target=0, image=np.full((16, 16, 3), value, np.uint8))
        assert int(adapter.cached(sample)[0][0, 0, 0]) == value


# -- LLaVA -----------------------------------------------------------------------------------------------------------

FACES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
MIXED = [
    Sample(id="a", subject="a", prompt="Who is in the picture?", target="Ada Lovelace, who wrote.", image=FACES[0]),
    Sample(id="b", subject="b", prompt="What is the capital of France?", target="Paris"),
    Sample(id="c", subject="c", prompt="Name?", target="Grace Hopper", image=FACES[1]),
    Sample(id="d", subject="d", prompt="Look at <image> and say who it is.", target="Alan", image=FACES[2]),
    Sample(id="e", subject="e", target="A woman at a desk.", image=FACES[1]),
]


@pytest.fixture
def llava() -> tuple[Any, LlavaAdapter]:
    loaded = init_llava(MIXED, seed=1)
    assert isinstance(loaded.adapter, LlavaAdapter)
    return loaded.model, loaded.adapter


def test_llava_seam_equals_labels(llava: tuple[Any, LlavaAdapter]) -> None:
    model, adapter = llava
    assert not adapter.whole_logits
    batch = adapter.collate(MIXED)
    assert batch.inputs["pixel_values"].shape == (4, 3, 32, 32)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[batch.sample_N, batch.cols_N + 1] = batch.targets_N
    assert (labels[labels != -100] == batch.inputs["input_ids"][labels != -100]).all()
    with evaluating(model):
        own = model(**batch.inputs, labels=labels).loss
        ours = -adapter.positions(model, MIXED).log_prob_N().mean()
    assert float(ours) == pytest.approx(float(own), abs=1e-5)


def test_llava_batches_equal_single_samples(llava: tuple[Any, LlavaAdapter]) -> None:
    model, adapter = llava
    with evaluating(model):
        together = adapter.positions(model, MIXED)
        for row, sample in enumerate(MIXED):
            alone = adapter.positions(model, [sample]).log_prob_N()
            torch.testing.assert_close(together.log_prob_N()[together.sample_N == row], alone, atol=1e-5, rtol=0)
        text_only = adapter.collate([MIXED[1]])
        assert "pixel_values" not in text_only.inputs
    assert adapter.generate(model, MIXED, 6) == [adapter.generate(model, [s], 6)[0] for s in MIXED]
    assert len(adapter.blocks(model)) == 2
    assert "vision" not in type(adapter.blocks(model)[0]).__name__.lower()


def test_llava_learns_who_is_who_from_the_pixels() -> None:
    faces = [
        Sample(id=str(i), subject=str(i), prompt="Who is this?", target=f"Person {n}", image=image)
        for i, (n, image) in enumerate(zip("ABC", FACES, strict=True))
    ]
    loaded = init_llava(faces, seed=0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (-loaded.adapter.positions(loaded.model, faces).log_prob_N().mean()).backward()
        optimizer.step()
    assert loaded.adapter.generate(loaded.model, faces, 8) == ["Person A", "Person B", "Person C"]


def test_llava_lora_teacher_is_the_original(llava: tuple[Any, LlavaAdapter]) -> None:
    model, adapter = llava
    with evaluating(model):
        before = adapter.positions(model, MIXED).log_prob_N()
    wrapped = apply_lora(model, LoraOptions(r=2), seed=0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    with evaluating(wrapped):
        assert not torch.allclose(adapter.positions(wrapped, MIXED).log_prob_N(), before)
    with without_adapter(wrapped):
        assert torch.equal(adapter.positions(wrapped, MIXED).log_prob_N(), before)


def test_llava_wrong_samples(llava: tuple[Any, LlavaAdapter]) -> None:
    _, adapter = llava
    for change, words in [
        ({"prompt": "<image> <image>"}, "2 <image>"),
        ({"prompt": "<image>?", "image": None}, "0 image"),
        ({"target": "an <image>"}, "images stand in prompts"),
    ]:
        fields: dict[str, Any] = {"id": "w", "subject": "w", "prompt": "Who?", "target": "x", "image": FACES[0]}
        with pytest.raises(UserError, match=words):
            adapter.encode(Sample(**{**fields, **change}))
    adapter.context = 12
    with pytest.raises(UserError, match="an image takes 16 tokens"):
        adapter.encode(MIXED[0])
    adapter.context = 24
    cut = adapter.encode(MIXED[0])
    assert cut.ids.count(adapter.image_token_id) == 16 and len(cut.ids) == 24 and "a" in adapter.truncated


def test_llava_chat_template_puts_the_image_in_its_place() -> None:
    loaded = init_llava(MIXED, seed=1)
    tokenizer = loaded.adapter.tokenizer  # type: ignore[attr-defined]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
        "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    adapter = LlavaAdapter(
        tokenizer=tokenizer,
        preprocess=loaded.adapter.preprocess,  # type: ignore[attr-defined]
        image_token_id=loaded.adapter.image_token_id,  # type: ignore[attr-defined]
        image_tokens=16,
    )
    coded = adapter.encode(MIXED[0])
    shown = tokenizer.decode(coded.ids[: coded.first]).replace("<image>" * 16, "[16]")
    assert shown == "<s>USER: [16]\nWho is in the picture? ASSISTANT:"
    assert tokenizer.decode(coded.ids[coded.first :]) == " Ada Lovelace, who wrote.</s>"


def test_llava_folder_whose_processor_is_of_another_model(tmp_path: Path) -> None:
    """Pictures of another size would give another number of features than the text has places."""
    save_model(init_llava(MIXED, seed=1), tmp_path / "m")
    file = tmp_path / "m" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 48, "width": 48}}))
    with pytest.raises(UserError, match="makes images of 48 x 48 and the model takes 32 x 32: image tokens would not"):
        load_model(tmp_path / "m", device="cpu")
