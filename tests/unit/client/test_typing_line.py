"""The line being typed in a terminal."""

from __future__ import annotations

import io

import pytest

from scripts.tools.typing_line import Line


def line(columns: int = 80) -> tuple[Line, io.StringIO]:
    out = io.StringIO()
    return Line(out, lambda: columns), out


@pytest.mark.parametrize(
    ("keys", "entered"),
    [
        ("hello\n", ["hello"]),
        ("hello\r", ["hello"]),
        ("one\ntwo\n\nrest", ["one", "two", ""]),
        ("helo\x7flo\n", ["hello"]),
        ("\x7f\x08a\n", ["a"]),
        ("gone\x15here\n", ["here"]),
        ("one two three \x17four\n", ["one two four"]),
        ("word\x17other\n", ["other"]),
        ("a\x1b[Db\x1bOAc\x1b[1;5Cd\x1b[3~e\x1bxf\n", ["abcdef"]),
        ("a\tb\x00\x07\x9bc\n", ["a\tbc"]),
        ("日本語 👍 علی‌رضا\n", ["日本語 👍 علی‌رضا"]),
    ],
)
def test_keys_make_lines(keys: str, entered: list[str]) -> None:
    for size in (1, 1000):
        typing, _ = line()
        data = keys.encode()
        found = [one for at in range(0, len(data), size) for one in typing.typed(data[at : at + size])]
        assert found == entered


def test_bytes_that_are_no_text_do_no_harm() -> None:
    typing, _ = line()
    assert typing.typed(b"a\xffb\n") == ["a\ufffdb"]


def test_control_d_ends_on_an_empty_line_only() -> None:
    typing, _ = line()
    assert typing.typed(b"a\x04b\n") == ["ab"]
    assert not typing.ended
    assert typing.typed(b"\x04never\n") == []
    assert typing.ended


def test_what_is_typed_is_taken_off_the_terminal_and_put_back_whole() -> None:
    typing, out = line()
    typing.show()
    typing.typed(b"half")
    typing.hide()
    out.write("a message\n")
    typing.show()
    assert out.getvalue() == "> half\r\x1b[Ja message\n> half"
    assert typing.typed(b" done\n") == ["half done"]
    assert out.getvalue().endswith("> half done\n> ")


@pytest.mark.parametrize(
    ("typed", "above"),
    [("a" * 8, 0), ("a" * 9, 1), ("a" * 18, 1), ("a" * 19, 2), ("日本語日", 0), ("日本語日本", 1)],
)
def test_a_line_of_several_rows_is_taken_off_whole(typed: str, above: int) -> None:
    typing, out = line(columns=10)
    typing.typed(typed.encode())
    before = len(out.getvalue())
    typing.hide()
    assert out.getvalue()[before:] == (f"\x1b[{above}A" if above else "") + "\r\x1b[J"
