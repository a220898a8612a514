"""Qwen2-VL: patches against transformers' own processor, the seam, padding, LoRA, folders, wrong inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.methods.scope import get_scope
from expunge.models.adapter import evaluating
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora, without_adapter
from expunge.models.qwen2vl import PatchPreprocess, Qwen2VLAdapter
from expunge.models.sampling import sample_texts
from expunge.models.tiny import init_qwen2vl
from expunge.training.loop import TrainOptions, fit

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
SHAPES = [(32, 32), (20, 44), (64, 32), (50, 50)]
FACES = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
MIXED = [
    Sample(id="a", subject="a", prompt="Who is in the picture?", target="Ada Lovelace, who wrote.", image=FACES[0]),
    Sample(id="b", subject="b", prompt="What is the capital of France?", target="Paris"),
    Sample(id="c", subject="c", prompt="Name?", target="Grace Hopper", image=FACES[1]),
    Sample(id="d", subject="d", prompt="Look at <image> and say who it is.", target="Alan", image=FACES[2]),
    Sample(id="e", subject="e", target="A woman at a desk.", image=FACES[3]),
]


@pytest.fixture
def qwen() -> tuple[Any, Qwen2VLAdapter]:
    loaded = init_qwen2vl(MIXED, seed=1)
    assert isinstance(loaded.adapter, Qwen2VLAdapter)
    return loaded.model, loaded.adapter


def vision(patch: int, merge: int = 2, temporal: int = 2) -> Any:
    return Qwen2_5_VLConfig(
        vision_config={"patch_size": patch, "spatial_merge_size": merge, "temporal_patch_size": temporal}
    ).vision_config


# -- patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (28, 28), (200, 17), (9, 5)])
@pytest.mark.parametrize(
    ("patch", "merge", "bounds"),
    [
        (14, 2, {}),
        (4, 2, {"shortest_edge": 256, "longest_edge": 900}),
        (4, 1, {"shortest_edge": 64, "longest_edge": 4096}),
    ],
)
def test_patches_equal_transformers(shape: tuple[int, int], patch: int, merge: int, bounds: dict[str, int]) -> None:
    more = {"size": bounds} if bounds else {}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=merge, **more)
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(image), return_tensors="np")
    ours = PatchPreprocess.of(processor.to_dict(), vision(patch, merge))
    pixels = ours.pixels(Sample(id="x", subject="x", target="x", image=image))
    np.testing.assert_allclose(ours.patches_PF(pixels).numpy(), expected["pixel_values"], atol=1e-5)
    assert [1, pixels.shape[0] // patch, pixels.shape[1] // patch] == expected["image_grid_thw"][0].tolist()
    again = PatchPreprocess.of(replace(ours, raw={}).config(), vision(patch, merge))
    assert again == ours


def test_sides_of_many_images() -> None:
    ours = PatchPreprocess(height=14, width=14)
    for _ in range(500):
        height, width = (int(v) for v in np.exp(RNG.uniform(np.log(14), np.log(4000), 2)))
        if max(height, width) <= 200 * min(height, width):
            assert ours.sides(height, width) == smart_resize(height, width)


def test_patches_by_their_definition() -> None:
    """Number (c, t, y, x) of patch k: pixel of its token's corner, its place in the token, itself."""
    ours = PatchPreprocess(height=2, width=2, patch=2, merge=2, least=1, most=1 << 20, mean=(0.0,), std=(1.0,), scale=1)
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    found = ours.patches_PF(ours.pixels(Sample(id="x", subject="x", target="x", image=image)))
    assert found.shape == (4 * 6, 3 * 2 * 2 * 2)
    k = 0
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            for inner in ((0, 0), (0, 2), (2, 0), (2, 2)):
                y, x = top + inner[0], left + inner[1]
                wanted = [
                    image[y + i, x + j, c] for c in range(3) for _ in range(2) for i in range(2) for j in range(2)
                ]
                assert found[k].tolist() == wanted
                k += 1


# -- the seam ------------------------------------------------------------------------------------------------------


