"""Conversations: make, list, look at, change; what waits in one. Members are members.py's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from aiohttp import web

from handlers import changing
from handlers.context import Context
from handlers.http.pages import PAGE_QUERY, message_page
from handlers.http.people import typed
from handlers.http.route import Caller, Route, answer, json_text, page_limit, paging, parsed
from handlers.http.schemas.base import DoneAnswer
from handlers.http.schemas.conversations import (
    ChangeConversation,
    ChangeOwn,
    ConversationAnswer,
    ConversationPage,
    CreateConversation,
    DevicesAnswer,
    MemberAnswer,
    OwnAnswer,
    SettingsAnswer,
)
from handlers.http.schemas.messages import MessagePage
from handlers.joining import Join
from relay.store.conversations import ConversationView, Member
from relay.store.revisions import Origin, Revision
from relay.wire.errors import RelayError
from relay.wire.ids import CONVERSATION_ID, is_placeholder
from relay.wire.limits import Limit

_DEFAULT: Final = 50
_MOST: Final = 200
_LONGEST_Q: Final = 64


async def create(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """201 with a new conversation, 200 with the one that exists. ``members`` are user ids, as ``GET /v1/users`` finds them."""
    wanted = await parsed(request, CreateConversation)
    others = [user for user in dict.fromkeys(wanted.members) if user != caller.user]
    if wanted.type == "direct" and len(others) != 1:
        raise RelayError("bad_request", "a direct conversation has exactly one other member")
    if wanted.type == "direct" and wanted.name is not None:
        raise RelayError("bad_request", "a direct conversation has no name")
    if len(others) + 1 > ctx.limits.members:
        raise changing.too_many_members(ctx.limits.members)
    await ctx.rates.check("conversation", caller.user)
    with ctx.joins.begin([caller.user, *others]) as join:
        conversation, revision, created = await _made(ctx, caller, wanted, others, join)
        if revision is not None:
            await changing.carry_out(ctx, revision, first=created)
    view = await ctx.conversations.get(conversation, caller.user)
    return answer(shown(view), 201 if created else 200)


async def _made(
    ctx: Context, caller: Caller, wanted: CreateConversation, others: Sequence[str], join: Join
) -> tuple[str, Revision | None, bool]:
    # What is there is found whatever has changed since about the people named: the first answer may have been lost.
    found = await ctx.revisions.made(caller.user, wanted.type, others, ref=wanted.ref)
    if found is not None:
        return *found, False
    await know(ctx, caller, others)
    await check_welcome(ctx, caller, others, "whoMayMessage" if wanted.type == "direct" else "whoMayAdd")
    try:
        await check_conversations(ctx, caller, join)
    except RelayError:
        # It may be the very one that was asked for, and made meanwhile, that there is no room beside.
        found = await ctx.revisions.made(caller.user, wanted.type, others, ref=wanted.ref)
        if found is None:
            raise
        return *found, False
    return await ctx.revisions.create(
        caller.user, wanted.type, others, name=wanted.name, ref=wanted.ref, origin=origin(caller)
    )


async def know(ctx: Context, caller: Caller, users: Sequence[str]) -> None:
    """Makes sure that these users exist: those whose accounts live elsewhere are made when a token of that elsewhere names
    them. Raises RelayError ``not_found``."""
    if ctx.provision and caller.session is None:
        await ctx.accounts.add_users(users)
    if missing := await ctx.accounts.missing_users(users):
        raise RelayError("not_found", "no such user", details={"users": missing[:20]})


async def check_conversations(ctx: Context, caller: Caller, join: Join) -> None:
    """Nobody is in more conversations than the limit allows, as far as this node knows. Raises RelayError ``too_large``, which tells the limit to the
    caller about themselves only."""
    crowded = await join.crowded(ctx.conversations.crowded, ctx.limits.conversations)
    if caller.user in crowded:
        text = f"you are in {ctx.limits.conversations} conversations, that is the limit; leave one first"
        raise RelayError("too_large", text, details={"users": [caller.user]}, limit=Limit.CONVERSATIONS)
    if crowded:
        raise RelayError(
            "too_large",
            "somebody cannot be in any more conversations",
            details={"users": sorted(crowded)[:20]},
            limit=Limit.CONVERSATIONS,
        )


async def check_welcome(
    ctx: Context, caller: Caller, users: Sequence[str], preference: Literal["whoMayMessage", "whoMayAdd"]
) -> None:
    """Refuses who wants to be written to, or added, by contacts only, and for groups who has blocked the caller. Raises
    RelayError ``forbidden``."""
    restricted = await ctx.people.restricted(users)
    strict = [user for user, wish in restricted.items() if wish[preference] == "contacts"]
    listed = await ctx.contacts.lists(strict, caller.user) if strict else set()
    refused = {user for user in strict if user not in listed}
    if preference == "whoMayAdd":
        refused |= await ctx.contacts.blockers(users, caller.user)
    if refused:
        what = "be written to" if preference == "whoMayMessage" else "be added"
        raise RelayError(
            "forbidden", f"somebody does not want to {what} by you", details={"users": sorted(refused)[:20]}
        )


async def index(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """This user's conversations, last changed first."""
    q = request.query.get("q")
    views, cursor = await ctx.conversations.page(
        caller.user,
        limit=page_limit(request, _DEFAULT, _MOST),
        cursor=request.query.get("cursor"),
        q=None if q is None else typed(q),
    )
    return answer(ConversationPage(items=[shown(view) for view in views], next=cursor))


