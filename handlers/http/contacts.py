"""Contacts, blocks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.people import profile_answer, typed, user_named
from handlers.http.route import Caller, Route, answer, page_limit, paging, parsed
from handlers.http.schemas.base import DoneAnswer
from handlers.http.schemas.contacts import (
    AddContact,
    ContactAnswer,
    ContactPage,
    ContactPatch,
    OnlineAnswer,
    OnlinePage,
    ReportAnswer,
    ReportRequest,
)
from relay.store.contacts import Entry
from relay.store.people import Profile
from relay.store.reports import Complaint
from relay.wire.errors import RelayError
from relay.wire.ids import new_id

_DEFAULT: Final = 50
_MOST: Final = 200


async def add(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """201 with a new contact, 200 with one that is listed already."""
    wanted = await parsed(request, AddContact)
    profile = await _other(ctx, caller, wanted.user)
    entry, new = await ctx.contacts.add(caller.user, wanted.user, name=wanted.name, shown=_sorted_as(profile))
    await _tell_if_restricted(ctx, caller.user)
    ctx.live.presence.recheck([caller.user])
    return answer(_shown(entry, profile), 201 if new else 200)


async def index(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """One's contacts by name, or whom one has blocked."""
    limit = page_limit(request, _DEFAULT, _MOST)
    cursor = request.query.get("cursor")
    q = request.query.get("q")
    match request.query.get("blocked", "false"):
        case "false":
            name = None if q is None else typed(q)
            entries, following = await ctx.contacts.page(caller.user, limit=limit, cursor=cursor, q=name)
        case "true" if q is None:
            entries, following = await ctx.contacts.blocked_page(caller.user, limit=limit, cursor=cursor)
        case "true":
            raise RelayError("bad_request", "q does not go with blocked")
        case _:
            raise RelayError("bad_request", "blocked must be true or false")
    return answer(ContactPage(items=await _all_shown(ctx, entries), next=following))


