"""What scripts/chat prints: a line a message, what happened in a group in words, nothing that drives the terminal."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from relay.client import Connected, Disconnected, Message, ReadCursor, Typing
from scripts.tools.screen import Screen, concerned, is_change
from scripts.tools.typing_line import Line

NAMES = {"u1": "Ann", "u2": "Bob", "u3": "Cleo"}


def message(body: Any, kind: str = "text", user: str = "u1") -> Message:
    return Message("c1", "m1", 1, 0, user, "phone", kind, body)


def system(event: str, by: str = "u1", users: list[str] | None = None, **more: Any) -> Message:
    return message({"event": event, "by": by, "users": users or [], **more}, "system", "$relay")


@pytest.fixture
def screen() -> Screen:
    return Screen("http://relay", as_json=False)


def printed(screen: Screen, shown: Message, capsys: pytest.CaptureFixture[str]) -> str:
    screen.on_message(shown, NAMES)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (system("created", users=["u1", "u2", "u3"]), "Ann made the group with Bob, Cleo"),
        (system("created", users=["u1"]), "Ann made the group"),
        (system("added", users=["u2"]), "Ann added Bob"),
        (system("removed", users=["u2", "u9"]), "Ann removed Bob, u9"),
        (system("left", by="u2", users=["u2"]), "Bob left"),
        (system("left", by="$relay", users=["u2"]), "Bob left"),
        (system("role", users=["u2"], role="admin"), "Ann made Bob an admin"),
        (system("role", users=["u1"], role="member"), "Ann made themselves a member"),
        (system("role", by="$relay", users=["u2"], role="admin"), "the relay made Bob an admin"),
        (system("changed"), "Ann changed the group"),
        (system("dissolved", users=["u1", "u2"]), "Ann dissolved the group"),
        (system("painted", users=["u2"]), "Ann: painted Bob"),
        (message({}, "system", "$relay"), "the relay: None"),
        (message(None, "system", "$relay"), "(system)"),
        (message({"event": "added", "by": 7, "users": [1, None]}, "system", "$relay"), "7 added"),
    ],
)
def test_what_happened_in_a_group_is_told_in_words(
    screen: Screen, told: Message, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(screen, told, capsys).rstrip() == f"$relay\t{line}"


@pytest.mark.parametrize(
    ("title", "line"),
    [
        (("Books", "Reading"), "Ann renamed the group to “Books”"),
        (("Books", "Books"), "Ann changed the group “Books”"),
        (("Books", None), "Ann changed the group “Books”"),
        ((None, "Books"), "Ann changed the group"),
    ],
)
def test_a_new_name_of_a_group_is_told(
    screen: Screen, title: tuple[str | None, str | None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = system("changed")
    assert is_change(told) and not is_change(system("added")) and not is_change(message("changed"))
    screen.on_message(told, NAMES, title)
    assert capsys.readouterr().out.rstrip() == f"$relay\t{line}"


def test_of_many_people_only_some_are_named_and_looked_up(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    told = system("added", users=[f"n{number}" for number in range(100)])
    assert len(concerned(told)) == 12
    assert printed(screen, told, capsys).endswith("n9 and 90 more\n")


def test_only_the_relay_itself_can_tell_what_happened(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = message({"event": "removed", "by": "u2", "users": ["u1"]}, "system", "u1")
    assert printed(screen, forged, capsys).startswith("Ann\t{")


def test_a_name_can_neither_drive_the_terminal_nor_pass_for_two_lines(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.on_message(message("hi"), {"u1": "An\x1b[2Jn\nBob\thello"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out
    assert out.count("\t") == 1


def test_a_disk_that_refuses_the_session_is_not_told_as_an_absent_relay(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.on_event(Disconnected(None, "cannot write the session file a: no space", 1.0))
    assert capsys.readouterr().err == "cannot write the session file a: no space\n"


@pytest.mark.parametrize("typing", [True, False])
def test_who_types_is_told_that_an_outage_is_over_and_a_pipe_is_not(
    screen: Screen, capsys: pytest.CaptureFixture[str], typing: bool
) -> None:
    screen.line = Line(sys.stderr, lambda: 80) if typing else None
    screen.on_event(Connected("u1", "phone"))
    assert capsys.readouterr().err == ""
    screen.on_event(Disconnected(None, "refused", 1.0))
    assert "is it running?" in capsys.readouterr().err
    for told in (typing, False):
        screen.on_event(Connected("u1", "phone"))
        assert ("connected again" in capsys.readouterr().err) == told


def test_a_hint_is_for_who_types_in_that_conversation_and_never_on_standard_output(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.conv = "c1"
    typing = Typing("c1", "u2", True)
    assert not screen.hints(typing)
    screen.line = Line(sys.stderr, lambda: 80)
    assert screen.hints(typing)
    assert not screen.hints(Typing("c2", "u2", True))
    for event, line in (
        (typing, "(Bob is typing…) > "),
        (ReadCursor("c1", "u2", 5, 5), "(Bob has read it) > "),
        (Typing("c1", "u2", False), "> "),
    ):
        screen.hint(event, "Bob")
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.rpartition("\x1b[J")[2] == line
    screen.hint(typing, "B\x1b[2Job")
    screen.say("something else")
    told = capsys.readouterr()
    assert "\x1b[2J" not in told.err
    assert told.err.endswith("> ")
    assert "typing" not in told.err.rpartition("something else")[2]
