"""The line that somebody is typing in a terminal: what arrives meanwhile is shown above it and does not tear it apart."""

from __future__ import annotations

import codecs
import contextlib
import os
import termios
from collections.abc import Callable, Iterator
from typing import Any, Final, TextIO

from rich.cells import cell_len

_PROMPT: Final = "> "
_ENTER: Final = "\r\n"
_BACKSPACE: Final = "\x7f\b"
_END, _ALL, _WORD, _ESCAPE = "\x04", "\x15", "\x17", "\x1b"
_LOCAL_MODES, _SPECIAL_SIGNS = 3, 6


class Line:
    """What is typed and not entered yet, after a prompt. The terminal itself must neither echo nor wait for whole lines
    (``keys``). Backspace, Ctrl-U and Ctrl-W take back; Ctrl-D on an empty line ends."""

    def __init__(self, out: TextIO, columns: Callable[[], int]) -> None:
        self.ended = False
        self._hint = ""
        self._out = out
        self._columns = columns
        self._text = ""
        self._escaped = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self, hint: str = "") -> None:
        """Puts the prompt and what is typed at the cursor, and a hint in front of them."""
        self._hint = hint
        self._out.write(self._prompt + self._text.replace("\t", " "))
        self._out.flush()

    def hide(self) -> None:
        """Takes both off the terminal; the cursor is where the prompt began."""
        above = (cell_len(self._prompt) + cell_len(self._text) - 1) // max(1, self._columns())
        self._out.write(f"\x1b[{above}A\r\x1b[J" if above else "\r\x1b[J")
        self._out.flush()

    def hint(self, text: str) -> None:
        """Says something in front of the prompt, until the next thing is said or entered; empty: nothing."""
        self.hide()
        self.show(text)

    @property
    def _prompt(self) -> str:
        return f"({self._hint}) {_PROMPT}" if self._hint else _PROMPT

    def typed(self, data: bytes) -> list[str]:
        """Takes keys, and gives the lines that were entered with them."""
        entered = []
        for sign in self._decoder.decode(data):
            if self._escaped or sign == _ESCAPE:
                self._skip(sign)
            elif sign in _ENTER:
                entered.append(self._text)
                self._text = self._hint = ""
                self._out.write("\n" + _PROMPT)
            elif sign == _END and not self._text:
                self.ended = True
                break
            elif sign in _BACKSPACE:
                self._become(self._text[:-1])
            elif sign == _ALL:
                self._become("")
            elif sign == _WORD:
                before, blank, _ = self._text.rstrip().rpartition(" ")
                self._become(before + blank)
            elif sign == "\t" or not (sign < " " or "\x7f" <= sign < "\xa0"):
                self._text += sign
                self._out.write(sign.replace("\t", " "))
        self._out.flush()
        return entered

    def _become(self, text: str) -> None:
        self.hide()
        self._text = text
        self.show(self._hint)

    def _skip(self, sign: str) -> None:
        # Arrows and the like: ESC [ or ESC O, parameters, a final sign; or ESC and one sign.
        self._escaped += sign
        if len(self._escaped) > 1 and (
            self._escaped[1] not in "[O" or (len(self._escaped) > 2 and "@" <= sign <= "~")
        ):
            self._escaped = ""


@contextlib.contextmanager
def keys(descriptor: int) -> Iterator[Callable[[], None]]:
    """A terminal that gives every key at once and echoes none, until the end. What is yielded sets it so again, for a
    program that was stopped and goes on."""
    before = termios.tcgetattr(descriptor)
    mode: list[Any] = termios.tcgetattr(descriptor)
    mode[_LOCAL_MODES] &= ~(termios.ICANON | termios.ECHO)
    mode[_SPECIAL_SIGNS][termios.VMIN], mode[_SPECIAL_SIGNS][termios.VTIME] = 1, 0

    def again() -> None:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, mode)

    again()
    try:
        yield again
    finally:
        # A terminal that has gone needs nothing.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def columns(descriptor: int) -> int:
    """The width of a terminal, in cells."""
    try:
        return os.get_terminal_size(descriptor).columns or 80
    except OSError:
        return 80
