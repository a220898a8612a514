"""Wrong pictures through the command line: one clear sentence, exit code 2, and nothing is written or overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge.cli.main import main

RNG = np.random.default_rng(0)
UNLEARN = "unlearn --model model --out out --method ga"
TALK = "unlearn --model llava --out out --method ga"
GOOD = "unlearn --model model --out out --forget forget.jsonl --retain keep.jsonl"
DATA = "unlearn --model model --out out --method ga --data"


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def rows(path: Path, changed: dict[str, object] | None = None, *, talk: bool = False) -> None:
    """Three good rows, and a fourth with the changes."""
    pictures = [f"kept{i}.png" if path.stem.startswith("keep") else f"good{i}.png" for i in range(4)]
    good: list[dict[str, object]] = [
        {"id": f"{path.stem}-{i}", "image": name, "target": str(i % 3)} for i, name in enumerate(pictures)
    ]
    if talk:
        good = [row | {"prompt": "Who is this?", "target": f"Person {row['target']}"} for row in good]
    kept = [*good[:3], good[3] | (changed or {})]
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in kept]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of three classes, a small LLaVA, and pictures with everything that can be wrong with them."""
    from expunge.data.files import load_files
    from expunge.models.load import save_model
    from expunge.models.tiny import init_classifier, init_llava, init_qwen2vl, init_text

    folder = tmp_path_factory.mktemp("desk")
    for name in (f"{kind}{i}.png" for kind in ("good", "kept") for i in range(4)):
        (folder / name).write_bytes(png(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    (folder / "cut.png").write_bytes((folder / "good0.png").read_bytes()[:200])
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "text.png").write_text("not a picture")
    (folder / "wide.png").write_bytes(png(np.zeros((1, 16, 3), np.uint8)))
    rows(folder / "forget.jsonl")
    rows(folder / "talk.jsonl", talk=True)
    save_model(init_classifier(3, 16), folder / "model")
    spoken = load_files(forget=folder / "talk.jsonl")["forget"]
    for made, name in ((init_llava(spoken), "llava"), (init_qwen2vl(spoken), "qwen"), (init_text(spoken), "speaker")):
        save_model(made, folder / name)
    shutil.copytree(folder / "llava", folder / "unscaled")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / "unscaled" / name).unlink()
    shutil.copytree(folder / "model", folder / "odd")
    odd = json.loads((folder / "odd/preprocessor_config.json").read_text()) | {"image_mean": [0.5, 0.5]}
    (folder / "odd/preprocessor_config.json").write_text(json.dumps(odd))
    for name in ("cut", "bomb", "text", "gone"):
        rows(folder / f"{name}.jsonl", {"image": f"{name}.png"})
        rows(folder / f"talk-{name}.jsonl", {"image": f"{name}.png"}, talk=True)
    rows(folder / "keep.jsonl")
    rows(folder / "keep-talk.jsonl", talk=True)
    rows(folder / "keep-cut.jsonl", {"image": "cut.png"})
    rows(folder / "label.jsonl", {"target": "3"})
    rows(folder / "mixed.jsonl", {"target": "a cat"})
    rows(folder / "imageless.jsonl", {"image": None, "prompt": "Who?", "target": "1"})
    rows(folder / "uncaptioned.jsonl", {"target": None})
    rows(folder / "blank.jsonl", {"target": "  "}, talk=True)
    rows(folder / "twice.jsonl", {"prompt": "<image> and <image>?"}, talk=True)
    rows(folder / "placeless.jsonl", {"image": None, "prompt": "<image> Who?"}, talk=True)
    rows(folder / "answered.jsonl", {"target": "an <image>"}, talk=True)
    (folder / "pickled").mkdir()
    (folder / "pickled/data_batch_1").write_bytes(pickle.dumps({}))
    for name in ("cat", "dog"):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(8):
            picture = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            (folder / "classes" / name / f"{i}.png").write_bytes(png(picture))
    (folder / "classes/dog/8.png").write_bytes(bomb())
    (folder / "empty").mkdir()
    np.savez(folder / "empty" / "x.npz", images=np.zeros((3, 8, 8)), labels=np.arange(3))
    return folder


