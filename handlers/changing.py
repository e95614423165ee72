"""Changing who is in a conversation, and its settings: rights, and carrying a revision out.

A revision is carried out in an order that a crash cannot spoil: what waits for those who go is planned to be released;
memberships change; nothing resolved before can be committed any more; what waits is released; the members, and those who
were removed, are told by a system message; the revision ends. Every step may be repeated by whoever finds it undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final

from bson.errors import BSONError

from handlers.context import Context
from relay.store.audit import CHANGE
from relay.store.batcher import BatcherClosed
from relay.store.mongo import PyMongoError
from relay.store.releases import Planned
from relay.store.revisions import NOWHERE, Event, Origin, Proposal, Revision, Situation
from relay.store.shards import ShardDown
from relay.store.submissions import Stored, Submission
from relay.wire.codec import dumps
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import RELAY_USER
from relay.wire.limits import Limit

_ACTS: Final[dict[Event, str]] = {
    "created": "conversation.create",
    "added": "member.add",
    "removed": "member.remove",
    "left": "member.leave",
    "role": "member.role",
    "changed": "conversation.change",
    "dissolved": "conversation.dissolve",
}
_ON_PEOPLE: Final = frozenset({"added", "removed", "left", "role"})
_SEEN_BY: Final = frozenset({"created", "added", "removed", "left", "dissolved"})
"""Who shares a conversation may see who is online."""
Decide = Callable[[Situation], Proposal | None]
_RELAY_DEVICE: Final = "relay"
_RELAY_KEY: Final = f"{RELAY_USER}/{_RELAY_DEVICE}"
_MOST_TOLD: Final = 100
_MOST_LEFT: Final = 20_000
_LEFT_AT_ONCE: Final = 32


async def change(
    ctx: Context,
    conversation: str,
    actor: str | None,
    concerned: Sequence[str],
    decide: Decide,
    *,
    everybody: bool = False,
    origin: Origin = NOWHERE,
) -> Revision | None:
    """Brings about what ``decide`` proposes for this actor (None: the relay), durably and told; None when nothing was to
    do. Raises RelayError."""
    async with ctx.revisions.turn(conversation):
        while True:
            revision, own = await ctx.revisions.begin(
                conversation, actor, concerned, decide, everybody=everybody, origin=origin
            )
            if revision is None:
                return None
            await carry_out(ctx, revision, first=own)
            if own:
                return revision


async def carry_out(ctx: Context, revision: Revision, *, first: bool = False) -> None:
    """Does every step of a revision. May be repeated, also by several at once; ``first``: nobody can have begun yet. Raises
    RelayError when the store does not take the system message; the repair job goes on later."""
    with ctx.revisions.carrying(revision):
        applied = revision.applied
        try:
            if not applied:
                releases = await _apply(ctx, revision, first=first)
                if releases is None:
                    return
                applied = True
                for name in releases:
                    await ctx.releases.run(name)
            elif not await ctx.revisions.is_pending(revision):
                return
            # What is applied is left alone when this has to be tried again; a release has its own job.
            if revision.type == "group":
                await _announce(ctx, revision)
            await ctx.revisions.finish(revision)
        except (PyMongoError, RelayError):
            with contextlib.suppress(PyMongoError):
                await ctx.revisions.failed(revision, applied=applied)
            raise


async def _apply(ctx: Context, revision: Revision, *, first: bool) -> list[Planned] | None:
    """Until nothing resolved before can be committed any more. The releases that are to be done; None when somebody else has
    finished the revision."""
    await _audit(ctx, revision, first=first)
    releases: list[Planned] = []
    if revision.event in ("removed", "left"):
        releases = [
            await ctx.releases.plan(user, conversation=revision.conversation) for user in revision.users
        ]
    if not await ctx.revisions.apply(revision):
        return None
    if revision.event in _SEEN_BY:
        ctx.live.presence.recheck(revision.users)
    # Nobody can have resolved a conversation before it was made.
    if revision.event != "created":
        await ctx.invalidation.tell(conversations=[revision.conversation])
    return releases


def may_manage(situation: Situation) -> None:
    """Members and settings are for admins and moderators of groups. Raises RelayError ``forbidden``."""
    only_groups(situation)
    if situation.role not in ("admin", "moderator"):
        raise RelayError("forbidden", "only admins and moderators may do this")


def only_groups(situation: Situation) -> None:
    """Raises RelayError ``forbidden`` for a direct conversation."""
    if situation.type != "group":
        raise RelayError("forbidden", "a direct conversation has no members or settings to change")


def adding(users: Sequence[str], most: int) -> Decide:
    """Adds people. Who is a member already stays as they are."""

    def decide(situation: Situation) -> Proposal | None:
        may_manage(situation)
        new = [user for user in users if user not in situation.roles]
        if not new:
            return None
        if situation.members + len(new) > most:
            raise too_many_members(most)
        return Proposal("added", new)

    return decide


def too_many_members(most: int) -> RelayError:
    """The refusal of a group of more than ``most``."""
    return RelayError("too_large", f"a group has at most {most} members", limit=Limit.MEMBERS)


def removing(actor: str, user: str) -> Decide:
    """Removes somebody; oneself: leaves."""

    def decide(situation: Situation) -> Proposal | None:
        only_groups(situation)
        if user == actor:
            return leaving(situation, user)
        may_manage(situation)
        role = situation.roles.get(user)
        if role is None:
            raise RelayError("not_found", "no such member")
        if role == "admin" and situation.role != "admin":
            raise RelayError("forbidden", "only an admin may remove an admin")
        return Proposal("removed", [user])

    return decide


def leaving(situation: Situation, user: str) -> Proposal:
    """Leaves a group. Raises RelayError ``conflict`` when nobody would be left to look after it."""
    if situation.members == 1:
        return Proposal("dissolved", [user])
    if situation.role == "admin" and situation.admins == 1:
        raise RelayError(
            "conflict", "you are the last admin: make somebody else admin first, or dissolve the group"
        )
    return Proposal("left", [user])


def promoting(actor: str, user: str, role: str) -> Decide:
    """Gives a member another role."""

    def decide(situation: Situation) -> Proposal | None:
        may_manage(situation)
        before = situation.roles.get(user)
        if before is None:
            raise RelayError("not_found", "no such member")
        if situation.role != "admin" and "admin" in (before, role):
            raise RelayError("forbidden", "only an admin may make or unmake an admin")
        if before == role:
            return None
        if before == "admin" and situation.admins == 1:
            raise RelayError("conflict", f"{'you are' if user == actor else 'this is'} the last admin")
        return Proposal("role", [user], role=role)

    return decide


def editing(fields: dict[str, Any]) -> Decide:
    """Changes name, picture, description or settings; what is so already is told nobody again."""

    def decide(situation: Situation) -> Proposal | None:
        may_manage(situation)
        before = {"whoMayPost": "members", **situation.settings}
        news = {name: value for name, value in fields.items() if before.get(name) != value}
        return Proposal("changed", fields=news) if news else None

    return decide


def dissolving(situation: Situation) -> Proposal | None:
    """Ends a group for everybody."""
    only_groups(situation)
    if situation.role != "admin":
        raise RelayError("forbidden", "only an admin may dissolve a group")
    return Proposal("dissolved")


async def leave_all(ctx: Context, user: str) -> None:
    """Takes a person out of every conversation, as erasure does: groups that would be orphaned get another admin, empty
    ones are dissolved, direct conversations stay with the other person. May be repeated. One that cannot be left keeps none of
    the others; raises the first of such errors, ShardDown for a group on a shard that does not answer."""
    conversations = await ctx.conversations.of_user(user, _MOST_LEFT)
    failed: BaseException | None = None
    for start in range(0, len(conversations), _LEFT_AT_ONCE):
        outcomes = await asyncio.gather(
            *(_leave(ctx, name, kind, user) for name, kind in conversations[start : start + _LEFT_AT_ONCE]),
            return_exceptions=True,
        )
        failed = failed or next(filter(None, outcomes), None)
    await ctx.conversations.forget_creator(user, ctx.pseudonyms.of(user))
    if failed is not None:
        raise failed


async def _leave(ctx: Context, conversation: str, kind: str, user: str) -> None:
    try:
        if kind == "group":
            if ctx.messages.is_away(conversation):
                # Its members cannot be told. Whoever began all the same would leave a change that blocks the next ones.
                raise ShardDown
            await _leave_group(ctx, conversation, user)
        else:
            await change(ctx, conversation, None, [user], lambda _: Proposal("left", [user]))
    except RelayError as error:
        # Dissolved, or left, in this very moment.
        if error.code != "not_found":
            raise


async def _leave_group(ctx: Context, conversation: str, user: str) -> None:
    while True:
        heir = await ctx.conversations.successor(conversation, user)
        try:
            await change(ctx, conversation, user, [user], lambda situation: leaving(situation, user))
            return
        except RelayError as error:
            if error.code != "conflict" or heir is None:
                raise
        await change(ctx, conversation, None, [heir], _crowning(heir))


def _crowning(heir: str) -> Decide:
    # Somebody else may be taking the same person out.
    return lambda situation: (
        Proposal("role", [heir], role="admin") if situation.roles.get(heir) not in (None, "admin") else None
    )


async def _audit(ctx: Context, revision: Revision, *, first: bool) -> None:
    """Before anything is done: no act is left out. One that is carried out again is looked for first."""
    if revision.type != "group":
        return
    details: dict[str, str | int | bool] = {"conversation": revision.conversation, CHANGE: revision.id}
    if revision.role is not None:
        details["role"] = revision.role
    targets: Sequence[str | None] = revision.users if revision.event in _ON_PEOPLE else [None]
    if targets == [None]:
        details["members"] = len(revision.users)
    if not first:
        targets = await ctx.audit.missing(revision.id, targets)
    await asyncio.gather(
        *(
            ctx.audit.record(
                _ACTS[revision.event],
                actor=revision.by,
                target=target,
                address=revision.address,
                agent=revision.agent,
                details=details,
            )
            for target in targets
        )
    )


async def _announce(ctx: Context, revision: Revision) -> None:
    audience = await ctx.audiences.resolve(revision.conversation)
    also: list[str] = []
    trimmed = list(audience.trimmed(_RELAY_KEY))
    if revision.event in ("removed", "left", "dissolved"):
        mailboxes = await ctx.rosters.mailboxes(revision.users)
        also = [key for keys in mailboxes.values() for key in keys]
        full = await ctx.rosters.full_among(also)
        trimmed += [key for key in also if key in full]
        also = [key for key in also if key not in full]
    body: dict[str, Any] = {
        "event": revision.event,
        "by": revision.by,
        "users": list(revision.users[:_MOST_TOLD]),
    }
    if revision.role is not None:
        body["role"] = revision.role
    awaiting = list(dict.fromkeys([*audience.awaiting(_RELAY_KEY), *also]))
    envelope = Envelope(
        revision.conversation,
        revision.id,
        user=RELAY_USER,
        device=_RELAY_DEVICE,
        seq=ctx.clock.next(0),
        at=ctx.clock.now(),
        kind="system",
        body=dumps(body),
        structured=True,
        awaiting=awaiting,
        trimmed=trimmed,
    )
    outcome: asyncio.Future[Stored | RelayError] = asyncio.get_running_loop().create_future()

    def done(result: Stored | RelayError) -> None:
        if not outcome.done():
            outcome.set_result(result)

    try:
        # `again`: somebody else may have carried out this revision before.
        submission = Submission(
            envelope,
            audience,
            _RELAY_KEY,
            again=True,
            deadline=monotonic() + ctx.limits.send_deadline,
            done=done,
            also=also,
            inline=ctx.limits.inline,
        )
        ctx.sends.submit(submission)
    except (BSONError, BatcherClosed):
        raise RelayError("unavailable", "the relay is stopping; try again", retry_after=1000) from None
    result = await outcome
    if isinstance(result, RelayError):
        raise result
