"""What the relay says when it has started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from relay import __main__ as program


def greeting(url: str, capsys: pytest.CaptureFixture[str]) -> str:
    relay: Any = SimpleNamespace(
        settings=SimpleNamespace(data_dir="var"),
        url=url,
        context=SimpleNamespace(ledger=SimpleNamespace(waiting=0)),
        embedded=object(),
    )
    program._greet(cast("Any", relay))
    return capsys.readouterr().out


def test_the_commands_it_names_reach_it_wherever_it_listens(capsys: pytest.CaptureFixture[str]) -> None:
    usual = greeting("http://127.0.0.1:8080", capsys)
    assert "    scripts/chat --user ann --to bob\n" in usual
    other = greeting("http://127.0.0.1:9000", capsys)
    assert "    scripts/chat --user ann --to bob --url http://127.0.0.1:9000\n" in other
    assert "    scripts/chat --user bob --to ann --url http://127.0.0.1:9000\n" in other
