"""``scripts/shard`` as an operator runs it."""

from __future__ import annotations

import json
from typing import Any

from tests.support.process import run_module


class ShardTool:
    """Runs commands on the database of this name, through these routers."""

    def __init__(self, uri: str, database: str) -> None:
        self.database = database
        self._settings = {"mongo_uri": uri, "mongo_database": database}

    async def __call__(self, *arguments: str, seconds: float = 60) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        return await run_module("scripts.tools.shard", *arguments, seconds=seconds, **self._settings)

    async def done(self, *arguments: str) -> str:
        """What a command says that does what it should."""
        code, out, err = await self(*arguments)
        assert (code, err) == (0, ""), (out, err)
        return out

    async def refused(self, *arguments: str, code: int = 1) -> str:
        """The line of a command that does nothing."""
        found, out, err = await self(*arguments)
        assert found == code, (out, err)
        return err

    async def status(self) -> dict[str, Any]:
        """``status --json``, whatever it says."""
        _, out, err = await self("status", "--json")
        assert not err
        found: dict[str, Any] = json.loads(out)
        return found