CASES = {
    "cut off": (f"{UNLEARN} --forget cut.jsonl", ("'cut.png'", "cut-3' is no readable image, it is cut off")),
    "bomb": (f"{UNLEARN} --forget bomb.jsonl", ("'bomb.png'", "more than 67 million pixels")),
    "text called picture": (f"{UNLEARN} --forget text.jsonl", ("'text.png'", "is no readable image")),
    "no such picture": (f"{UNLEARN} --forget gone.jsonl", ("'gone.jsonl' line 4", "'gone.png' does not exist")),
    "cut off in retain": (f"{UNLEARN} --forget forget.jsonl --retain keep-cut.jsonl", ("'cut.png'", "is cut off")),
    "label outside of the classes": (f"{UNLEARN} --forget label.jsonl", ("'label-3' is no class", "0 to 2")),
    "labels and texts": (f"{UNLEARN} --forget mixed.jsonl", ("class number for target", "use one of the two")),
    "no picture": (f"{UNLEARN} --forget imageless.jsonl", ("class number for target", "use one of the two")),
    "no caption": (f"{TALK} --forget uncaptioned.jsonl", ("line 4", "neither text nor target")),
    "blank caption": (f"{TALK} --forget blank.jsonl", ("line 4", "target is empty")),
    "two places for one picture": (f"{TALK} --forget twice.jsonl", ("'twice-3' has 1 image(s) and 2 <image>",)),
    "a place without a picture": (f"{TALK} --forget placeless.jsonl", ("'placeless-3' has 0 image(s) and 1 <image>",)),
    "a place in the answer": (f"{TALK} --forget answered.jsonl", ("'answered-3'", "images stand in prompts")),
    "cut off, with a question": (f"{TALK} --forget talk-cut.jsonl", ("'cut.png'", "is cut off")),
    "bomb, with a question": (f"{TALK} --forget talk-bomb.jsonl", ("'bomb.png'", "67 million pixels")),
    "text method on a classifier": (
        f"{GOOD} --method icu", ("'icu' works on text", "classifier model")
    ),
    "text method on text with pictures": (
        "unlearn -m llava -o out --forget talk.jsonl --retain keep-talk.jsonl --method icu", (
            "'icu' works on text", "multimodal model")
    ),
    "zone on pictures": (
        f"{GOOD} --method zone-store", ("works on text", "classifier model")
    ),
    "questions for a classifier": (f"{UNLEARN} --forget talk.jsonl", ("is no class of this model",)),
    "texts for a classifier": (f"{UNLEARN} --data people", ("no image",)),
    "two places for one picture, Qwen2-VL": (
        "unlearn -m qwen -o out --forget twice.jsonl --method ga", ("1 image(s) and 2 <image> in its text",)
    ),
    "pictures for a text model": (
        "unlearn -m speaker -o out --forget talk.jsonl --method ga", ("has an image, and a text model sees none",)
    ),
    "classes for a text model": ("train -m speaker -o out --data digits", ("sees none",)),
    "classes for a model that speaks": (
        "unlearn -m llava -o out --forget forget.jsonl --method ga", ("is the class number 0", "multimodal model")
    ),
    "LLaVA that builds no classifier": (
        "train --init llava -o out --data digits", ("preset llava is not for classifier data", "resnet")
    ),
    "no processor files": (
        "unlearn -m unscaled -o out --forget talk.jsonl --method ga", ("no preprocessor_config.json", "copy it")
    ),
    "processor of another model": (
        "unlearn -m odd -o out --forget forget.jsonl --method ga", ("1 or 3 finite numbers for image_mean",)
    ),
    "a file for --data-dir": (f"{DATA} images --data-dir empty/x.npz", ("is a file", "the one that the file lies in")),
    "pickled CIFAR": (f"{DATA} cifar10 --data-dir pickled", ("a pickle", "cifar-10-binary.tar.gz")),
    "bomb in a class folder": (f"{DATA} images --data-dir classes", ("dog/8.png'", "67 million pixels")),
    "floats in an npz": (f"{DATA} images --data-dir empty", ("is float64 of shape (3, 8, 8)",)),
    "no class folders": (f"{DATA} images --data-dir pickled", ("no sub-folders with pictures",)),
    "audit": ("audit -m model -o out --forget cut.jsonl --holdout forget.jsonl", ("'cut.png'", "is cut off")),
    "bench": (
        "bench -m model -o out --methods ga --forget forget.jsonl --retain keep-cut.jsonl", ("'cut.png'", "is cut off")
    ),
    "train": ("train -m model -o out --forget cut.jsonl --roles forget", ("'cut.png'", "is cut off")),
}  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_is_written(
    name: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line, says = CASES[name]
    before = content(desk)
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--quiet"])
    out, err = capsys.readouterr()
    left = content(desk)
    shutil.rmtree(desk / "out", ignore_errors=True)  # so that one failure is not all of them
    assert end.value.code == 2, err
    assert out == "" and err.startswith("expunge: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n"))
    for words in says:
        assert words in err
    assert left == before


def test_a_finished_run_is_not_touched_by_a_broken_picture(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    line = f"unlearn -m model --method ga --epochs 1 --suite none --out {tmp_path / 'run'} --quiet --forget"
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "forget.jsonl"])
    assert end.value.code == 0
    before = content(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "cut.jsonl"])
    assert end.value.code == 2 and content(tmp_path) == before
