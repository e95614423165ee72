"""People: one's own profile, others', the search, and push."""

from __future__ import annotations

from typing import Any, Final
from unicodedata import category

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, Route, answer, page_limit, paging, parsed
from handlers.http.schemas.base import DoneAnswer
from handlers.http.schemas.people import (
    OwnProfileAnswer,
    PeoplePage,
    PersonAnswer,
    Preferences,
    ProfileAnswer,
    ProfilePatch,
    PushRequest,
    SearchAnswer,
    SearchPage,
)
from relay.store.people import OwnProfile, Profile
from relay.store.searching import looks_like_phone
from relay.wire.errors import RelayError
from relay.wire.ids import USER_ID

_DEFAULT: Final = 20
_MOST: Final = 50
_SHORTEST: Final = 2
_LONGEST: Final = 64
# Control characters, line and paragraph separators. Joiners are signs of format, and part of names in many languages.
_NOT_TYPED: Final = frozenset({"Cc", "Zl", "Zp"})
# Defaults are not stored: an absent preference is one.
_DEFAULTS: Final[dict[str, str | bool]] = {
    "findableByName": True,
    "findableByPhone": True,
    "whoMayMessage": "anyone",
    "whoMayAdd": "anyone",
    "deliveredReceipts": True,
    "readReceipts": True,
}
# Answered when they hold at every node.
_FOR_ALL_NODES: Final = ("whoMayMessage", "whoMayAdd", "deliveredReceipts")


