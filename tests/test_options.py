"""How options are written on the command line."""

from __future__ import annotations

import pytest

from expunge.errors import UserError
from expunge.options import name_and_settings


@pytest.mark.parametrize(
    ("item", "name", "settings"),
    [
        ("npo", "npo", {}),
        ("npo:beta=0.05; retain=kl", "npo", {"beta": "0.05", "retain": "kl"}),
        ("npo:scope.names=*.mlp.*", "npo", {"scope.names": "*.mlp.*"}),
        ("mine/file.py:own", "mine/file.py:own", {}),
        ("mine/file.py:own:rate=2", "mine/file.py:own", {"rate": "2"}),
    ],
)
def test_a_name_with_its_settings(item: str, name: str, settings: dict[str, str]) -> None:
    assert name_and_settings(item, "method", "npo:beta=1") == (name, settings)


def test_a_setting_without_a_value_is_said() -> None:
    with pytest.raises(UserError, match="attack setting 'shots' is not key=value: write for example recall:shots=5"):
        name_and_settings("recall:shots", "attack", "recall:shots=5")
