"""The store against a slow reading of its definition; blocks on disk, their keys, and tampering."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.data.samples import Sample, subjects
from expunge.errors import UserError
from expunge.files import write_json
from expunge.models.load import Loaded, load_model, save_model
from expunge.signals.forward import collect
from expunge.zones.model import ZonedModel
from expunge.zones.storage import block_name, destroy_key, key_file, pack_block, seal, unpack_block, unseal
from expunge.zones.store import TAIL, WINDOW
from expunge.zones.zone import Routes, Seen
from zone_cases import adapter, base, document, private, probes, public, world, zone_of, zoned

torch.set_num_threads(1)


def slow_log_probs(sample: Sample, t: int) -> np.ndarray:
    """Position ``t`` of the mixed distribution, one row after another, in float64."""
    model, arrays, constants = world()[0].model, public().arrays, public().constants
    zone = zone_of(private())
    ids = adapter().cached(sample).ids
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    p_base = out.logits[0, t].double().softmax(0).numpy()
    state = np.concatenate([out.hidden_states[layer][0, t].numpy() for layer in constants["layers"]]).astype(float)
    key = ((state - arrays["mean"]) / arrays["deviation"]) @ arrays["map"].astype(float)
    idf = arrays["idf"].astype(float)

    def cosine(a: set[int], b: set[int]) -> float:
        return sum(idf[i] ** 2 for i in a & b) / math.sqrt(sum(idf[i] ** 2 for i in a) * sum(idf[i] ** 2 for i in b))

    def tail(a: Sequence[int], b: Sequence[int]) -> float:
        same = 0
        while same < min(TAIL, len(a), len(b)) and a[-1 - same] == b[-1 - same]:
            same += 1
        return same / TAIL

    rows = []
    bag = set(ids[: t + 1][-WINDOW:])
    for row in zone.blocks[sample.subject].sorted():
        record = row.record
        for n, end in enumerate(range(record.first, len(record.ids))):
            stored = row.tensors["keys"][n].astype(float)
            near = float(stored @ key / np.linalg.norm(stored) / np.linalg.norm(key))
            alike = cosine(bag, set(record.ids[:end][-WINDOW:]))
            score = near + constants["beta"] * alike + constants["gamma"] * tail(ids[: t + 1], record.ids[:end])
            rows.append((score, near, record.ids[end]))
    rows.sort(key=lambda r: -r[0])
    best = rows[: zone.options.neighbours]
    weight = np.exp([constants["sharpness"] * (r[0] - best[0][0]) for r in best])
    votes = np.zeros_like(p_base)
    for w, (_, _, token) in zip(weight / weight.sum(), best, strict=True):
        votes[token] += w
    x = [best[0][0] / (1 + constants["beta"] + constants["gamma"]), best[0][1], votes.max(), math.log(p_base.max())]
    x.append(max(math.log(p_base[votes.argmax()]), -20) / 10)
    hidden = np.tanh(np.array(x) @ arrays["mix.w"] + arrays["mix.b"])
    chance = 1 / (1 + math.exp(-float(hidden @ arrays["mix.v"] + arrays["mix.c"][0])))
    mixed: np.ndarray = np.log((1 - chance) * p_base + chance * votes)
    return mixed


def test_the_mixture_is_what_it_is_defined_as() -> None:
    model = zoned()
    for s in (private()[2], probes(private())[8], probes(private(), "restated")[11]):
        coded = adapter().cached(s)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([coded.ids])).logits[0]
        for t in range(coded.first - 1, len(coded.ids) - 1, 3):
            assert logits_TV[t].numpy() == pytest.approx(slow_log_probs(s, t), abs=2e-3)


def test_votes_are_a_plain_count_of_the_nearest_rows_whatever_else_is_asked() -> None:
    """Ties, repeated tokens and padding included: a stable sort and a dictionary of sums, position by position."""
    zone = zone_of(private())
    asked = [private()[1], private()[6], probes(private())[3]]
    batch = adapter().collate(asked)
    with torch.no_grad():
        out = world()[0].model(**batch.inputs, output_hidden_states=True)
    ids_BS, mask_BS = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    subject = asked[0].subject
    routes = Routes.of([subject], np.where(mask_BS.numpy() > 0, 0, -1))
    seen = Seen(world()[0].model, ids_BS, mask_BS, out.hidden_states, out.logits.log_softmax(-1), routes)
    place_M = routes.opened[0]
    votes = zone.votes(seen, subject, place_M)
    rows = zone.blocks[subject].sorted()
    tokens_R = np.concatenate([r.tensors["values"] for r in rows])
    keys_RK = np.concatenate([r.tensors["keys"] for r in rows]).astype(float)
    arrays, constants = zone.public.arrays, zone.public.constants
    idf2_V = np.square(arrays["idf"].astype(float))
    ends = [r.record.ids[:end] for r in rows for end in range(r.record.first, len(r.record.ids))]
    for m, place in enumerate(place_M.tolist()):
        b, t = divmod(place, ids_BS.shape[1])
        line = ids_BS[b, : t + 1][mask_BS[b, : t + 1] > 0].tolist()
        state = np.concatenate([out.hidden_states[layer][b, t].numpy() for layer in constants["layers"]]).astype(float)
        key = ((state - arrays["mean"]) / arrays["deviation"]) @ arrays["map"].astype(float)
        near_R = keys_RK @ key / np.linalg.norm(keys_RK, axis=1) / np.linalg.norm(key)
        bag = set(line[-WINDOW:])
        score_R = near_R.copy()
        for r, end in enumerate(ends):
            other = set(end[-WINDOW:])
            length = math.sqrt(sum(idf2_V[list(bag)]) * sum(idf2_V[list(other)]))
            same = next((i for i in range(TAIL) if i >= min(len(line), len(end)) or line[-1 - i] != end[-1 - i]), TAIL)
            score_R[r] += constants["beta"] * sum(idf2_V[list(bag & other)]) / max(length, 1e-12)
            score_R[r] += constants["gamma"] * same / TAIL
        nearest = np.argsort(-score_R, kind="stable")[: zone.options.neighbours]
        weights = np.exp(constants["sharpness"] * (score_R[nearest] - score_R[nearest[0]]))
        wanted: dict[int, float] = {}
        for token, weight in zip(tokens_R[nearest].tolist(), (weights / weights.sum()).tolist(), strict=True):
            wanted[token] = wanted.get(token, 0.0) + weight
        for token, chance in wanted.items():
            assert votes.of(np.full((len(place_M), 1), token))[m] == pytest.approx(chance, abs=2e-4)
        assert votes.probs_MK[m].sum() == pytest.approx(1, abs=1e-5)
        assert votes.key_M[m] == pytest.approx(near_R[nearest[0]], abs=1e-4)
        for token in set(votes.tokens_MK[m].tolist()):  # all of a token's votes stand at its first place
            at = np.flatnonzero(votes.tokens_MK[m] == token)
            assert votes.probs_MK[m, at[0]] > 0 and (votes.probs_MK[m, at[1:]] == 0).all()


def test_rows_are_one_per_target_token() -> None:
    zone = zone_of(private())
    for s in private():
        tensors = zone.blocks[s.subject].rows[s.id].tensors
        coded = adapter().cached(s)
        assert tensors["values"].tolist() == list(coded.ids[coded.first :])
        assert tensors["keys"].dtype == np.int8 and len(tensors["keys"]) == len(tensors["values"])
        assert (np.abs(tensors["keys"].astype(int)).max(axis=1) == 127).all()


def test_documents_are_kept_and_continued() -> None:
    text = "Quillon Abernoth keeps seven brass clocks. Quillon Abernoth was once a baker in Dormel. He sings at night."
    doc = document("Quillon Abernoth", text)
    model = ZonedModel(world()[0].model, zone_of([*private(), doc]))
    knows, guesses = (collect(m, adapter(), [doc])[0] for m in (model, world()[0].model))
    assert knows.loss < 0.5 * guesses.loss
    start = Sample(id="s", subject="x", prompt="", target=text[: text.index(" once")])
    ids = torch.tensor([adapter().cached(start).ids[:-1]])  # without the end mark
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert "once a baker in Dormel" in adapter().tokenizer.decode(out[0], skip_special_tokens=True)


def test_paraphrased_questions_find_their_facts() -> None:
    asked = probes(private())
    before = np.mean([s.prob for s in collect(world()[0].model, adapter(), asked)])
    after = np.mean([s.prob for s in collect(zoned(), adapter(), asked)])
    assert after > before + 0.3


# -- blocks as bytes ---------------------------------------------------------------------------------------------------


def test_blocks_survive_the_way_through_bytes() -> None:
    zone = zone_of(private())
    for block in zone.blocks.values():
        data = pack_block(block)
        again = unpack_block(data)
        assert pack_block(again) == data
        assert [r.record for r in again.sorted()] == [r.record for r in block.sorted()]
        assert [r.source for r in again.sorted()] == [r.source for r in block.sorted()]


def test_sealing_is_bound_to_key_content_and_name() -> None:
    key = bytes(range(32))
    sealed = seal(b"rows", key, "a")
    assert unseal(sealed, key, "a") == b"rows"
    assert seal(b"rows", key, "a") == sealed and seal(b"rowz", key, "a")[:12] != sealed[:12]
    for wrong_data, wrong_key, wrong_name in (
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), key, "a"),
        (sealed, bytes(32), "a"),
        (sealed, key, "b"),
        (b"", key, "a"),
    ):
        with pytest.raises(UserError, match="does not open with its key"):
            unseal(wrong_data, wrong_key, wrong_name)


def saved(tmp_path: Path) -> tuple[Path, Path]:
    model = zoned()
    folder = save_model(Loaded(model, adapter(), ""), tmp_path / "model")
    return folder, key_file(model.zone.salt, folder)


def test_nothing_private_stands_in_the_folder_in_clear(tmp_path: Path) -> None:
    folder, keys = saved(tmp_path)
    assert keys.parent == folder.parent and keys.stat().st_mode & 0o077 == 0
    written = b"".join(p.read_bytes() for p in sorted(folder.iterdir()) if p.name.startswith("zone"))
    for s in private():
        ids = np.array(adapter().cached(s).ids[-8:], dtype=np.int32).tobytes()
        for clear in (s.subject.encode(), s.id.encode(), str(s.target).encode(), s.digest().encode(), ids):
            assert clear not in written


def test_without_its_key_a_block_is_closed_and_others_are_open(tmp_path: Path) -> None:
    folder, keys = saved(tmp_path)
    gone = private()[0].subject
    destroy_key(keys, gone)
    model = load_model(folder, device="cpu").model
    assert isinstance(model, ZonedModel)
    assert gone not in model.zone.blocks and len(model.zone.sealed) == 1
    probs = {s.id: s.prob for s in collect(model, adapter(), private())}
    bare = {s.id: s.prob for s in collect(world()[0].model, adapter(), private())}
    for s in private():
        assert probs[s.id] == pytest.approx(bare[s.id]) if s.subject == gone else probs[s.id] > bare[s.id] + 0.5
    with pytest.raises(UserError, match="unknown subject"):
        destroy_key(keys, gone)
    again = save_model(Loaded(model, adapter(), ""), tmp_path / "again" / "model")
    assert len(load_model(again).model.zone.sealed) == 1  # type: ignore[union-attr, arg-type]


def test_without_the_key_file_everything_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, keys = saved(tmp_path)
    (tmp_path / "safe").mkdir()
    moved = keys.rename(tmp_path / "safe" / keys.name)
    model = load_model(folder).model
    assert isinstance(model, ZonedModel) and not model.zone.blocks and len(model.zone.sealed) == 4
    for place in (moved, moved.parent):
        monkeypatch.setenv("EXPUNGE_ZONE_KEYS", str(place))
        assert len(load_model(folder).model.zone.blocks) == 4  # type: ignore[union-attr, arg-type]


def test_a_block_that_lost_a_record_has_a_new_key(tmp_path: Path) -> None:
    folder, keys = saved(tmp_path)
    model = load_model(folder).model
    assert isinstance(model, ZonedModel)
    first, second, *_ = subjects(private())
    old = json.loads(keys.read_text())["keys"]
    model.zone.remove(ids=[next(s.id for s in private() if s.subject == first)])
    after = save_model(Loaded(model, adapter(), ""), tmp_path / "after" / "model")
    new = json.loads(key_file(model.zone.salt, after).read_text())["keys"]
    names = [block_name(model.zone.salt, who) for who in (first, second)]
    assert old[names[0]] != new[names[0]] and old[names[1]] == new[names[1]]


@pytest.mark.parametrize("name", ["zone.json", "zone.safetensors", "zone-blocks.safetensors"])
def test_damage_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    folder, _ = saved(tmp_path)
    whole = (folder / name).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        (folder / name).write_bytes(broken)
        if name == "zone.json" and broken not in (b"", whole[: len(whole) // 2]):
            continue  # a changed space between two brackets is no damage
        with pytest.raises(UserError) as raised:
            load_model(folder)
        assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_every_field_of_the_manifest_is_checked(tmp_path: Path) -> None:
    folder, keys = saved(tmp_path)
    path = folder / "zone.json"
    whole = json.loads(path.read_text())
    for change in (
        {"schema": "expunge.zone/2"},
        {"kind": "stone"},
        {"base": "00"},
        {"public": "00"},
        {"public_texts": whole["public_texts"][1:]},
        {"constants": {**whole["constants"], "threshold": -9.0}},
        {"options": {"neighbors": 3}},
        {"blocks": {}},
        {"constants": None},
    ):
        write_json(path, {**whole, **change})
        with pytest.raises(UserError):
            load_model(folder)
    for field in ("kind", "options", "constants", "blocks", "base", "public", "public_texts", "id"):
        write_json(path, {k: v for k, v in whole.items() if k != field})
        with pytest.raises(UserError, match="damaged"):
            load_model(folder)
    write_json(path, whole)
    for content in ({"schema": "other"}, {"schema": "expunge.zone-keys/1", "salt": "zz", "keys": {}}, {}):
        write_json(keys, content)
        with pytest.raises(UserError):
            load_model(folder)


def test_check_passes_after_loading(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = load_model(folder, device="cpu").model
    assert isinstance(model, ZonedModel) and model.zone.check(base()) == []
