"""Conversations: make, list, look at; what waits in one."""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from handlers.context import Context
from handlers.http.pages import PAGE_QUERY, message_page
from handlers.http.route import Caller, Route, answer, json_text, only, page_limit, parsed
from handlers.http.schemas import (
    ConversationAnswer,
    ConversationPage,
    CreateConversation,
    DevicesAnswer,
    MemberAnswer,
    MessagePage,
)
from relay.store.conversations import ConversationView
from relay.wire.errors import RelayError
from relay.wire.ids import CONVERSATION_ID

_DEFAULT: Final = 50
_MOST: Final = 200


async def create(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """201 with a new conversation, 200 with the one that exists."""
    wanted = await parsed(request, CreateConversation)
    others = [user for user in dict.fromkeys(wanted.members) if user != caller.user]
    if wanted.type == "direct" and len(others) != 1:
        raise RelayError("bad_request", "a direct conversation has exactly one other member")
    if wanted.type == "direct" and wanted.name is not None:
        raise RelayError("bad_request", "a direct conversation has no name")
    if ctx.provision:
        await ctx.accounts.add_users(others)
    elif missing := await ctx.accounts.missing_users(others):
        raise RelayError("not_found", "no such user", details={"users": missing[:20]})
    view, created = await ctx.conversations.create(
        caller.user, wanted.type, others, name=wanted.name, ref=wanted.ref
    )
    ctx.audiences.changed(conversation=view.id)
    return answer(_shown(view), 201 if created else 200)


async def index(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """This user's conversations, last changed first."""
    only(request, "cursor", "limit")
    views, cursor = await ctx.conversations.page(
        caller.user, limit=page_limit(request, _DEFAULT, _MOST), cursor=request.query.get("cursor")
    )
    return answer(ConversationPage(items=[_shown(view) for view in views], next=cursor))


async def show(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """One conversation; absent and not yours look the same."""
    return answer(_shown(await ctx.conversations.get(_name(request), caller.user)))


async def waiting(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """What waits for this device in one conversation, in order."""
    conversation = _name(request)
    await ctx.conversations.get(conversation, caller.user)
    frames, cursor = await message_page(ctx, caller, request, conversation)
    return json_text(f'{{"items":[{",".join(frames)}],"next":{cursor}}}')


async def devices(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """The devices to seal a message for."""
    conversation = _name(request)
    audience = await ctx.audiences.resolve(conversation)
    if caller.user not in audience.members:
        raise RelayError("not_found", "no such conversation")
    listed = [key for key in audience.keys if not key.endswith("/*")]
    return answer(DevicesAnswer(devices_rev=audience.devices_rev, devices=listed))


def _name(request: web.Request) -> str:
    name: str = request.match_info["id"]
    if not CONVERSATION_ID.fullmatch(name):
        raise RelayError("not_found", "no such conversation")
    return name


def _shown(view: ConversationView) -> ConversationAnswer:
    return ConversationAnswer(
        id=view.id,
        type=view.type,
        name=view.name,
        members=[MemberAnswer.model_validate({"user": m.user, "role": m.role}) for m in view.members],
        created_at=view.created_at,
    )


_PAGING: Final[dict[str, dict[str, Any]]] = {
    "cursor": {"type": "string", "description": "`next` of the page before"},
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST},
}

ROUTES: Final = (
    Route(
        "POST",
        "/v1/conversations",
        create,
        "Make a conversation, or find the one that exists",
        "conversations",
        {201: ConversationAnswer, 200: ConversationAnswer},
        request=CreateConversation,
        errors=("bad_request", "not_found", "id_conflict", "too_large"),
    ),
    Route(
        "GET",
        "/v1/conversations",
        index,
        "List own conversations, last changed first",
        "conversations",
        {200: ConversationPage},
        query=_PAGING,
        errors=("bad_request",),
    ),
    Route(
        "GET",
        "/v1/conversations/{id}",
        show,
        "One conversation with its members",
        "conversations",
        {200: ConversationAnswer},
        errors=("not_found",),
    ),
    Route(
        "GET",
        "/v1/conversations/{id}/messages",
        waiting,
        "What waits for this device in one conversation",
        "messages",
        {200: MessagePage},
        query=PAGE_QUERY,
        errors=("bad_request", "not_found"),
    ),
    Route(
        "GET",
        "/v1/conversations/{id}/devices",
        devices,
        "The devices a message goes to, for sealing",
        "conversations",
        {200: DevicesAnswer},
        errors=("not_found",),
    ),
)