def test_the_seam_is_the_models_own_loss(qwen: tuple[Any, Qwen2VLAdapter]) -> None:
    model, adapter = qwen
    assert not adapter.whole_logits
    batch = adapter.collate(MIXED)
    grids = batch.inputs["image_grid_thw"]
    assert batch.inputs["pixel_values"].shape == (int(grids.prod(1).sum()), 3 * 2 * 4 * 4)
    seen = batch.inputs["input_ids"] == adapter.image_token_id
    assert torch.equal(seen.long(), batch.inputs["mm_token_type_ids"])
    assert seen.sum(1).tolist() == [16, 0, int(grids[1].prod()) // 4, int(grids[2].prod()) // 4, 16]
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[batch.sample_N, batch.cols_N + 1] = batch.targets_N
    assert (labels[labels != -100] == batch.inputs["input_ids"][labels != -100]).all()
    assert adapter.tokenizer.decode(labels[2][labels[2] != -100]) == " Grace Hopper</s>"
    with evaluating(model):
        own = model(**batch.inputs, labels=labels).loss
        ours = -adapter.positions(model, MIXED).log_prob_N().mean()
    assert float(ours) == pytest.approx(float(own), abs=1e-5)


def test_batches_equal_single_samples_and_padding_decides_nothing(qwen: tuple[Any, Qwen2VLAdapter]) -> None:
    model, adapter = qwen
    fit(model, adapter, MIXED, TrainOptions(epochs=30, batch_size=5, learning_rate=3e-3))
    with evaluating(model):
        together = adapter.positions(model, MIXED)
        for row, sample in enumerate(MIXED):
            alone = adapter.positions(model, [sample]).log_prob_N()
            torch.testing.assert_close(together.log_prob_N()[together.sample_N == row], alone, atol=1e-4, rtol=0)
        assert set(adapter.collate([MIXED[1]]).inputs) == {"input_ids", "attention_mask"}
    answers = adapter.generate(model, MIXED, 6)
    assert answers == [adapter.generate(model, [s], 6)[0] for s in MIXED]
    assert answers == [greedy(model, adapter, s, 6) for s in MIXED] and len(set(answers)) == 5
    assert [a[0] for a in sample_texts(model, adapter, MIXED, n=1, max_new_tokens=6, temperature=1e-4)] == answers
    assert len(adapter.blocks(model)) == 2 and "Decoder" in type(adapter.blocks(model)[0]).__name__


def greedy(model: Any, adapter: Qwen2VLAdapter, sample: Sample, steps: int) -> str:
    """Token by token, the whole text anew for each, without cache or padding."""
    ids = list(adapter.prompt_ids(sample, steps))
    start = len(ids)
    while len(ids) < start + steps:
        ids_1T = torch.tensor([ids])
        with evaluating(model):
            out = model(input_ids=ids_1T, **adapter.extra_inputs([sample], ids_1T), use_cache=False).logits[0, -1]
        ids.append(int(out.argmax()))
        if ids[-1] == adapter.tokenizer.eos_token_id:
            ids.pop()
            break
    return str(adapter.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_it_learns_who_is_who_from_the_pixels() -> None:
    faces = [
        Sample(id=str(i), subject=str(i), prompt="Who is this?", target=f"Person {n}", image=image)
        for i, (n, image) in enumerate(zip("ABCD", FACES, strict=True))
    ]
    loaded = init_qwen2vl(faces, seed=0)
    fit(loaded.model, loaded.adapter, faces, TrainOptions(epochs=100, batch_size=4, learning_rate=3e-3))
    wanted = [f"Person {n}" for n in "ABCD"]
    assert loaded.adapter.generate(loaded.model, faces, 8) == wanted
    swapped = [replace(s, image=t.image) for s, t in zip(faces, (*faces[1:], faces[0]), strict=True)]
    assert loaded.adapter.generate(loaded.model, swapped, 8) == [*wanted[1:], wanted[0]]


def test_lora_teacher_is_the_original(qwen: tuple[Any, Qwen2VLAdapter]) -> None:
    model, adapter = qwen
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


@pytest.mark.parametrize("name", ["npo", "rmu", "mmunlearner", "scrub", "llmu", "salun", "ssd", "cluster"])
def test_methods_run_and_forget(name: str) -> None:
    loaded = init_qwen2vl(MIXED, seed=1)
    fit(loaded.model, loaded.adapter, MIXED, TrainOptions(epochs=40, batch_size=5, learning_rate=3e-3))
    method = get_method(name)
    few: dict[str, Any] = {"ssd": {"alpha": 2.0}, "cluster": {"steps": 20}, "rmu": {"coefficient": 6.5, "layer": 1}}
    options = few.get(name, {})
    if name not in ("ssd", "cluster"):
        options |= {"epochs": 12, "batch_size": 2, "retain_batch": 3, "learning_rate": 5e-3}

    def loss(samples: list[Sample]) -> float:
        with evaluating(loaded.model):
            return float(-loaded.adapter.positions(loaded.model, samples).log_prob_N().mean())

    before = loss(MIXED[:2])
    # Patches of all images stand in one row: the flagship cannot tell whose they are, and edits the language tower.
    scope = get_scope("layers", {"tower": "language"}) if name == "cluster" else None
    method(Context(loaded.model, loaded.adapter, MIXED[:2], MIXED[2:], scope=scope), method.configure(options))
    assert loss(MIXED[:2]) > before + 0.2


# -- folders -------------------------------------------------------------------------------------------------------


def test_folders_are_ordinary_ones(qwen: tuple[Any, Qwen2VLAdapter], tmp_path: Path) -> None:
    model, adapter = qwen
    save_model(Loaded(model, adapter, ""), tmp_path / "m")
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "m")
    given = processor(Image.fromarray(FACES[1]), return_tensors="pt")
    ours = adapter.collate([MIXED[2]]).inputs
    torch.testing.assert_close(given["pixel_values"], ours["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(given["image_grid_thw"], ours["image_grid_thw"])
    file = tmp_path / "m" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 14}))
    with pytest.raises(UserError, match="has patch_size 14 and the model 4: image tokens would not match the image"):
        load_model(tmp_path / "m", device="cpu")


