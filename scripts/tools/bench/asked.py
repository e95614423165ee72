"""A helper process that is asked by lines: one JSON object for each request, one for its answer. Both ends."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

import msgspec
import uvloop

from scripts.tools.bench.crowd_messages import Answer, Unable
from scripts.tools.bench.stage import BenchError

_LINE: Final = 1 << 22
# Connections say goodbye on the next turn.
_GOODBYE_SECONDS: Final = 0.05

Asked = TypeVar("Asked", bound=msgspec.Struct)
Wanted = TypeVar("Wanted", bound=Answer)


class GiveUp(Exception):
    """A request cannot be carried out; one line."""


class Helper(Generic[Asked]):
    """The bench's end. ``answers`` are the types it may answer with, ``name`` says who it is."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, answers: Any) -> None:
        self._process = process
        self._name = name
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(answers).decode

    async def ask(self, request: Asked, wanted: type[Wanted]) -> Wanted:
        """The answer. Raises BenchError when it is none: the process has ended, or could not do it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(request) + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise BenchError(f"{self._name} ended unexpectedly; the lines above say why")
        found = self._decode(line)
        if isinstance(found, Unable):
            raise BenchError(found.reason)
        assert isinstance(found, wanted)
        return found


def serve(requests: Any, answer: Callable[[Any], Awaitable[Answer]], close: Callable[[], None]) -> int:
    """The helper's end, until nobody asks any more: answers requests of these types one by one, then closes. The exit code of the
    process."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(msgspec.json.Decoder(requests).decode, answer, close))


async def _serve(
    decode: Callable[[bytes], Any], answer: Callable[[Any], Awaitable[Answer]], close: Callable[[], None]
) -> int:
    reader = asyncio.StreamReader(limit=_LINE)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    code = 0
    try:
        while line := await reader.readline():
            _tell(await answer(decode(line)))
    except* (OSError, GiveUp, TimeoutError) as problems:
        problem: BaseException = problems
        while isinstance(problem, BaseExceptionGroup):
            problem = problem.exceptions[0]
        _tell(Unable(reason=" ".join(str(problem).split()) or type(problem).__name__))
        code = 1
    finally:
        close()
        await asyncio.sleep(_GOODBYE_SECONDS)
    return code


def _tell(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()