async def show(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """One conversation; absent and not yours look the same."""
    return answer(shown(await ctx.conversations.get(named(request), caller.user)))


async def edit(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Changes a group's name, picture, description and settings."""
    conversation = named(request)
    wanted = await parsed(request, ChangeConversation)
    given = wanted.model_fields_set
    if "name" in given and wanted.name is None:
        raise RelayError("bad_request", "name: a group's name can be changed, not taken away")
    fields: dict[str, Any] = {
        name: getattr(wanted, name) for name in ("name", "picture", "description") if name in given
    }
    if wanted.settings is not None and wanted.settings.who_may_post is not None:
        fields["whoMayPost"] = wanted.settings.who_may_post
    await ctx.rates.check("conversation_change", caller.user)
    await changing.change(ctx, conversation, caller.user, [], changing.editing(fields), origin=origin(caller))
    return answer(shown(await ctx.conversations.get(conversation, caller.user)))


async def dissolve(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Ends a group for everybody."""
    conversation = named(request)
    await ctx.rates.check("conversation_change", caller.user)
    await changing.change(
        ctx, conversation, caller.user, [], changing.dissolving, everybody=True, origin=origin(caller)
    )
    return answer(DoneAnswer())


async def edit_own(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Mutes, pins or archives a conversation for the caller, on all their devices."""
    conversation = named(request)
    wanted = await parsed(request, ChangeOwn)
    fields: dict[str, Any] = {
        name: value or None
        for name, value in (("pinned", wanted.pinned), ("archived", wanted.archived))
        if name in wanted.model_fields_set
    }
    if "muted_until" in wanted.model_fields_set:
        until = wanted.muted_until
        fields["mutedUntil"] = None if until is None else datetime.fromtimestamp(until / 1000, UTC)
    if fields:
        await ctx.conversations.set_own(conversation, caller.user, fields)
    return answer(shown(await ctx.conversations.get(conversation, caller.user)))


async def waiting(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """What waits for this device in one conversation, in order."""
    conversation = named(request)
    await ctx.conversations.check_member(conversation, caller.user)
    frames, cursor = await message_page(ctx, caller, request, conversation)
    return json_text(f'{{"items":[{",".join(frames)}],"next":{cursor}}}')


async def devices(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """The devices to seal a message for."""
    conversation = named(request)
    audience = await ctx.audiences.resolve(conversation)
    if caller.user not in audience.members:
        raise RelayError("not_found", "no such conversation")
    listed = [key for key in audience.keys if not is_placeholder(key)]
    return answer(DevicesAnswer(devices_rev=audience.devices_rev, devices=listed))


def named(request: web.Request) -> str:
    """The conversation id in the path. Raises RelayError ``not_found`` for what cannot be one."""
    name: str = request.match_info["id"]
    if not CONVERSATION_ID.fullmatch(name):
        raise RelayError("not_found", "no such conversation")
    return name


def shown(view: ConversationView) -> ConversationAnswer:
    """A conversation on the wire."""
    me = view.me
    return ConversationAnswer.model_validate(
        {
            "id": view.id,
            "type": view.type,
            "name": view.name,
            "picture": view.picture,
            "description": view.description,
            "settings": SettingsAnswer.model_validate({"whoMayPost": view.who_may_post}),
            "members": [shown_member(member) for member in view.members],
            "memberCount": view.member_count,
            "createdAt": view.created_at,
            "updatedAt": view.updated_at,
            "me": OwnAnswer.model_validate(
                {
                    "role": me.role,
                    "mutedUntil": me.muted_until,
                    "pinned": me.pinned,
                    "archived": me.archived,
                    "readUpTo": me.read_up_to,
                    "joinedAt": me.joined_at,
                }
            ),
        }
    )


def shown_member(member: Member) -> MemberAnswer:
    """A member on the wire."""
    return MemberAnswer.model_validate(
        {"user": member.user, "role": member.role, "name": member.name, "joinedAt": member.joined_at}
    )


def origin(caller: Caller) -> Origin:
    """Where the caller acts from."""
    return Origin(caller.address, caller.agent)


_PAGING: Final = paging(_MOST, _DEFAULT)

ROUTES: Final = (
    Route(
        "POST",
        "/v1/conversations",
        create,
        "Make a conversation, or find the one that exists",
        "conversations",
        {201: ConversationAnswer, 200: ConversationAnswer},
        request=CreateConversation,
        errors=("bad_request", "forbidden", "not_found", "too_large", "rate_limited"),
    ),
    Route(
        "GET",
        "/v1/conversations",
        index,
        "List own conversations, last changed first",
        "conversations",
        {200: ConversationPage},
        query={
            **_PAGING,
            "q": {
                "type": "string",
                "minLength": 1,
                "maxLength": _LONGEST_Q,
                "description": "only conversations with a word in their name, or in that of one of up to 16 members, "
                "that begins so; a page may then hold fewer than `limit` and still have a `next`",
            },
        },
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
        "PATCH",
        "/v1/conversations/{id}",
        edit,
        "Change a group's name, picture, description or settings",
        "conversations",
        {200: ConversationAnswer},
        request=ChangeConversation,
        errors=("bad_request", "forbidden", "not_found", "rate_limited"),
    ),
    Route(
        "DELETE",
        "/v1/conversations/{id}",
        dissolve,
        "Dissolve a group for everybody",
        "conversations",
        {200: DoneAnswer},
        errors=("forbidden", "not_found", "rate_limited"),
    ),
    Route(
        "PATCH",
        "/v1/conversations/{id}/me",
        edit_own,
        "Mute, pin or archive a conversation for oneself",
        "conversations",
        {200: ConversationAnswer},
        request=ChangeOwn,
        errors=("bad_request", "not_found"),
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
