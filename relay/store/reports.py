"""Complaints about people, for the operators."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from models.contacts import Report
from models.conversations import Membership
from relay.store.accounts import milliseconds
from relay.store.mongo import DuplicateKeyError
from relay.wire.clock import utc_now
from relay.wire.cursor import cursor_at, place_of
from relay.wire.errors import RelayError

_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class ReportView:
    """A complaint of ``reporter`` about ``user``. ``created_at`` in milliseconds."""

    id: str
    reporter: str
    user: str
    reason: str
    text: str | None
    conversation: str | None
    messages: Sequence[str]
    created_at: int


@dataclass(frozen=True, slots=True)
class Complaint:
    """What ``reporter`` says about ``user``; ``messages`` are of ``conversation``. ``id`` is a new one."""

    id: str
    reporter: str
    user: str
    reason: str
    text: str | None = None
    conversation: str | None = None
    messages: Sequence[str] | None = None


class Reports:
    """The ``reports`` collection. Needs no running node."""

    async def same(self, complaint: Complaint) -> str | None:
        """The id of the very same complaint that is still open; None when there is none. Raises RelayError ``not_found`` when
        the reporter is, and was lately, no member of its conversation."""
        if complaint.conversation is not None:
            mine = {"_id": f"{complaint.conversation} {complaint.reporter}"}
            if await Membership.get_motor_collection().find_one(mine, {"_id": 1}) is None:
                raise RelayError("not_found", "no such conversation")
        query = {"openKey": _key(complaint)}
        found = await Report.get_motor_collection().find_one(query, {"_id": 1})
        return None if found is None else str(found["_id"])

    async def add(self, complaint: Complaint) -> str:
        """Keeps a complaint; its id, or that of the very same one that came at the same moment."""
        fields = {name: value for name, value in _fields(complaint).items() if value is not None}
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(DuplicateKeyError):
                await Report.get_motor_collection().insert_one(
                    {
                        "_id": complaint.id,
                        **fields,
                        "openKey": _key(complaint),
                        "createdAt": utc_now(),
                    }
                )
                return complaint.id
            # When it is not there any more, it has just been closed.
            if (same := await self.same(complaint)) is not None:
                return same
        raise RelayError("unavailable", "this report is being closed; try again", retry_after=200)

    async def open_page(self, limit: int, cursor: str | None = None) -> tuple[list[ReportView], str | None]:
        """A page of the open complaints, oldest first, and the cursor of the next. Raises RelayError ``bad_request``."""
        base: dict[str, Any] = {"closedAt": None}
        query = base
        if cursor is not None:
            at, name = place_of(cursor)
            try:
                moment = datetime.fromtimestamp(at / 1000, UTC)
            except (ValueError, OverflowError, OSError):
                raise RelayError("bad_request", "cursor is not one of ours") from None
            query = {
                "$or": [
                    {**base, "createdAt": moment, "_id": {"$gt": name}},
                    {**base, "createdAt": {"$gt": moment}},
                ]
            }
        found = (
            await Report.get_motor_collection()
            .find(query)
            .sort([("createdAt", 1), ("_id", 1)])
            .limit(limit + 1)
            .to_list(limit + 1)
        )
        last = found[limit - 1] if len(found) > limit else None
        return (
            [_view(document) for document in found[:limit]],
            None if last is None else cursor_at(milliseconds(last["createdAt"]), last["_id"]),
        )

    async def exists(self, report: str) -> bool:
        """Whether there is this complaint, open or closed."""
        return await Report.get_motor_collection().find_one({"_id": report}, {"_id": 1}) is not None

    async def close(self, report: str) -> bool:
        """Closes a complaint. Safe to repeat. False when it is unknown."""
        reports = Report.get_motor_collection()
        await reports.update_one(
            {"_id": report, "closedAt": None},
            {"$set": {"closedAt": utc_now()}, "$unset": {"openKey": ""}},
        )
        return await self.exists(report)


def _fields(complaint: Complaint) -> dict[str, Any]:
    return {
        "reporter": complaint.reporter,
        "user": complaint.user,
        "reason": complaint.reason,
        "text": complaint.text,
        "conversation": complaint.conversation,
        "messages": None if complaint.messages is None else list(complaint.messages),
    }


def _key(complaint: Complaint) -> str:
    return hashlib.sha256(json.dumps(_fields(complaint), sort_keys=True).encode()).hexdigest()


def _view(document: Mapping[str, Any]) -> ReportView:
    return ReportView(
        id=document["_id"],
        reporter=document["reporter"],
        user=document["user"],
        reason=document["reason"],
        text=document.get("text"),
        conversation=document.get("conversation"),
        messages=document.get("messages") or (),
        created_at=milliseconds(document["createdAt"]),
    )
