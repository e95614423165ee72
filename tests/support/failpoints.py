"""MongoDB's own fail points, aimed at the commands that one relay node sends for one collection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.node import Node

MAJORITY_TIMEOUT = {
    "code": 64,
    "codeName": "WriteConcernFailed",
    "errmsg": "waiting for replication timed out",
    "errInfo": {"wtimeout": True},
}


@asynccontextmanager
async def failing(
    node: Node, command: str, collection: str = "messages", *, times: int = 0, skip: int = 0, **how: Any
) -> AsyncIterator[None]:
    """While this lasts the node's ``command`` on ``collection`` fails as ``how`` says (fields of failCommand).

    Every time, or the first ``times``, or all but the first ``skip``. What other clients send is untouched.
    """
    mode: Any = {"times": times} if times else {"skip": skip} if skip else "alwaysOn"
    admin = node.db.client.admin
    data = {
        "failCommands": [command],
        "appName": "relay",
        "namespace": f"{node.db.name}.{collection}",
        **how,
    }
    await admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
    try:
        yield
    finally:
        await admin.command({"configureFailPoint": "failCommand", "mode": "off"})
