"""What changed since a cursor, for a device that was away."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.conversations import shown
from handlers.http.route import Caller, Route, answer
from handlers.http.schemas.changes import (
    ChangesAnswer,
    ContactChangeAnswer,
    DeviceChangeAnswer,
    ReadCursorAnswer,
)


async def index(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """A page of changes."""
    page = await ctx.changes.since(caller.user, request.query.get("since"))
    return answer(
        ChangesAnswer(
            conversations=[shown(view) for view in page.conversations],
            removed=page.removed,
            reads=[
                ReadCursorAnswer(conv=one.conversation, user=one.user, up_to=one.up_to, at=one.at)
                for one in page.reads
            ],
            contacts=[
                ContactChangeAnswer(user=one.user, name=one.name, listed=one.listed, blocked=one.blocked)
                for one in page.contacts
            ],
            devices=[
                DeviceChangeAnswer(
                    id=one.id,
                    name=one.name,
                    platform=one.platform,
                    removed=one.removed,
                    created_at=one.created_at,
                )
                for one in page.devices
            ],
            me=page.me,
            next=page.next,
            more=page.more,
        )
    )


ROUTES: Final = (
    Route(
        "GET",
        "/v1/changes",
        index,
        "Conversations, read cursors, contacts, devices and preferences changed since a cursor",
        "changes",
        {200: ChangesAnswer},
        query={
            "since": {
                "type": "string",
                "description": "`next` of the answer before; absent: everything from the beginning",
            }
        },
        errors=("bad_request", "resync"),
    ),
)
