"""What scripts/chat shows: messages to standard output, everything else to standard error."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.text import Text

from relay.client import Connected, Disconnected, Event, Failed, Message, Stored

_COLOURS: Final = ("cyan", "green", "magenta", "yellow", "blue", "bright_red")


class Screen:
    """Standard output for what arrives, standard error for the rest; counts progress."""

    def __init__(self, url: str, *, as_json: bool, prompt: bool) -> None:
        self.progress = 0
        self.conv: str | None = None
        self.stored = 0
        self.failed = 0
        self.broken = asyncio.Event()
        self._url = url
        self._json = as_json
        self._prompt = prompt
        self._out = Console(highlight=False, soft_wrap=True) if sys.stdout.isatty() else None
        self._told = False

    def prompt(self) -> None:
        """Asks for the next line, in a terminal."""
        if self._prompt:
            sys.stderr.write("> ")
            sys.stderr.flush()

    def say(self, line: str) -> None:
        """A line about the program itself."""
        clear = "\r\x1b[K" if self._prompt else ""
        print(f"{clear}{_printable(line)}", file=sys.stderr, flush=True)

    def on_message(self, message: Message) -> None:
        """Shows one message."""
        self.progress += 1
        try:
            if self._json:
                print(
                    json.dumps(_as_json(message), ensure_ascii=False).encode(errors="replace").decode(),
                    flush=True,
                )
            elif message.kind != "withdrawn":
                self._show(message)
        except BrokenPipeError:
            # The reader of the pipe has left; a second failure at exit must not print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.broken.set()

    def _show(self, message: Message) -> None:
        if self._out is None:
            print(f"{message.user}\t{_printable(_text(message))}", flush=True)
            return
        if self._prompt:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        colour = _COLOURS[sum(message.user.encode()) % len(_COLOURS)]
        at = datetime.fromtimestamp(message.at / 1000).strftime("%H:%M")
        self._out.print(
            Text.assemble(
                (f"{at} ", "dim"),
                (f"{_printable(message.user)} ", f"bold {colour}"),
                _printable(_text(message)),
            )
        )
        self.prompt()

    def on_event(self, event: Event) -> None:
        """Tells of trouble once an outage, and counts what the relay answered."""
        if isinstance(event, Stored | Failed):
            self.progress += 1
            self._answered(event)
        elif isinstance(event, Connected):
            self.progress += 1
            self._told = False
        elif isinstance(event, Disconnected) and event.code is None:
            self.unreachable(event.reason)

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
            known = reason.startswith("no token")
            self.say(
                reason
                if known
                else f"cannot reach the relay at {self._url} ; is it running? start it with: make run"
            )


def _text(message: Message) -> str:
    if message.kind == "system" and isinstance(message.body, dict):
        users = message.body.get("users")
        named = ", ".join(map(str, users)) if isinstance(users, list) else ""
        return f"({message.body.get('event', 'changed')} {named})".replace(" )", ")")
    if message.body is None:
        return f"({message.kind})"
    return message.body if isinstance(message.body, str) else json.dumps(message.body, ensure_ascii=False)


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
