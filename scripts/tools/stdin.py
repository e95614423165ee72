"""Lines of standard input without blocking the event loop and without holding more than a few at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator
from typing import Final

MAX_LINE: Final = 1 << 20
_CHUNK: Final = 65_536


class LineTooLong(Exception):
    """A line of more than MAX_LINE bytes."""


def is_regular(descriptor: int) -> bool:
    """Whether it is a file with content that stays, not a pipe or a terminal."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def content_hash(descriptor: int) -> str:
    """SHA-256 of a regular file from where it would be read next; does not move that place."""
    digest, offset = hashlib.sha256(), os.lseek(descriptor, 0, os.SEEK_CUR)
    while data := os.pread(descriptor, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


async def lines(descriptor: int, most: int) -> AsyncIterator[list[bytes]]:
    """Complete lines as they come, without their newline, at most ``most`` at once. Raises LineTooLong."""
    rest = b""
    while data := await read(descriptor):
        found = (rest + data).split(b"\n")
        rest = found.pop()
        if len(rest) > MAX_LINE:
            raise LineTooLong
        for start in range(0, len(found), most):
            yield found[start : start + most]
    if rest:
        yield [rest]


async def read(descriptor: int) -> bytes:
    """What comes next, as soon as it is there; nothing at the end."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except PermissionError:
        # Files and /dev/null cannot be waited for; reading them does not wait either.
        await asyncio.sleep(0)
    else:
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)
    return os.read(descriptor, _CHUNK)