async def change(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Renames, blocks or unblocks."""
    user = user_named(request, "user")
    wanted = await parsed(request, ContactPatch)
    named = "name" in wanted.model_fields_set
    if wanted.blocked is None and not named:
        raise RelayError("bad_request", "name what to change: name or blocked")
    if wanted.blocked is not None:
        await ctx.rates.check("contact_change", caller.user)
    entry = await ctx.contacts.entry(caller.user, user)
    if wanted.blocked and (entry is None or not (entry.listed or entry.blocked)):
        profile: Profile | None = await _other(ctx, caller, user)
    else:
        profile = await ctx.people.profile(user)
    before = entry is not None and entry.blocked
    if wanted.blocked is not None and wanted.blocked != before:
        # First the record: what is not recorded is not done.
        await ctx.audit.record(
            "contact.block" if wanted.blocked else "contact.unblock",
            actor=caller.user,
            target=user,
            address=caller.address,
            agent=caller.agent,
        )
    entry = await ctx.contacts.change(
        caller.user,
        user,
        blocked=wanted.blocked,
        named=named,
        name=wanted.name,
        shown=_sorted_as(profile),
    )
    if wanted.blocked is not None:
        # Also when nothing has changed: an attempt before may have ended between the two.
        ctx.live.presence.recheck([caller.user])
        await ctx.invalidation.tell(users=[caller.user, user])
    return answer(_shown(entry, profile))


async def remove(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Takes somebody off the list; who is blocked stays blocked."""
    await ctx.contacts.remove(caller.user, user_named(request, "user"))
    await _tell_if_restricted(ctx, caller.user)
    ctx.live.presence.recheck([caller.user])
    return answer(DoneAnswer())


async def online(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Which contacts are online."""
    limit = page_limit(request, _DEFAULT, _MOST)
    users, following = await ctx.contacts.online_page(
        caller.user,
        ctx.live.presence.online_of,
        limit=limit,
        cursor=request.query.get("cursor"),
    )
    seen = await ctx.live.presence.last_seen(users)
    items = [OnlineAnswer(user=user, last_seen=seen.get(user)) for user in users]
    return answer(OnlinePage(items=items, next=following))


async def report(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Keeps a complaint for the operators."""
    wanted = await parsed(request, ReportRequest)
    if wanted.messages and wanted.conversation is None:
        raise RelayError("bad_request", "conversation: messages are named together with their conversation")
    await ctx.rates.check("report", caller.user)
    await _other(ctx, caller, wanted.user)
    complaint = Complaint(
        new_id(),
        caller.user,
        wanted.user,
        wanted.reason,
        text=wanted.text,
        conversation=wanted.conversation,
        messages=wanted.messages,
    )
    same = await ctx.contacts.reports.same(complaint)
    if same is not None:
        return answer(ReportAnswer(id=same))
    # First the record: what is not recorded is not done.
    await ctx.audit.record(
        "report.add",
        actor=caller.user,
        target=wanted.user,
        address=caller.address,
        agent=caller.agent,
        details={"report": complaint.id, "reason": wanted.reason},
    )
    kept = await ctx.contacts.reports.add(complaint)
    return answer(ReportAnswer(id=kept), 201 if kept == complaint.id else 200)


async def _other(ctx: Context, caller: Caller, user: str) -> Profile:
    if user == caller.user:
        raise RelayError("bad_request", "user: this is yourself")
    profile = await ctx.people.profile(user)
    if profile is None:
        raise RelayError("not_found", "no such user")
    return profile


async def _tell_if_restricted(ctx: Context, user: str) -> None:
    """Contacts decide who may write to somebody who lets contacts only. Asked after the change: should the preference
    change at this moment, whoever comes later tells."""
    if await ctx.people.restricted([user]):
        await ctx.invalidation.tell(users=[user])


def _sorted_as(profile: Profile | None) -> str:
    return "" if profile is None else profile.name or profile.username or ""


async def _all_shown(ctx: Context, entries: Sequence[Entry]) -> list[ContactAnswer]:
    profiles = await ctx.people.profiles([entry.user for entry in entries]) if entries else {}
    return [_shown(entry, profiles.get(entry.user)) for entry in entries]


def _shown(entry: Entry, profile: Profile | None) -> ContactAnswer:
    return ContactAnswer(
        user=entry.user,
        name=entry.name,
        listed=entry.listed,
        blocked=entry.blocked,
        profile=None if profile is None else profile_answer(profile),
        created_at=entry.created_at,
    )


_PAGING: Final = paging(_MOST, _DEFAULT)

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "POST",
        "/v1/contacts",
        add,
        "List somebody as a contact, or name them anew",
        "contacts",
        {201: ContactAnswer, 200: ContactAnswer},
        request=AddContact,
        errors=("bad_request", "not_found", "too_large"),
    ),
    Route(
        "GET",
        "/v1/contacts",
        index,
        "List own contacts by name, or the blocked",
        "contacts",
        {200: ContactPage},
        query={
            **_PAGING,
            "q": {
                "type": "string",
                "minLength": 1,
                "maxLength": 64,
                "description": "The beginning of the name; not together with `blocked=true`",
            },
            "blocked": {"type": "string", "enum": ["true", "false"], "default": "false"},
        },
        errors=("bad_request",),
    ),
    Route(
        "GET",
        "/v1/contacts/online",
        online,
        "Contacts who are online and list the caller too, or have a direct conversation with them",
        "contacts",
        {200: OnlinePage},
        query=_PAGING,
        errors=("bad_request",),
    ),
    Route(
        "PATCH",
        "/v1/contacts/{user}",
        change,
        "Name a contact; block or unblock anybody",
        "contacts",
        {200: ContactAnswer},
        request=ContactPatch,
        errors=("bad_request", "not_found", "too_large", "rate_limited"),
    ),
    Route(
        "DELETE",
        "/v1/contacts/{user}",
        remove,
        "Take somebody off the list; who is blocked stays blocked",
        "contacts",
        {200: DoneAnswer},
        errors=("not_found",),
    ),
    Route(
        "POST",
        "/v1/reports",
        report,
        "Complain about somebody to the operators",
        "contacts",
        {201: ReportAnswer, 200: ReportAnswer},
        request=ReportRequest,
        errors=("bad_request", "not_found", "too_large", "rate_limited"),
    ),
)
