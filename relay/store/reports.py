"""Complaints about people, for the operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from models.contacts import Report
from models.conversations import Membership
from relay.store.accounts import milliseconds
from relay.wire.cursor import cursor_at, place_of
from relay.wire.errors import RelayError
from relay.wire.ids import new_id


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


class Reports:
    """The ``reports`` collection. Needs no running node."""

    async def add(
        self,
        reporter: str,
        user: str,
        reason: str,
        *,
        text: str | None = None,
        conversation: str | None = None,
        messages: Sequence[str] | None = None,
    ) -> tuple[str, bool]:
        """Keeps a complaint; returns its id and whether it is new: the very same one, still open, is not kept twice. Raises
        RelayError ``not_found`` when the reporter is, and was lately, no member of ``conversation``."""
        if conversation is not None:
            mine = {"_id": f"{conversation} {reporter}"}
            if await Membership.get_motor_collection().find_one(mine, {"_id": 1}) is None:
                raise RelayError("not_found", "no such conversation")
        reports = Report.get_motor_collection()
        fields: dict[str, Any] = {"reporter": reporter, "user": user, "reason": reason}
        optional: dict[str, Any] = {
            "text": text,
            "conversation": conversation,
            "messages": None if messages is None else list(messages),
        }
        same = await reports.find_one({**fields, **optional, "closedAt": None}, {"_id": 1})
        if same is not None:
            return str(same["_id"]), False
        document = {"_id": new_id(), **fields, "createdAt": datetime.now(UTC)}
        document.update({name: value for name, value in optional.items() if value is not None})
        await reports.insert_one(document)
        return str(document["_id"]), True

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

    async def close(self, report: str) -> bool:
        """Closes a complaint. Safe to repeat. False when it is unknown."""
        reports = Report.get_motor_collection()
        await reports.update_one({"_id": report, "closedAt": None}, {"$set": {"closedAt": datetime.now(UTC)}})
        return await reports.find_one({"_id": report}, {"_id": 1}) is not None


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
