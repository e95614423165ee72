"""What scripts/chat shows: messages to standard output, everything else to standard error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from relay.client import Connected, Disconnected, Event, Failed, Message, ReadCursor, Stored, Typing
from relay.wire.ids import RELAY_USER
from scripts.tools.typing_line import Line

_COLOURS: Final = ("cyan", "green", "magenta", "yellow", "blue", "bright_red")
_MOST_NAMED: Final = 10
_MOST_ELSEWHERE: Final = 1000


class Screen:
    """Standard output for what arrives, standard error for the rest; counts progress."""

    def __init__(self, url: str, *, as_json: bool) -> None:
        self.progress = 0
        self.conv: str | None = None
        self.line: Line | None = None
        self.stored = 0
        self.failed = 0
        self.broken = asyncio.Event()
        self._url = url
        self._json = as_json
        self._out = Console(highlight=False, soft_wrap=True) if sys.stdout.isatty() else None
        self._told = False
        self._elsewhere: set[str] = set()

    def say(self, line: str) -> None:
        """A line about the program itself."""
        with self._above():
            print(_printable(line), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _above(self) -> Iterator[None]:
        """What is shown meanwhile stands above the ``line`` that is being typed."""
        if self.line is not None:
            self.line.hide()
        yield
        if self.line is not None:
            self.line.show()

    def delivered(self, line: str) -> None:
        """Own messages have arrived somewhere; for people who type only."""
        if self.line is not None and self._out is not None:
            with self._above():
                self._out.print(Text(f"      {_printable(line)}", "dim"))

    def on_message(
        self,
        message: Message,
        names: Mapping[str, str],
        title: tuple[str | None, str | None] = (None, None),
    ) -> None:
        """Shows one message; ``names`` are those of the people ``concerned``, ``title`` what a group that was changed is
        called now and was before."""
        self.progress += 1
        try:
            if self._json:
                print(
                    json.dumps(_as_json(message), ensure_ascii=False).encode(errors="replace").decode(),
                    flush=True,
                )
            elif message.kind != "withdrawn":
                self._show(message, names, title)
        except BrokenPipeError:
            # The reader of the pipe has left; a second failure at exit must not print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.broken.set()

    def _show(self, message: Message, names: Mapping[str, str], title: tuple[str | None, str | None]) -> None:
        # The first tab ends the sender.
        sender = _printable(names.get(message.user, message.user)).replace("\t", " ")
        text = _printable(_text(message, names, title))
        if self._out is None:
            print(f"{sender}\t{text}", flush=True)
            return
        at = datetime.fromtimestamp(message.at / 1000).strftime("%H:%M")
        colour = _COLOURS[sum(message.user.encode()) % len(_COLOURS)]
        elsewhere = "(elsewhere) " if self.conv not in (None, message.conv) else ""
        with self._above():
            if _is_system(message):
                self._out.print(Text(f"{at} {elsewhere}{text}", "dim"))
            else:
                told = ((f"{at} ", "dim"), (f"{sender} ", f"bold {colour}"), (elsewhere, "dim"), text)
                self._out.print(Text.assemble(*told))
        if elsewhere and message.conv not in self._elsewhere and len(self._elsewhere) < _MOST_ELSEWHERE:
            self._elsewhere.add(message.conv)
            self.say(f"(elsewhere): in another conversation; to write there: --conversation {message.conv}")

    def on_event(self, event: Event) -> None:
        """Tells of trouble once an outage, and counts what the relay answered."""
        if isinstance(event, Stored | Failed):
            self.progress += 1
            self._answered(event)
        elif isinstance(event, Connected):
            self.progress += 1
            if self._told and self.line is not None:
                self.say("connected again")
            self._told = False
        elif isinstance(event, Disconnected) and event.code is None:
            self.unreachable(event.reason)

    def hints(self, event: Event) -> bool:
        """Whether this is worth a hint: somebody types in, or has read, the conversation on the terminal."""
        return self.line is not None and isinstance(event, Typing | ReadCursor) and event.conv == self.conv

    def hint(self, event: Typing | ReadCursor, name: str) -> None:
        """Says it in front of the prompt, where the next thing wipes it away."""
        if self.line is None:
            return
        if isinstance(event, Typing) and not event.on:
            self.line.hint("")
            return
        what = "is typing…" if isinstance(event, Typing) else "has read it"
        self.line.hint(f"{_printable(name).replace(chr(9), ' ')} {what}")

    def _answered(self, event: Stored | Failed) -> None:
        # The outbox may also hold what an earlier run left behind for another conversation.
        if isinstance(event, Stored):
            self.stored += event.conv == self.conv
            return
        self.failed += event.conv == self.conv
        if self.failed <= 5:
            self.say(f"not sent: {event.message} ({event.code})")

    def unreachable(self, reason: str) -> None:
        """Says once that the relay does not answer."""
        if not self._told:
            self._told = True
            known = reason.startswith("no token") or " the session file " in reason
            self.say(
                reason
                if known
                else f"cannot reach the relay at {self._url} ; is it running? start it with: make run"
            )


def concerned(message: Message) -> list[str]:
    """The ids of the people whose names a message is shown with."""
    found = [message.user]
    if _is_system(message) and isinstance(message.body, dict):
        found += [message.body["by"]] if isinstance(message.body.get("by"), str) else []
        found += _others(message.body)[:_MOST_NAMED]
    return found


def _is_system(message: Message) -> bool:
    return message.kind == "system" and message.user == RELAY_USER


def is_change(message: Message) -> bool:
    """Whether it tells that a group's name, picture or settings were changed."""
    return _is_system(message) and isinstance(message.body, dict) and message.body.get("event") == "changed"


