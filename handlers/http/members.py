"""Members of a group: list, add, promote, remove, leave."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from handlers import changing
from handlers.context import Context
from handlers.http.conversations import (
    check_conversations,
    check_welcome,
    know,
    named,
    origin,
    shown,
    shown_member,
)
from handlers.http.route import Caller, Route, answer, page_limit, paging, parsed
from handlers.http.schemas.base import DoneAnswer
from handlers.http.schemas.conversations import (
    AddMembers,
    ChangeMember,
    ConversationAnswer,
    MemberAnswer,
    MemberPage,
)
from relay.wire.errors import RelayError
from relay.wire.ids import USER_ID

_DEFAULT: Final = 100
_MOST: Final = 200


async def index(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """The members, by user id."""
    page, cursor = await ctx.conversations.members(
        named(request),
        caller.user,
        limit=page_limit(request, _DEFAULT, _MOST),
        cursor=request.query.get("cursor"),
    )
    return answer(MemberPage(items=[shown_member(member) for member in page], next=cursor))


async def add(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Adds people; they get what is sent from now on. Who is a member already stays as they are."""
    conversation = named(request)
    wanted = await parsed(request, AddMembers)
    users = list(dict.fromkeys(wanted.users))
    # Rights before anything is asked about the people named: strangers learn nothing.
    view = await ctx.conversations.get(conversation, caller.user)
    if view.type != "group" or view.me.role not in ("admin", "moderator"):
        raise RelayError("forbidden", "only admins and moderators of a group may add people")
    if view.member_count >= ctx.limits.members or len(users) > ctx.limits.members:
        raise changing.too_many_members(ctx.limits.members)
    await ctx.rates.check("conversation", caller.user)
    await know(ctx, caller, users)
    there = await ctx.conversations.members_among(conversation, users)
    new = [user for user in users if user not in there]
    await check_welcome(ctx, caller, new, "whoMayAdd")
    with ctx.joins.begin(new) as join:
        await check_conversations(ctx, caller, join)
        await changing.change(
            ctx,
            conversation,
            caller.user,
            users,
            changing.adding(users, ctx.limits.members),
            origin=origin(caller),
        )
    return answer(shown(await ctx.conversations.get(conversation, caller.user)))


async def promote(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Gives a member another role."""
    conversation, user = named(request), _member(request)
    wanted = await parsed(request, ChangeMember)
    await ctx.rates.check("conversation_change", caller.user)
    await changing.change(
        ctx,
        conversation,
        caller.user,
        [user],
        changing.promoting(caller.user, user, wanted.role),
        origin=origin(caller),
    )
    found = await ctx.conversations.member(conversation, user)
    return answer(shown_member(found))


async def remove(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Removes a member, or leaves. When this answers nothing new is committed for them any more."""
    conversation, user = named(request), _member(request)
    await ctx.rates.check("conversation_change", caller.user)
    await changing.change(
        ctx,
        conversation,
        caller.user,
        [user],
        changing.removing(caller.user, user),
        origin=origin(caller),
    )
    return answer(DoneAnswer())


def _member(request: web.Request) -> str:
    user: str = request.match_info["user"]
    if not USER_ID.fullmatch(user):
        raise RelayError("not_found", "no such member")
    return user


ROUTES: Final = (
    Route(
        "GET",
        "/v1/conversations/{id}/members",
        index,
        "List the members of a conversation",
        "conversations",
        {200: MemberPage},
        query=paging(_MOST, _DEFAULT),
        errors=("bad_request", "not_found"),
    ),
    Route(
        "POST",
        "/v1/conversations/{id}/members",
        add,
        "Add people to a group",
        "conversations",
        {200: ConversationAnswer},
        request=AddMembers,
        errors=("bad_request", "forbidden", "not_found", "too_large", "rate_limited"),
    ),
    Route(
        "PATCH",
        "/v1/conversations/{id}/members/{user}",
        promote,
        "Give a member another role",
        "conversations",
        {200: MemberAnswer},
        request=ChangeMember,
        errors=("bad_request", "forbidden", "not_found", "conflict", "rate_limited"),
    ),
    Route(
        "DELETE",
        "/v1/conversations/{id}/members/{user}",
        remove,
        "Remove a member, or leave",
        "conversations",
        {200: DoneAnswer},
        errors=("forbidden", "not_found", "conflict", "rate_limited"),
    ),
)
