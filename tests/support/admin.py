"""`scripts/admin` as an operator runs it, without a new interpreter for every command: each is a fork of one that has it
imported."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from secrets import token_hex
from typing import NoReturn

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "scripts.tools.admin.__main__"])


class Admin:
    """Runs commands with these settings. ``patience``: seconds until MongoDB counts as unreachable."""

    def __init__(self, environment: Mapping[str, str], directory: Path, patience: int = 5) -> None:
        self._environment = environment
        self._directory = directory
        self._patience = patience

    async def __call__(
        self, *arguments: str, env: Mapping[str, str | None] | None = None
    ) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        wanted: dict[str, str | None] = {**os.environ, **self._environment, **(env or {})}
        known = {name: value for name, value in wanted.items() if value is not None}
        out, err = (self._directory / token_hex(8) for _ in range(2))
        process = _FORKS.Process(target=_run, args=(arguments, known, out, err, self._patience))
        process.start()
        # Its exit code can be read once, and the start of any other reads those that have ended: one thread reads them all.
        await asyncio.to_thread(wait, [process.sentinel])
        process.join()
        assert process.exitcode is not None
        return process.exitcode, out.read_text(), err.read_text()


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, patience: int
) -> NoReturn:
    from scripts.tools.admin import base
    from scripts.tools.admin.__main__ import app

    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    base._SECONDS = patience  # type: ignore[misc]
    app(list(arguments), prog_name="scripts/admin")
    raise AssertionError