def _text(message: Message, names: Mapping[str, str], title: tuple[str | None, str | None]) -> str:
    if _is_system(message) and isinstance(message.body, dict):
        return _what_happened(message.body, names, title)
    if message.body is None:
        return f"({message.kind})"
    return message.body if isinstance(message.body, str) else json.dumps(message.body, ensure_ascii=False)


def _what_happened(
    body: Mapping[str, Any], names: Mapping[str, str], title: tuple[str | None, str | None]
) -> str:
    event, by, users = body.get("event"), str(body.get("by", RELAY_USER)), _others(body)
    who = "the relay" if by == RELAY_USER else names.get(by, by)
    whom = ", ".join(names.get(user, user) for user in users[:_MOST_NAMED])
    if len(users) > _MOST_NAMED:
        whom += f" and {len(users) - _MOST_NAMED} more"
    if event == "created":
        return f"{who} made the group with {whom}" if whom else f"{who} made the group"
    if event in ("added", "removed"):
        return f"{who} {event} {whom}".rstrip()
    if event == "left":
        return f"{whom or who} left"
    if event == "role":
        article = "an" if body.get("role") == "admin" else "a"
        return f"{who} made {whom or 'themselves'} {article} {body.get('role', 'member')}"
    if event == "dissolved":
        return f"{who} dissolved the group"
    if event == "changed":
        now, before = title
        if now is not None and before not in (None, now):
            return f"{who} renamed the group to “{now}”"
        return f"{who} changed the group" + ("" if now is None else f" “{now}”")
    return f"{who}: {event} {whom}".rstrip()


def _others(body: Mapping[str, Any]) -> list[str]:
    users = body.get("users")
    listed = users if isinstance(users, list) else []
    return [user for user in listed if isinstance(user, str) and user != body.get("by")]


def _printable(text: str) -> str:
    # Other people's text must neither drive the terminal nor break a line in two.
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\t" else {"\n": "\\n", "\r": "\\r"}.get(char, "\ufffd")
        for char in text
    )


def _as_json(message: Message) -> dict[str, object]:
    return {
        "conv": message.conv,
        "id": message.id,
        "seq": message.seq,
        "at": message.at,
        "user": message.user,
        "device": message.device,
        "kind": message.kind,
        "body": message.body,
        "replyTo": message.reply_to,
        **(message.extra or {}),
    }