def test_the_next_generation_goes_the_same_way(qwen: tuple[Any, Qwen2VLAdapter], tmp_path: Path) -> None:
    """Qwen2.5-VL: attention within windows, everything around it alike."""
    old, adapter = qwen
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config=old.config.text_config.to_dict(),
        tie_word_embeddings=False,
        **{f"{k}_token_id": getattr(old.config, f"{k}_token_id")
           for k in ("image", "video", "vision_start", "vision_end")},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    save_model(Loaded(model, adapter, ""), tmp_path / "m")
    again = load_model(tmp_path / "m", device="cpu")
    assert isinstance(again.adapter, Qwen2VLAdapter) and again.adapter.marks == adapter.marks
    with evaluating(again.model):
        together = again.adapter.positions(again.model, MIXED)
        alone = torch.cat([again.adapter.positions(again.model, [s]).log_prob_N() for s in MIXED])
    torch.testing.assert_close(together.log_prob_N(), alone, atol=1e-4, rtol=0)


def test_wrong_samples(qwen: tuple[Any, Qwen2VLAdapter]) -> None:
    _, adapter = qwen
    for change, words in [
        ({"prompt": "<image> <image>"}, r"has 1 image\(s\) and 2 <image> in its text"),
        ({"prompt": "<image>?", "image": None}, r"has 0 image\(s\) and 1 <image> in its text"),
        ({"prompt": "<|image_pad|><|image_pad|>"}, r"has 1 image\(s\) and 2"),
        ({"target": "an <|image_pad|>"}, "images stand in prompts"),
        ({"image": np.zeros((2, 500, 3), np.uint8)}, "is a strip of 500 x 2: one side may be at most 200 times"),
        ({"image": np.zeros((4, 4))}, "float64"),
    ]:
        fields: dict[str, Any] = {"id": "w", "subject": "w", "prompt": "Who?", "target": "x", "image": FACES[0]}
        with pytest.raises(UserError, match=words):
            adapter.encode(Sample(**(fields | change)))  # type: ignore[operator]
    adapter.context = 12
    with pytest.raises(UserError, match="an image takes 16 tokens and the context is 12"):
        adapter.encode(MIXED[0])
    adapter.context = 26
    cut = adapter.encode(MIXED[0])
    assert cut.ids.count(adapter.image_token_id) == 16 and len(cut.ids) == 26 and "a" in adapter.truncated
    end = cut.ids.index(adapter.image_token_id) + 16
    assert adapter.tokenizer.decode([cut.ids[end]]) == "<|vision_end|>"


def test_a_chat_template_puts_the_image_in_its_place(qwen: tuple[Any, Qwen2VLAdapter]) -> None:
    _, own = qwen
    own.tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% for c in m['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
        "{{ ' </s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    adapter = Qwen2VLAdapter(
        tokenizer=own.tokenizer, preprocess=own.preprocess, image_token_id=own.image_token_id, context=200
    )
    for sample in (MIXED[0], replace(MIXED[0], prompt="<image>Who is in the picture?")):
        coded = adapter.encode(sample)
        shown = own.tokenizer.decode(coded.ids[: coded.first]).replace("<|image_pad|>" * 16, "[16]")
        assert shown.removeprefix("<s>") == (
            "[user] <|vision_start|>[16]<|vision_end|>Who is in the picture? </s>\n[assistant]"
        )
        assert own.tokenizer.decode(coded.ids[coded.first :]).startswith(" Ada Lovelace, who wrote. </s>")
