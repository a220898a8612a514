"""Canaries by coins: fair, reproducible, each on one side, among people or beside files of one's own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from expunge.certify.guesses import guesses_of
from expunge.data.canary_coins import put_in
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError

SMALL = {"people": 2, "utility": 2, "questions": 2}


def planted(count: int = 60, seed: int = 0) -> Dataset:
    return load_dataset("canaries", seed=seed, options={**SMALL, "count": count})


def test_every_canary_is_on_the_side_of_its_coin() -> None:
    data = planted()
    numbers = {role: {int(s.id.rpartition("-")[2]) for s in data[role]} for role in ("forget", "holdout")}  # type: ignore[index]
    assert numbers["forget"] | numbers["holdout"] == set(range(60)) and not numbers["forget"] & numbers["holdout"]
    assert all(put_in(n, 0) for n in numbers["forget"]) and not any(put_in(n, 0) for n in numbers["holdout"])
    assert data.digest() == planted().digest() != planted(seed=1).digest()
    assert data["retain"] and data["utility"]


def test_coins_are_fair() -> None:
    """2,000 coins: within 4.5 standard deviations, overall and where a canary's neighbour is in."""
    fallen = [put_in(n, 7) for n in range(2000)]
    after = [b for a, b in pairwise(fallen) if a]
    assert abs(sum(fallen) - 1000) < 4.5 * 22.4 and abs(sum(after) / len(after) - 0.5) < 4.5 * 0.5 / 31


def test_beside_files_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no retain\.jsonl"):
        load_dataset("canaries", data_dir=tmp_path)
    (tmp_path / "retain.jsonl").write_text(json.dumps({"prompt": "q", "target": "a"}) + "\n")
    data = load_dataset("canaries", data_dir=tmp_path)
    assert len(data["retain"]) == 1 and not data["utility"] and len(data["forget"]) + len(data["holdout"]) == 100


def test_too_few() -> None:
    with pytest.raises(UserError, match="give 8 or more"):
        planted(7)


def test_guesses_take_the_outer_thirds_and_only_the_unlearned_model() -> None:
    data = planted(30)
    inside, outside = len(data["forget"]), len(data["holdout"])
    rows = [
        {"method": method, "role": role, "id": s.id, "loss": loss + number / 100}
        for method, losses in (
            ("audited", {"forget": 1.0, "holdout": 2.0}),
            ("original", {"forget": 9.0, "holdout": 0.0}),
        )
        for role, loss in losses.items()
        for number, s in enumerate(data[role])  # type: ignore[index]
    ]
    found = guesses_of(rows, data)
    assert found is not None and found.coins and (found.canaries, found.guesses) == (30, 20)
    assert found.right == min(10, inside) + min(10, outside)  # the two sides are apart
    assert guesses_of([], data) is None
    swapped = guesses_of([r | {"loss": -float(str(r["loss"]))} for r in rows], data)
    assert swapped is not None and swapped.right == 20 - found.right
