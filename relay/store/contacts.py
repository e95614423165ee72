"""Contacts, blocks and reports."""

from __future__ import annotations

from collections.abc import Sequence

from models.contacts import Contact


class Contacts:
    """The ``contacts`` collection."""

    def __init__(self, *, most: int) -> None:
        self._most = most

    async def blocks_among(self, users: Sequence[str]) -> set[tuple[str, str]]:
        """Pairs of one of these users and another whom they have blocked."""
        query = {"blocked": True, "owner": {"$in": list(users)}, "user": {"$in": list(users)}}
        cursor = Contact.get_motor_collection().find(query, {"owner": 1, "user": 1})
        return {(row["owner"], row["user"]) async for row in cursor}

    async def lists(self, owners: Sequence[str], user: str) -> set[str]:
        """Those of these owners who have ``user`` as a listed contact."""
        names = [f"{owner} {user}" for owner in owners]
        cursor = Contact.get_motor_collection().find({"_id": {"$in": names}, "listed": True}, {"owner": 1})
        return {row["owner"] async for row in cursor}
