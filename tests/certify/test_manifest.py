"""The manifest binds names, contents and sizes of every file, and nothing that is no file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import rfc8785
from tests.certify.certificate_cases import write_model

from expunge.certify import vendored
from expunge.certify.vendored import Broken, Unreadable, compare, manifest_digest, manifest_of, oms_root, portable


def test_a_slow_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendored, "BLOCK", 7)  # streamed in blocks, with a rest
    folder = write_model(tmp_path / "model", size=100)
    (folder / ".hidden").write_bytes(b"")
    slow = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": len(path.read_bytes()),
        }
        for path in folder.rglob("*")
        if path.is_file()
    }
    found = manifest_of(folder)
    assert found == slow and list(found) == sorted(slow) and ".hidden" in found and "nested/zone.json" in found
    assert manifest_digest(found) == hashlib.sha256(rfc8785.dumps(slow)).hexdigest()


def test_names_are_bound_by_the_digest_and_not_by_the_oms_root(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")
    before = manifest_of(folder)
    (folder / "b").rename(folder / "c")
    after = manifest_of(folder)
    assert oms_root(before) == oms_root(after)
    assert manifest_digest(before) != manifest_digest(after)


def test_the_oms_root_is_that_of_model_signing(tmp_path: Path) -> None:
    hashing = pytest.importorskip("model_signing.hashing")
    signing = pytest.importorskip("model_signing._signing.signing")
    folder = write_model(tmp_path / "model")
    for name in ("nested.json", "nested-1", "Z", "nested/a"):  # names that sort unlike their parts
        (folder / name).write_text(name)
    theirs = signing.Payload(hashing.Config().hash(folder)).statement.pb.subject[0].digest["sha256"]
    assert oms_root(manifest_of(folder)) == theirs


def test_what_differs_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    certified = manifest_of(folder)
    assert [f.state for f in compare(certified, manifest_of(folder))] == ["holds"]
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "extra.bin").write_text("")
    found = compare(certified, manifest_of(folder))
    assert [f.state for f in found] == ["refuted"] * 3
    texts = " ".join(f.text for f in found)
    assert "changed: config.json" in texts and "missing: tokenizer.json" in texts and "extra.bin" in texts
    many = {**certified, **{f"shard-{i}": certified["config.json"] for i in range(20)}}
    assert "20 file(s)" in compare(many, certified)[0].text and "shard-9" not in compare(many, certified)[0].text


def test_equal_sizes_and_swapped_contents_differ(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "a").write_text("xx")
    (folder / "b").write_text("yy")
    certified = manifest_of(folder)
    (folder / "a").write_text("yy")
    (folder / "b").write_text("xx")
    assert "2 file(s) of the model changed: a, b" in compare(certified, manifest_of(folder))[0].text


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    for number, make in enumerate(
        (
            lambda folder: (folder / "link").symlink_to(outside),
            lambda folder: (folder / "link").symlink_to(folder / "config.json"),
            lambda folder: (folder / "nested" / "link").symlink_to(tmp_path, target_is_directory=True),
            lambda folder: (folder / "link").symlink_to("nowhere"),
            lambda folder: os.mkfifo(folder / "pipe"),
            lambda folder: (folder / "back\\slash").write_text(""),
            lambda folder: (folder / "new\nline").write_text(""),
            lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_text(""),
        )
    ):
        folder = write_model(tmp_path / f"model-{number}")
        make(folder)
        with pytest.raises(Broken, match=r"(link|pipe|back|line|ufffd|\ufffd).*(link|plain file|rename)") as refused:
            manifest_of(folder)
        assert "\n" not in str(refused.value)
    (tmp_path / "root").symlink_to(write_model(tmp_path / "real"), target_is_directory=True)
    assert manifest_of(tmp_path / "root") == manifest_of(tmp_path / "real")  # the folder itself is the user's choice


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for name, word in {"file": "no folder", "missing": "no folder", "empty": "no file"}.items():
        with pytest.raises(Unreadable, match=word):
            manifest_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "a/b.json", ".hidden", "ü/模型.bin", "a b", "..a"])
def test_portable_names(name: str) -> None:
    assert portable(name)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", "a/", "./a", "C:/a", "a\\b", "a\x00", "a\u202eb"])
def test_names_that_lead_out_or_deceive(name: str) -> None:
    assert not portable(name)
