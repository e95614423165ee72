"""Devices that are known, and such that arrive alone, without an audit trail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from relay.store.accounts import Accounts, Arrival
from relay.store.arriving import Arriving, Provision
from tests.support.node import Node


async def arrive(accounts: Accounts, user: str, device: str, **fields: Any) -> Arrival | None:
    """Arrives as ``fields`` of Arriving say; what the trail must have first counts as written."""
    one = Arriving(user=user, device=device, **fields)
    found = await accounts.arrive(one)
    if isinstance(found, Provision):
        found = await accounts.arrive(replace(one, noted=found))
    assert not isinstance(found, Provision)
    return found


async def make_known(node: Node, users: Sequence[str]) -> None:
    """These people and their phones are known since yesterday."""
    then = datetime.now(UTC) - timedelta(days=1)
    seen = {"createdAt": then, "lastSeen": then, "liveAt": then}
    await node.db.users.insert_many([{"_id": user, "createdAt": then} for user in users])
    await node.db.devices.insert_many([{"_id": f"{user}/phone", "user": user, **seen} for user in users])