async def show_me(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """One's own profile."""
    return answer(own_answer(await ctx.people.own(caller.user)))


async def change_me(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Changes the fields that are named."""
    wanted = await parsed(request, ProfilePatch)
    named: dict[str, Any] = wanted.model_dump(by_alias=True, exclude_unset=True)
    preferences = named.pop("preferences", {})
    if preferences is None:
        preferences = dict.fromkeys(_DEFAULTS)
    changes: dict[str, str | bool | None] = {
        **named,
        **{name: None if value == _DEFAULTS[name] else value for name, value in preferences.items()},
    }
    if changes:
        await _record(ctx, caller, "profile.change", fields=" ".join(sorted(changes)))
    profile = await ctx.people.change(caller.user, changes)
    if "deliveredReceipts" in changes:
        quiet, moment = not profile.delivered_receipts, profile.receipts_at
        ctx.hub.set_quiet(caller.user, quiet, moment)
        # Ahead of what is confirmed, and in the same channel. A node that does not confirm finds it in the store before the
        # wait for its lease is over (relay.jobs.preferences).
        ctx.bus.quiet(caller.user, quiet, moment)
    if not changes.keys().isdisjoint(_FOR_ALL_NODES):
        await ctx.invalidation.tell(users=[caller.user])
    return answer(own_answer(profile))


async def set_push(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Where this device is told that something waits."""
    wanted = await parsed(request, PushRequest)
    await _push(ctx, caller, {"provider": wanted.provider, "token": wanted.token})
    return answer(DoneAnswer())


async def unset_push(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """This device is told nothing any more."""
    await _push(ctx, caller, None)
    return answer(DoneAnswer())


async def searches(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """One's last searches."""
    found = await ctx.people.searches(caller.user)
    return answer(SearchPage(items=[SearchAnswer(q=search.q, at=search.at) for search in found]))


async def clear_searches(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """Forgets one's last searches."""
    await ctx.people.clear_searches(caller.user)
    return answer(DoneAnswer())


async def search(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """People by the beginning of name or user name, or by phone number."""
    q = typed(request.query.get("q", ""), shortest=_SHORTEST)
    limit = page_limit(request, _DEFAULT, _MOST)
    cursor = request.query.get("cursor")
    if looks_like_phone(q):
        await ctx.rates.check("search_phone", caller.user)
        # Whoever walks the phone book makes accounts for it.
        await ctx.rates.check("search_phone_address", caller.address)
    else:
        await ctx.rates.check("search", caller.user)
    people, following = await ctx.people.search(q, limit=limit, cursor=cursor)
    if cursor is None:
        await ctx.people.remember_search(caller.user, q)
    return answer(PeoplePage(items=[profile_answer(one) for one in people], next=following))


async def show(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """One person."""
    user = user_named(request, "id")
    profile = await ctx.people.profile(user)
    if profile is None:
        raise RelayError("not_found", "no such user")
    look = await ctx.live.presence.look(caller.user, user)
    online, seen = (None, None) if look is None else (look.online, look.last_seen)
    return answer(PersonAnswer(**profile_answer(profile).model_dump(), online=online, last_seen=seen))


def typed(text: str, *, shortest: int = 1) -> str:
    """A search that somebody typed, without blanks around it. Raises RelayError ``bad_request``."""
    found = text.strip()
    if not shortest <= len(found) <= _LONGEST or any(category(sign) in _NOT_TYPED for sign in found):
        raise RelayError(
            "bad_request",
            f"q must be a text of {shortest} to {_LONGEST} characters without control characters",
        )
    return found


def user_named(request: web.Request, part: str) -> str:
    """The user id in the path. Raises RelayError ``not_found``."""
    user: str = request.match_info[part]
    if not USER_ID.fullmatch(user):
        raise RelayError("not_found", "no such user")
    return user


def profile_answer(profile: Profile) -> ProfileAnswer:
    """What everybody may see of a person."""
    return ProfileAnswer(
        id=profile.id,
        username=profile.username,
        name=profile.name,
        picture=profile.picture,
        about=profile.about,
    )


def own_answer(profile: OwnProfile) -> OwnProfileAnswer:
    """What a person sees of themselves."""
    return OwnProfileAnswer(
        id=profile.id,
        username=profile.username,
        name=profile.name,
        phone=profile.phone,
        picture=profile.picture,
        about=profile.about,
        created_at=profile.created_at,
        preferences=Preferences(
            findable_by_name=profile.findable_by_name,
            findable_by_phone=profile.findable_by_phone,
            who_may_message=profile.who_may_message,
            who_may_add=profile.who_may_add,
            delivered_receipts=profile.delivered_receipts,
            read_receipts=profile.read_receipts,
        ),
    )


async def _record(ctx: Context, caller: Caller, act: str, **details: str) -> None:
    """Notes, before it is done, what a person changes of their own, without the values."""
    await ctx.rates.check("profile_change", caller.user)
    await ctx.audit.record(
        act,
        actor=caller.user,
        target=caller.user,
        address=caller.address,
        agent=caller.agent,
        device=caller.device,
        details=details,
    )


async def _push(ctx: Context, caller: Caller, push: dict[str, str] | None) -> None:
    await _record(ctx, caller, "push.unset" if push is None else "push.set")
    if not await ctx.people.set_push(caller.user, caller.device, push):
        raise RelayError("not_found", "no such device")


_PAGING: Final = paging(_MOST, _DEFAULT)
_Q: Final[dict[str, Any]] = {
    "required": True,
    "type": "string",
    "minLength": _SHORTEST,
    "maxLength": _LONGEST,
    "description": "The beginning of a name or user name; or, when it begins with `+` or holds only digits and the signs "
    "between them, a whole telephone number",
}

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET",
        "/v1/me",
        show_me,
        "Own profile and preferences",
        "people",
        {200: OwnProfileAnswer},
        errors=("not_found",),
    ),
    Route(
        "PATCH",
        "/v1/me",
        change_me,
        "Change own profile and preferences",
        "people",
        {200: OwnProfileAnswer},
        request=ProfilePatch,
        errors=("bad_request", "not_found", "too_large", "rate_limited"),
    ),
    Route(
        "PUT",
        "/v1/me/push",
        set_push,
        "Set where this device is told that something waits",
        "people",
        {200: DoneAnswer},
        request=PushRequest,
        errors=("bad_request", "not_found", "too_large", "rate_limited"),
    ),
    Route(
        "DELETE",
        "/v1/me/push",
        unset_push,
        "Stop telling this device that something waits",
        "people",
        {200: DoneAnswer},
        errors=("not_found", "rate_limited"),
    ),
    Route("GET", "/v1/me/searches", searches, "The last searches", "people", {200: SearchPage}),
    Route(
        "DELETE", "/v1/me/searches", clear_searches, "Forget the last searches", "people", {200: DoneAnswer}
    ),
    Route(
        "GET",
        "/v1/users",
        search,
        "Search people by name, user name or phone number",
        "people",
        {200: PeoplePage},
        query={"q": _Q, **_PAGING},
        errors=("bad_request", "rate_limited"),
    ),
    Route("GET", "/v1/users/{id}", show, "One person", "people", {200: PersonAnswer}, errors=("not_found",)),
)
